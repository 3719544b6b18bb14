"""A last batch, or micro-batch, of a single image: BatchNorm behind ReviewKD's 1x1 map cannot train on it."""

import csv
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mdistiller.dataset.batch import FIELDS, VIEWS
from mdistiller.distillers import distiller_dict
from mdistiller.engine.build import build_distiller, facts_without_data
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.trainer import trainer_dict
from mdistiller.errors import UserError
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


def own_trainer(method, folder, batch_size, *settings):
    """A trainer on a user's own DataLoader of nine images, which drops no last batch."""
    words = [
        "DISTILLER.TYPE", method, "DISTILLER.STUDENT", "resnet8", "DISTILLER.TEACHER", "resnet8", "CRD.NCE.K", "4",
        "DCGD.GROUPS", "configs/digits/groups.json", "EXPERIMENT.DEVICE", "cpu", "LOG.PREFIX", str(folder),
        "LOG.WANDB", "False", "SOLVER.EPOCHS", "2", "SOLVER.LR", "0.001", "AB.INIT_EPOCHS", "1", "FSP.INIT_EPOCHS", "1",
        "FT.INIT_EPOCHS", "1", *settings,
    ]  # fmt: skip
    cfg = load_cfg("configs/digits/vanilla.yaml", words)
    torch.manual_seed(0)
    distiller = build_distiller(cfg, replace(facts_without_data(cfg), num_data=9), trained=False)
    image, target = torch.rand(9, 3, 32, 32), torch.arange(9)
    views = [name for name in VIEWS if name in distiller.needs_batch]
    train = DataLoader(TensorDataset(image, target, torch.arange(9), *(image for _ in views)), batch_size)
    train.targets, train.fields = target, (*FIELDS, *views)
    return trainer_dict["base"]("run", distiller, train, DataLoader(TensorDataset(image, target), 1), cfg)


def steps_of(trainer):
    (first, *_), updates = trainer.distiller.student.parameters(), []
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(first.detach().clone()))
    trainer.train()
    return len(updates)


@pytest.mark.parametrize("method", distiller_dict)
def test_a_last_batch_of_one_image_in_an_own_loader(method, tmp_path, capsys):
    """Only ReviewKD cannot train on it; it leaves the batch out, says so once, and changes nothing by it."""
    trainer = own_trainer(method, tmp_path, 4)
    steps = steps_of(trainer)
    needs_two = method == "REVIEWKD"
    assert steps == 2 * (2 if needs_two else 3)
    assert capsys.readouterr().err.count("batch 3 is a single image, on which ReviewKD cannot train") == needs_two
    batch_norms = [m for m in trainer.distiller.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    passes = 2 if "image_weak" in trainer.distiller.needs_batch else 1
    in_stages = 3 if method in ("AB", "FSP") else 0  # which train the student
    assert {int(m.num_batches_tracked) for m in batch_norms} == {passes * steps + in_stages}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert all(0 < float(row["train_loss"]) < float("inf") for row in csv.DictReader(file))


@pytest.mark.parametrize("method", distiller_dict)
def test_batches_of_one_image_train_or_are_refused_by_name(method, tmp_path):
    trainer = own_trainer(method, tmp_path, 1, "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "1")
    if method != "REVIEWKD":
        assert steps_of(trainer) == 9
        return
    with pytest.raises(UserError, match=r"SOLVER.BATCH_SIZE 1 gives single images, on which ReviewKD cannot train"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (("SOLVER.BATCH_SIZE", 1), "set SOLVER.BATCH_SIZE 2 or more"),
        (("SOLVER.BATCH_SIZE", 4, "SOLVER.ACCUMULATE", 4), "set SOLVER.BATCH_SIZE 5 or more, or SOLVER.ACCUMULATE 1"),
    ],
)
def test_reviewkd_refuses_single_images_before_anything_is_written(settings, remedy, tool, tmp_path, capsys):
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=10).state_dict()}, tmp_path / "teacher")
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as end:
        tool(
            "train.py", "--cfg", "configs/digits/vanilla.yaml", "LOG.PREFIX", output, "LOG.WANDB", "False",
            "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.03", "DISTILLER.TYPE", "REVIEWKD",
            "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", tmp_path / "teacher", *settings,
        )  # fmt: skip
    assert end.value.code == 2 and not output.exists()
    assert capsys.readouterr().err.strip().endswith(remedy)
