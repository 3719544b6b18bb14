"""Every registered method, and DOT, through tools/train.py for a few steps on real images."""

import ast
import csv
from pathlib import Path

import pytest
import torch

from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import load_cfg
from mdistiller.models import cifar_model_dict

REPOSITORY = Path(__file__).resolve().parents[2]
DOT = {"KD with DOT": ("KD", "dot"), "CRD with DOT": ("CRD", "crd_dot")}
STAGES = ("AB", "FITNET", "FSP", "FT")  # methods with a stage before training
RUNS = {name: (name, "base") for name in distiller_dict} | {"CRD": ("CRD", "crd")} | DOT


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An untrained resnet14 for ten classes, in the original's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "ckpt_epoch_240.pth"
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, path)
    return path


@pytest.mark.parametrize("run", RUNS)
def test_it_trains_from_the_command_line(run, teacher, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # configs/digits/groups.json
    method, trainer = RUNS[run]
    tool(
        "train.py", "--cfg", "configs/digits/vanilla.yaml", "LOG.PREFIX", tmp_path, "LOG.WANDB", "False",
        "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.03", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "16",
        "SOLVER.TRAINER", trainer, "DISTILLER.TYPE", method, "DISTILLER.TEACHER", "resnet14",
        "DISTILLER.TEACHER_CKPT", teacher, "CRD.NCE.K", "16", "DCGD.GROUPS", "configs/digits/groups.json",
        *(word for stage in STAGES for word in (f"{stage}.INIT_EPOCHS", "1")),
    )  # fmt: skip
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        *before, row = csv.DictReader(file)
    assert len(before) == (method in STAGES)
    terms = {name: float(value) for name, value in row.items() if name.startswith("loss/") and value}
    assert float(row["train_loss"]) == pytest.approx(sum(terms.values()), rel=1e-4)
    counts = {"NONE": 1, "SIMKD": 1, "SEMCKD": 3, "SRRL": 3, "AB": 1, "FSP": 1, "MLKD": 4}
    counts |= {"DCGD": 4, "DCGD_CE": 3, "DCGD_KD": 4, "DCGD_DKD": 4}
    assert len(terms) == counts.get(method, 2)


@pytest.mark.parametrize(
    "method, pairs",
    [
        ("AT", "[[3, 3]]"),
        ("FITNET", "[[1, 2]]"),
        ("REVIEWKD", "[[0, 1], [3, 3]]"),
        ("DCGD --BASE VID", "[[1, 1], [-1, -1]]"),
    ],
)
def test_pairs_of_maps_named_on_the_command_line(method, pairs, teacher, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    method, _, base = method.partition(" --BASE ")
    tool(
        "train.py", "--cfg", "configs/digits/vanilla.yaml", "LOG.PREFIX", tmp_path, "LOG.WANDB", "False",
        "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.03", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "16",
        "DISTILLER.TYPE", method, "DISTILLER.TEACHER", "resnet14", "DISTILLER.TEACHER_CKPT", teacher,
        "DISTILLER.PAIRS", pairs, "DCGD.GROUPS", "configs/digits/groups.json", "DCGD.BASE", base or "KD",
    )  # fmt: skip
    (config,) = tmp_path.rglob("config.yaml")
    read = load_cfg(config).DISTILLER.PAIRS
    assert read == ast.literal_eval(pairs)
