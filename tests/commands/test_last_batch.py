"""A last batch, or micro-batch, of a single image: BatchNorm behind ReviewKD's 1x1 map cannot train on it."""

import csv

import pytest
import torch

from mdistiller.models import cifar_model_dict


# 40 training images: batches of 13 leave one, which is left out. In four, 13 images are 4, 4 and 5, not 4, 4, 4 and 1.
# Batches of 12 leave four: in five, as 2 and 2, though a batch of five images or more would be five.
@pytest.mark.parametrize(("batch_size", "accumulate", "forward_passes"), [(13, 1, 3), (13, 4, 9), (12, 5, 14)])
def test_reviewkd_trains_where_one_image_is_left(batch_size, accumulate, forward_passes, tool, tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, teacher)
    tool(
        "train.py", "--cfg", "configs/digits/vanilla.yaml", "LOG.PREFIX", tmp_path, "LOG.WANDB", "False",
        "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.03", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE",
        batch_size, "SOLVER.ACCUMULATE", accumulate, "DISTILLER.TYPE", "REVIEWKD", "DISTILLER.TEACHER", "resnet14",
        "DISTILLER.TEACHER_CKPT", teacher,
    )  # fmt: skip
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["train_loss"]) < float("inf")
    content = torch.load(next(tmp_path.rglob("latest")), weights_only=True)
    assert content["model"]["student.bn1.num_batches_tracked"] == forward_passes
