"""`~` in every path that a command or a configuration takes: the home folder, whoever expands it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mdistiller.commands.main import main
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.grouped import GroupedStudent

from ..experiments.hand_made import write_run

CONFIG = """
EXPERIMENT: {PROJECT: p, TAG: run}
DATASET: {TYPE: digits, ROOT: ~/data, TRAIN_FRACTION: 0.03}
DISTILLER: {TYPE: KD, TEACHER: resnet8, TEACHER_CKPT: ~/teacher, STUDENT: resnet8, TEACHER_CACHE: ~/cache}
SOLVER: {BATCH_SIZE: 16, EPOCHS: 1}
LOG: {WANDB: false, PREFIX: ~/runs}
"""
GROUPS = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
NAMED = "runDISTILLER.TEACHER_CACHE_DTYPE:fp16"
NETWORK = ["-m", "resnet8", "-d", "digits", "-c", "~/teacher", "--data-root", "~/data"]
# The command line, and what it must have written under the home folder.
COMMANDS = {
    "train": (["train", "--cfg", "~/kd.yaml"], f"runs/p/{NAMED}/latest"),
    "train, after =": (["train", "--cfg=~/kd.yaml", "LOG.PREFIX", "~/elsewhere"], f"elsewhere/p/{NAMED}/latest"),
    "train with groups": (
        ["train", "--cfg", "~/kd.yaml", "DISTILLER.TYPE", "DCGD_KD", "DCGD.GROUPS", "~/groups.json",
         "DISTILLER.TEACHER_CACHE", ""],
        "runs/p/runDISTILLER.TYPE:DCGD_KD,DCGD.GROUPS:~_groups.json/latest",
    ),
    "eval": (["eval", *NETWORK], ""),
    "eval of groups": (
        ["eval", "-m", "resnet8", "-d", "digits", "--groups", "~/groups.json", "--ckpt=~/grouped"], "",
    ),
    "convert": (["convert", "~/teacher", "~/t.safetensors"], "t.safetensors"),
    "export-head": (
        ["export-head", "~/grouped", "-m", "resnet8", "-d", "digits", "-o", "~/new/head.pth"], "new/head.pth",
    ),
    "plot": (["plot", "~/run", "a=~/run", "-o", "~/new/curves.png"], "new/curves.png"),
    "plot of one": (["plot", "~/run"], "run/curves.svg"),
    "report": (["report", "~/run", "--out", "~/new/page.html"], "new/page.html"),
    "table": (["table", "~/plan.yaml", "-o", "~/new"], "new/table.md"),
    "group-classes": (
        ["group-classes", *NETWORK, "--num-groups", "2", "-o", "~/new/g.json"], "new/g.json",
    ),
    "inspect-features": (
        ["inspect-features", *NETWORK, "--tsne-images", "0", "--teacher", "resnet8", "--teacher-ckpt", "~/teacher",
         "-o", "~/new"],
        "new/figures.json",
    ),
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, with a teacher, groups, a run, a plan; the current folder is an empty one."""
    home, here = tmp_path / "home", tmp_path / "here"
    monkeypatch.setenv("HOME", str(home))
    here.mkdir()
    monkeypatch.chdir(here)
    write_run(home / "run", [{"train_acc": 40.0, "train_loss": 1.0, "test_acc": 50.0, "lr": 0.1, "epoch_seconds": 1}])
    (home / "kd.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    network = build_model(cifar_model_dict, "resnet8", 10)
    torch.save({"model": network.state_dict()}, home / "teacher")
    torch.save({"model": GroupedStudent(network, GROUPS).state_dict()}, home / "grouped")
    (home / "groups.json").write_text(json.dumps(GROUPS))
    method = {"config": "~/kd.yaml", "overrides": {"LOG.PREFIX": "~/planned", "DISTILLER.TEACHER_CACHE": ""}}
    plan = {"title": "t", "seeds": [0], "methods": {"KD": method}, "over": []}
    (home / "plan.yaml").write_text(json.dumps(plan))
    return home


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_paths_may_begin_with_the_home_folder(home, name, capsys):
    command, written = COMMANDS[name]
    main(command)
    assert (home / written).exists(), list(home.rglob("*"))
    assert os.listdir() == [], "no folder called ~"
    if name == "train":
        assert os.listdir(home / "cache")
        assert f"TEACHER_CKPT: {home}/teacher" in (home / f"runs/p/{NAMED}/config.yaml").read_text()


def test_inspect_features_of_a_run_in_the_home_folder(home):
    main(["train", "--cfg", "~/kd.yaml", "DISTILLER.TEACHER_CACHE", ""])
    main(["inspect-features", "--run", "~/runs/p/run", "--tsne-images", "0"])
    assert (home / "runs/p/run/inspect/figures.json").is_file() and os.listdir() == []


UNKNOWN = {
    "config": ["train", "--cfg", "~nobody_such/kd.yaml"],
    "override": ["train", "--cfg", "~/kd.yaml", "LOG.PREFIX", "~nobody_such/x"],
    "checkpoint": ["eval", "-m", "resnet8", "-c", "~nobody_such/x"],
    "output": ["convert", "~/teacher", "~nobody_such/x"],
    "run": ["plot", "a=~nobody_such/x"],
    "plan": ["table", "~nobody_such/x"],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_user_that_is_not_there_gives_one_line(home, name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(UNKNOWN[name])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    key = "LOG.PREFIX: " if name == "override" else ""
    assert said.err.startswith(f"error: {key}cannot expand ~nobody_such of the path ~nobody_such/")
    assert os.listdir() == []


def test_a_shell_that_leaves_the_tilde_to_the_command(home):
    """In a real process, as `sh` passes on --cfg=~/... and what stands in quotes."""
    line = f"{sys.executable} -m mdistiller train --cfg=~/kd.yaml LOG.PREFIX '~/by_shell' DISTILLER.TEACHER_CACHE ''"
    package = os.path.dirname(os.path.dirname(sys.modules["mdistiller"].__file__))
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (home / "by_shell/p/run/latest").is_file() and os.listdir() == []
