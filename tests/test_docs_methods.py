"""docs/methods.md: each of its methods, as the whole file that the page shows, trains under the original's command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))

CONFIG = """
EXPERIMENT: {PROJECT: docs, TAG: NAME}
DATASET: {TYPE: digits, TRAIN_FRACTION: 0.1}
DISTILLER: {TYPE: NAME, TEACHER: resnet14, STUDENT: resnet8, TEACHER_CKPT: teacher}
SOLVER: {EPOCHS: 2}
LOG: {WANDB: false}
"""
TEACHER = (
    "import torch; from mdistiller.models import cifar_model_dict as d; torch.manual_seed(0);"
    "torch.save({'model': d['resnet14'][0](num_classes=10).state_dict()}, 'teacher')"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The library with the page's three files in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("mdistiller", "tools"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "mdistiller/distillers/__init__.py").open("a") as package:
        for name, text in FILES.items():
            (folder / f"mdistiller/distillers/{name}.py").write_text(text)
            package.write(f"from .{name} import {name}\n")
            (folder / f"{name}.yaml").write_text(CONFIG.replace("NAME", name))
    run(folder, "-c", TEACHER)
    return folder


def run(folder, *command):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_shows_three_methods():
    assert set(FILES) == {"PooledHint", "MiddleLayer", "TemporalEnsemble"}


@pytest.mark.parametrize("name", FILES)
def test_a_method_of_the_page_trains_and_its_student_is_scored(name, clone):
    out = run(clone, "tools/train.py", "--cfg", f"{name}.yaml")
    header = (clone / f"output/docs/{name}/metrics.csv").read_text().splitlines()[0]
    assert "loss/loss_ce" in header and "loss/loss_kd" in header and "no gradient" not in out
    scored = run(clone, "tools/eval.py", "-c", f"output/docs/{name}/student_latest")
    last = re.search(r"last epoch: ([\d.]+)", out).group(1)
    assert f"top-1 {last}" in scored
