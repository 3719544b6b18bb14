"""Training and scoring on folders of one's own: class folders, and images without labels."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mdistiller.analysis.plots.curves import draw_run
from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.commands.export_head import export_head
from mdistiller.commands.group_classes import group_classes
from mdistiller.commands.inspect_features import inspect_network
from mdistiller.distillers import distiller_dict
from mdistiller.engine.build import build_trainer, teacher_classes
from mdistiller.engine.cfg import CFG, load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.errors import UserError
from mdistiller.experiments.runs import read_run
from mdistiller.models import cifar_model_dict


def fill(root: Path, *folders: str, images: int = 8) -> Path:
    """Images whose colour tells the class, which is the folder's last name."""
    generator = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 120, (34, 36, 3), np.uint8)
            pixels[..., "abc".index(Path(folder).name)] += 120
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("data"), *(f"{part}/{name}" for part in ("train", "val") for name in "abc"))


def configured(folder: Path, data: Path, *overrides: object, kind: str = "folder"):
    path = folder / "run.yaml"
    path.write_text(
        f"EXPERIMENT: {{PROJECT: p, NAME: run, DEVICE: cpu}}\n"
        f"DATASET: {{TYPE: {kind}, ROOT: {data}, NUM_WORKERS: 0}}\n"
        "DISTILLER: {TYPE: NONE, STUDENT: resnet8, TEACHER: resnet8}\n"
        "SOLVER: {EPOCHS: 1, BATCH_SIZE: 8, LR: 0.02}\n"
        f"LOG: {{WANDB: false, PREFIX: {folder}, TENSORBOARD_FREQ: 1}}\n"
    )
    return load_cfg(path, [str(word) for word in overrides])


def train(folder: Path, data: Path, *overrides: object, kind: str = "folder") -> Path:
    trainer = build_trainer(configured(folder, data, *overrides, kind=kind), name="run")
    trainer.train()
    return folder / "run"


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("teacher"), data, "SOLVER.EPOCHS", 4)


def top1(text: str) -> float:
    return float(re.search(r"top-1 ([\d.]+)", text)[1])


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Class folders


def test_the_run_says_what_its_data_told(teacher: Path) -> None:
    told = yaml.safe_load((teacher / "config.yaml").read_text())["DATASET"]
    assert (told["NUM_CLASSES"], told["IMAGE_SIZE"], len(told["MEAN"])) == (3, 32, 3)


def test_a_run_is_scored_as_it_was_validated(teacher: Path, data: Path) -> None:
    best = max(float(row["test_acc"]) for row in rows_of(teacher))
    said = evaluate_checkpoint(None, str(teacher / "student_best"), None, 16, num_workers=0, device="cpu")
    assert top1(said) == pytest.approx(best, abs=0.01) and "at 32x32" in said
    for root in (data, data / "val"):
        named = evaluate_checkpoint(
            "resnet8", str(teacher / "student_best"), "folder", 16, data_root=str(root), num_workers=0, device="cpu"
        )
        assert named.splitlines()[0] == said.splitlines()[0]


def test_a_run_is_scored_on_other_folders_than_its_own(teacher: Path, data: Path) -> None:
    said = evaluate_checkpoint(
        None, str(teacher / "student_best"), None, 16, data_root=str(data / "train"), num_workers=0, device="cpu"
    )
    assert "24 images" in said


def test_a_network_of_other_classes_is_refused(teacher: Path, tmp_path: Path) -> None:
    root = fill(tmp_path, "val/a", "val/b", images=2)
    with pytest.raises(UserError, match=r"2 class folders, but DATASET.NUM_CLASSES is 3"):
        evaluate_checkpoint(
            None, str(teacher / "student_best"), None, 16, data_root=str(root), num_workers=0, device="cpu"
        )


def test_the_other_commands_read_class_folders(teacher: Path, data: Path, tmp_path: Path) -> None:
    shown = inspect_network(
        "resnet8", str(teacher / "student_best"), "folder", tmp_path / "plots", tsne_images=0, data_root=str(data),
        num_workers=0, device="cpu", batch_size=16,
    )  # fmt: skip
    assert "24 images" in shown
    of_run = inspect_network(
        "resnet8", str(teacher / "student_best"), "folder", tmp_path / "plots", tsne_images=0, run=teacher,
        num_workers=0, device="cpu", batch_size=16,
    )  # fmt: skip
    assert of_run == shown
    torch.manual_seed(0)  # of an untrained network, which makes errors
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=3).state_dict()}, tmp_path / "untrained")
    groups = group_classes(
        "resnet8", str(tmp_path / "untrained"), "folder", 1, tmp_path / "groups.json", data_root=str(data),
        num_workers=0, device="cpu",
    )  # fmt: skip
    assert "on 24 images of folder (train)" in groups


def test_a_plain_head_is_exported_by_the_runs_own_settings(teacher: Path, tmp_path: Path) -> None:
    state = load_checkpoint(teacher / "student_best")["model"]
    source = tmp_path / "run"
    source.mkdir()
    torch.save({"model": {f"base.{name}": tensor for name, tensor in state.items()}}, source / "student_best")
    (source / "config.yaml").write_text((teacher / "config.yaml").read_text())
    said = export_head(source / "student_best", tmp_path / "plain.pth")
    assert "-m resnet8 -d folder" in said and (tmp_path / "plain.pth").is_file()


def test_a_resumed_run_ends_as_one_that_was_never_stopped(data: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = train(tmp_path / "one", data, "SOLVER.EPOCHS", 2, "DATASET.IMAGE_SIZE", 66)
    train(tmp_path / "two", data, "SOLVER.EPOCHS", 1, "DATASET.IMAGE_SIZE", 66)
    again = build_trainer(
        configured(tmp_path / "two", data, "SOLVER.EPOCHS", 2, "DATASET.IMAGE_SIZE", 66, "DATASET.MEMORY_GIB", 0.0),
        name="run",
    )
    again.train(resume=True)
    ours, theirs = (load_checkpoint(run / "student_latest")["model"] for run in (whole, tmp_path / "two" / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Images without labels

UNLABELLED = ("DISTILLER.TYPE", "KD", "KD.LOSS.CE_WEIGHT", 0, "DATASET.VAL_FRACTION", 0.25)


def distilled(folder: Path, data: Path, teacher: Path, *overrides: object) -> Path:
    ckpt = ("DISTILLER.TEACHER_CKPT", teacher / "student_best")
    return train(folder, data, *UNLABELLED, *ckpt, *overrides, kind="images")


def test_a_student_learns_to_agree_with_its_teacher(teacher, data, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "mdistiller")
    run = distilled(tmp_path, data, teacher, "SOLVER.EPOCHS", 3, "SOLVER.EMA", 0.5)
    rows = rows_of(run)
    assert {"test_agreement", "test_agreement_top5", "test_kl", "test_agreement_head_ema"} <= rows[0].keys()
    assert not any(name.startswith(("test_acc", "train_acc")) or name == "test_loss" for name in rows[0])
    assert float(rows[-1]["test_agreement"]) > 60 and float(rows[-1]["test_kl"]) < float(rows[0]["test_kl"])
    said = caplog.text
    assert re.search(r"train_loss [\d.]+, test_agreement [\d.]+, test_kl [\d.]+", said) and "Best agreement" in said
    assert "test_acc" not in said and "warning" not in said.lower()
    worklog = (run / "worklog.txt").read_text()
    assert "test_agreement: " in worklog and "best_agreement\t" in worklog and "acc" not in worklog
    assert yaml.safe_load((run / "config.yaml").read_text())["DATASET"]["NUM_CLASSES"] == 3
    best = load_checkpoint(run / "best")
    scores = [float(row["test_agreement_head_student"]) for row in rows]
    assert best["epoch"] == max(i for i, s in enumerate(scores, 1) if s == max(scores))
    assert draw_run(run) == run / "curves.png" and (run / "curves.png").is_file()


def test_the_agreement_is_that_of_the_two_networks(teacher, data, tmp_path) -> None:
    run = distilled(tmp_path, data, teacher)
    cfg = load_cfg(run / "config.yaml", ["DISTILLER.STUDENT_CKPT", ""])
    trainer = build_trainer(cfg, name="again")
    trainer.distiller.student.load_state_dict(load_checkpoint(run / "student_latest")["model"])
    trainer.distiller.eval()
    image = torch.cat([batch[0] for batch in trainer.val_loader])
    with torch.no_grad():
        networks = trainer.distiller.student, trainer.distiller.teacher
        ours, theirs = (network(image)[0].double() for network in networks)
    agreement = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean()
    kl = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean()
    (row,) = rows_of(run)
    assert float(row["test_agreement"]) == pytest.approx(float(agreement), abs=1e-3)
    assert float(row["test_kl"]) == pytest.approx(float(kl), rel=1e-4)


def test_a_resumed_run_without_labels_ends_alike(teacher, data, tmp_path) -> None:
    (tmp_path / "one").mkdir()
    whole = distilled(tmp_path / "one", data, teacher, "SOLVER.EPOCHS", 2)
    distilled(tmp_path, data, teacher)
    ckpt = ("DISTILLER.TEACHER_CKPT", teacher / "student_best")
    cfg = configured(tmp_path, data, *UNLABELLED, *ckpt, "SOLVER.EPOCHS", 2, kind="images")
    build_trainer(cfg, name="run").train(resume=True)
    ours, theirs = (load_checkpoint(run / "student_latest")["model"] for run in (whole, tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_classes_are_those_of_the_teacher(teacher, data, tmp_path) -> None:
    from mdistiller.dataset import info_of

    cfg = configured(
        tmp_path, data, *UNLABELLED, "DISTILLER.TEACHER_CKPT", teacher / "student_best", kind="images"
    )
    assert teacher_classes(cfg, info_of(cfg)) == 3


def test_another_number_of_classes_than_the_teachers_is_refused(teacher, data, tmp_path) -> None:
    with pytest.raises(UserError, match=r"head of 3 classes, but DATASET.NUM_CLASSES is 5; set it to 0 or to 3$"):
        distilled(tmp_path, data, teacher, "DATASET.NUM_CLASSES", 5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("DISTILLER.TYPE", "KD"), r"no labels, does not go with KD, whose loss reads .*set KD.LOSS.CE_WEIGHT 0$"),
        (("DISTILLER.TYPE", "NONE"), r"Vanilla, whose loss reads labels.*take a method that can do without"),
        (("DISTILLER.TYPE", "DKD", "DKD.CE_WEIGHT", 0), r"DKD, whose loss reads labels.*take a method"),
        (("DISTILLER.TYPE", "CRD", "CRD.LOSS.CE_WEIGHT", 0), r"CRD, whose loss reads labels.*take a method"),
        (("DISTILLER.TYPE", "DCGD_KD", "KD.LOSS.CE_WEIGHT", 0), r"reads labels.*; set DCGD.LOSS.CE_WEIGHT 0$"),
        (("DISTILLER.TYPE", "REVIEWKD"), r"reads labels.*; set REVIEWKD.CE_WEIGHT 0$"),
        (("DISTILLER.TYPE", "FITNET"), r"reads labels.*; set FITNET.LOSS.CE_WEIGHT 0$"),
        ((*UNLABELLED, "SOLVER.LABEL_SMOOTHING", 0.1), "SOLVER.LABEL_SMOOTHING 0.1: there are none to smooth"),
        ((*UNLABELLED, "DISTILLER.SCORE_TEACHER", True), "DISTILLER.SCORE_TEACHER True: there are no labels"),
    ],
)
def test_a_loss_of_the_labels_is_refused_before_anything_starts(data, tmp_path, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        build_trainer(configured(tmp_path, data, "DATASET.VAL_FRACTION", 0.25, *overrides, kind="images"), name="run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_reads_labels_by_mistake_fails(teacher, data, tmp_path) -> None:
    cfg = configured(tmp_path, data, *UNLABELLED, "DISTILLER.TEACHER_CKPT", teacher / "student_best", kind="images")
    trainer = build_trainer(cfg, name="run")
    trainer.distiller.cross_entropy = lambda logits, target, **_: torch.nn.functional.cross_entropy(logits, target)
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):
        trainer.train()


@pytest.mark.parametrize("method", ["AT", "SP", "REVIEWKD", "RKD", "FITNET", "DIST", "NormKD", "DCGD_KD"])
def test_other_methods_train_without_labels(teacher, data, tmp_path, method) -> None:
    weights = distiller_dict[method].label_weights(CFG)
    off = [word for key in weights for word in (key, 0)]
    grouped = ("DCGD.GROUPS", "groups.json") if method.startswith("DCGD") else ()
    if grouped:
        (tmp_path / "groups.json").write_text('{"groups": [[0, 1], [2]]}')
        grouped = ("DCGD.GROUPS", tmp_path / "groups.json")
    run = distilled(tmp_path, data, teacher, "DISTILLER.TYPE", method, *off, *grouped)
    assert float(rows_of(run)[0]["train_loss"]) > 0 and "test_agreement" in rows_of(run)[0]


def test_nothing_is_scored_on_images_without_labels(teacher, data) -> None:
    with pytest.raises(UserError, match="the images of -d images have no labels to score by"):
        evaluate_checkpoint("resnet8", str(teacher / "student_best"), "images", 16, data_root=str(data), device="cpu")


def test_an_agreement_is_not_shown_as_an_accuracy(teacher, data, tmp_path) -> None:
    run = read_run(distilled(tmp_path, data, teacher))
    with pytest.raises(UserError, match="was trained on images without labels: it has no accuracy"):
        _ = run.best
