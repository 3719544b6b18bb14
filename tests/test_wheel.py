"""The wheel in an environment without the clone: every command, on real input."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mdistiller.commands.main import COMMANDS

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = ["LOG.WANDB", "False", "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]"]
PLAN = """
title: A few digits
seeds: [0]
overrides: {DATASET.TRAIN_FRACTION: 0.1, SOLVER.EPOCHS: 1, LOG.WANDB: false}
methods: {student: {config: configs/digits/vanilla.yaml}}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that the clone stays clean."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("mdistiller", "configs", "plans"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "requirements.txt", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(REPOSITORY / name, copy)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", out, copy)
    (path,) = out.glob("mdistiller-*.whl")
    return path


def pip(python, *arguments):
    command = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def mdistiller(wheel, tmp_path_factory):
    """Run the installed command `mdistiller ...` in a folder that has nothing to do with the clone."""
    venv, work = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("work")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip(python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment; its own mdistiller, which may be the clone, is not among them.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments):
        command = [venv / "bin" / "mdistiller", *arguments]
        done = subprocess.run(
            list(map(str, command)), cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import mdistiller; print(mdistiller.__file__)"], cwd=work, env=environment,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(venv) in where, where
    run.work = work
    return run


def test_it_holds_the_package_and_its_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mdistiller"}
    for name in ("configs/digits/kd.yaml", "plans/digits.yaml", "analysis/html_report.html", "py.typed"):
        assert f"mdistiller/{name}" in names


def test_every_command_runs_without_the_clone(mdistiller):
    ran = {"quickstart"}  # which runs four trainings like the one below

    def command(name, *arguments):
        ran.add(name)
        return mdistiller(name, *arguments)

    output = mdistiller.work / "output"
    assert "Best accuracy" in command("train", "--cfg", "configs/digits/vanilla.yaml", *QUICK)
    (run,) = output.glob("digits/*")
    student = run / "student_latest"
    network = ["-m", "resnet8", "-d", "digits", "-c", student]
    assert "top-1" in command("eval", *network)
    command("plot", run)
    command("convert", student, "resnet8.safetensors")
    command("inspect-features", *network, "--tsne-images", "0", "-o", "inside")
    command("group-classes", *network, "--num-groups", "2", "--split", "kfold", "-o", "groups.json")
    grouped = ["DISTILLER.TYPE", "DCGD_CE", "DCGD.GROUPS", "groups.json", "DISTILLER.TEACHER", "resnet8"]
    name = ["DISTILLER.TEACHER_CKPT", student, "EXPERIMENT.PROJECT", "dcgd"]
    mdistiller("train", "--cfg", "configs/digits/vanilla.yaml", *QUICK, *grouped, *name)
    (dcgd,) = output.glob("dcgd/*")
    command("export-head", dcgd / "student_latest", "-o", "head.pth")
    (mdistiller.work / "few.yaml").write_text(PLAN)
    assert "| student |" in command("table", "few.yaml")
    command("report", "output/plan_few")
    assert ran == set(COMMANDS)
    assert {path.name for path in mdistiller.work.iterdir()} == {
        "output", "resnet8.safetensors", "inside", "groups.json", "groups.png", "head.pth", "few.yaml",
    }  # fmt: skip
