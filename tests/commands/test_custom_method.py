"""A user's own method: by the four documented steps of the original, and in one file."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

METHOD = '''
import torch.nn.functional as F

from ._base import Distiller


class MyDistiller(Distiller):
    def __init__(self, student, teacher, cfg):
        super(MyDistiller, self).__init__(student, teacher)
        self.hyper1 = cfg.MyDistiller.hyper1

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        logits_teacher, _ = self.teacher(image)
        return logits_student, {
            "loss_ce": F.cross_entropy(logits_student, target),
            "loss_kd": self.hyper1 * (logits_student - logits_teacher).square().mean(),
        }
'''

CONFIG = """
EXPERIMENT: {PROJECT: mine, TAG: my}
DATASET: {TYPE: digits, TRAIN_FRACTION: 0.1}
DISTILLER: {TYPE: MyDistiller, TEACHER: resnet8, STUDENT: resnet8, TEACHER_CKPT: teacher}
MyDistiller: {hyper1: 2}
SOLVER: {EPOCHS: 1}
LOG: {WANDB: false}
"""


@pytest.fixture
def clone(tmp_path):
    for folder in ("mdistiller", "tools"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(path, text):
    path.write_text(path.read_text() + text)


def train(clone):
    (clone / "my.yaml").write_text(CONFIG)
    teacher = (
        "import torch; from mdistiller.models import cifar_model_dict as d;"
        "torch.save({'model': d['resnet8'][0](num_classes=10).state_dict()}, 'teacher')"
    )
    subprocess.run([sys.executable, "-c", teacher], cwd=clone, check=True)
    done = subprocess.run(
        [sys.executable, "tools/train.py", "--cfg", "my.yaml"], cwd=clone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    header = (clone / "output/mine/my/metrics.csv").read_text().splitlines()[0]
    assert "loss/loss_ce" in header and "loss/loss_kd" in header


def test_the_originals_four_steps(clone):
    (clone / "mdistiller/distillers/MyDistiller.py").write_text(METHOD)
    append(
        clone / "mdistiller/distillers/__init__.py",
        'from .MyDistiller import MyDistiller\n\ndistiller_dict["MyDistiller"] = MyDistiller\n',
    )
    append(clone / "mdistiller/engine/cfg.py", "\nCFG.MyDistiller = CN()\nCFG.MyDistiller.hyper1 = 0.5\n")
    train(clone)


def test_a_method_in_one_file(clone):
    decorated = METHOD.replace(
        "from ._base import Distiller\n",
        "from yacs.config import CfgNode as CN\n\nfrom ._base import Distiller, register\n",
    ).replace("class MyD", '@register("MyDistiller", CN({"hyper1": 0.5}))\nclass MyD')
    (clone / "mdistiller/distillers/MyDistiller.py").write_text(decorated)
    append(clone / "mdistiller/distillers/__init__.py", "from .MyDistiller import MyDistiller\n")
    train(clone)
