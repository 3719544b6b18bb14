"""Methods as they are published: one file and keys in cfg.py, written for the original, and run here unchanged.

Three of them, one a style, each through tools/train.py and tools/eval.py of a copy of the package.
"""

import csv
import subprocess
import sys

import pytest

from .test_custom_method import append, clone  # noqa: F401

# Logits, in the style of the forks that standardise them.
LOGITS = '''
import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller


def normalize(logit):
    mean = logit.mean(dim=-1, keepdims=True)
    stdv = logit.std(dim=-1, keepdims=True)
    return (logit - mean) / (1e-7 + stdv)


def kd_loss(logits_student_in, logits_teacher_in, temperature, logit_stand):
    logits_student = normalize(logits_student_in) if logit_stand else logits_student_in
    logits_teacher = normalize(logits_teacher_in) if logit_stand else logits_teacher_in
    log_pred_student = F.log_softmax(logits_student / temperature, dim=1)
    pred_teacher = F.softmax(logits_teacher / temperature, dim=1)
    loss_kd = F.kl_div(log_pred_student, pred_teacher, reduction="none").sum(1).mean()
    loss_kd *= temperature**2
    return loss_kd


class ZKD(Distiller):
    """Knowledge distillation on z-scores, with a margin."""

    def __init__(self, student, teacher, cfg):
        super(ZKD, self).__init__(student, teacher)
        self.temperature = cfg.ZKD.TEMPERATURE
        self.ce_loss_weight = cfg.ZKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.ZKD.LOSS.KD_WEIGHT
        self.logit_stand = cfg.EXPERIMENT.LOGIT_STAND
        self.margin = cfg.ZKD.MARGIN
        self.warmup = cfg.ZKD.WARMUP

    def forward_train(self, image, target, **kwargs):
        logits_student, _ = self.student(image)
        with torch.no_grad():
            logits_teacher, _ = self.teacher(image)
        if kwargs["epoch"] == 1 and self.margin is not None:
            print("margin", self.margin, "standardised", self.logit_stand)
        loss_ce = self.ce_loss_weight * F.cross_entropy(logits_student, target)
        loss_kd = self.kd_loss_weight * kd_loss(
            logits_student, logits_teacher, self.temperature, self.logit_stand
        )
        losses_dict = {
            "loss_ce": loss_ce,
            "loss_kd": min(kwargs["epoch"] / self.warmup, 1.0) * loss_kd,
        }
        return logits_student, losses_dict
'''
LOGITS_KEYS = """
CFG.ZKD = CN()
CFG.ZKD.TEMPERATURE = 2
CFG.ZKD.MARGIN = None
CFG.ZKD.WARMUP = 2
CFG.ZKD.LOSS = CN()
CFG.ZKD.LOSS.CE_WEIGHT = 0.1
CFG.ZKD.LOSS.KD_WEIGHT = 9
"""

# Two views in place of `image`; it says itself how it trains and is scored.
VIEWS = '''
import torch
import torch.nn as nn
import torch.nn.functional as F
import numpy as np

from ._base import Distiller
from ._common import ConvReg, get_feat_shapes


def kd_loss(logits_student, logits_teacher, temperature, reduce=True):
    log_pred_student = F.log_softmax(logits_student / temperature, dim=1)
    pred_teacher = F.softmax(logits_teacher / temperature, dim=1)
    loss_kd = F.kl_div(log_pred_student, pred_teacher, reduction="none").sum(1)
    return (loss_kd.mean() if reduce else loss_kd) * temperature**2


def bc_loss(logits_student, logits_teacher, temperature):
    batch_size, class_num = logits_teacher.shape
    pred_student = F.softmax(logits_student / temperature, dim=1)
    pred_teacher = F.softmax(logits_teacher / temperature, dim=1)
    student_matrix = torch.mm(pred_student, pred_student.transpose(1, 0))
    teacher_matrix = torch.mm(pred_teacher, pred_teacher.transpose(1, 0))
    return ((teacher_matrix - student_matrix) ** 2).sum() / batch_size


class Views(Distiller):
    def __init__(self, student, teacher, cfg):
        super(Views, self).__init__(student, teacher)
        self.temperature = cfg.VIEWS.TEMPERATURE
        self.ce_loss_weight = cfg.VIEWS.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.VIEWS.LOSS.KD_WEIGHT

    def forward_train(self, image_weak, image_strong, target, **kwargs):
        logits_student_weak, _ = self.student(image_weak)
        logits_student_strong, _ = self.student(image_strong)
        with torch.no_grad():
            logits_teacher_weak, _ = self.teacher(image_weak)
            logits_teacher_strong, _ = self.teacher(image_strong)

        batch_size, class_num = logits_student_strong.shape
        pred_teacher_weak = F.softmax(logits_teacher_weak.detach(), dim=1)
        confidence, pseudo_labels = pred_teacher_weak.max(dim=1)
        confidence = confidence.detach()
        conf_thresh = np.percentile(confidence.cpu().numpy().flatten(), 50)
        mask = confidence.le(conf_thresh).bool()

        loss_ce = self.ce_loss_weight * (
            F.cross_entropy(logits_student_weak, target) + F.cross_entropy(logits_student_strong, target)
        )
        loss_kd_weak = self.kd_loss_weight * (
            kd_loss(logits_student_weak, logits_teacher_weak, self.temperature, reduce=False) * mask
        ).mean()
        loss_kd_strong = self.kd_loss_weight * kd_loss(logits_student_strong, logits_teacher_strong, self.temperature)
        loss_bc = self.kd_loss_weight * bc_loss(logits_student_weak, logits_teacher_weak, self.temperature)
        losses_dict = {
            "loss_ce": loss_ce,
            "loss_kd": loss_kd_weak + loss_kd_strong,
            "loss_bc": loss_bc,
        }
        return logits_student_weak, losses_dict

    def train(self, mode=True):
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        for module in self.children():
            module.train(mode)
        self.teacher.eval()
        return self

    def forward_test(self, image):
        return self.student(image)[0]

    def forward(self, **kwargs):
        if self.training:
            return self.forward_train(**kwargs)
        return self.forward_test(kwargs["image"])
'''
VIEWS_KEYS = """
CFG.VIEWS = CN()
CFG.VIEWS.TEMPERATURE = 4
CFG.VIEWS.LOSS = CN()
CFG.VIEWS.LOSS.CE_WEIGHT = 0.1
CFG.VIEWS.LOSS.KD_WEIGHT = 0.9
"""

# Features through a layer of its own, and the student's classifier.
CLASSIFIER = '''
import torch
import torch.nn as nn
import torch.nn.functional as F

from ._base import Distiller
from ._common import ConvReg, get_feat_shapes


class Classifier(Distiller):
    """Class activation maps by both classifiers, and the last feature map through a regressor."""

    def __init__(self, student, teacher, cfg):
        super(Classifier, self).__init__(student, teacher)
        self.ce_loss_weight = cfg.CLASSIFIER.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.CLASSIFIER.LOSS.FEAT_WEIGHT
        self.hint_layer = cfg.CLASSIFIER.HINT_LAYER
        feat_s_shapes, feat_t_shapes = get_feat_shapes(
            self.student, self.teacher, cfg.CLASSIFIER.INPUT_SIZE
        )
        self.conv_reg = ConvReg(
            feat_s_shapes[self.hint_layer], feat_t_shapes[self.hint_layer]
        )

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.conv_reg.parameters())

    def get_extra_parameters(self):
        num_p = 0
        for p in self.conv_reg.parameters():
            num_p += p.numel()
        return num_p

    def forward_train(self, image, target, **kwargs):
        logits_student, feature_student = self.student(image)
        with torch.no_grad():
            _, feature_teacher = self.teacher(image)

        loss_ce = self.ce_loss_weight * F.cross_entropy(logits_student, target)
        cam_student = torch.einsum("bdhw,cd->bchw", feature_student["feats"][-1], self.student.fc.weight)
        cam_teacher = torch.einsum("bdhw,cd->bchw", feature_teacher["feats"][-1], self.teacher.fc.weight)
        loss_cam = F.mse_loss(F.normalize(cam_student.flatten(2), dim=2), F.normalize(cam_teacher.flatten(2), dim=2))
        f_s = self.conv_reg(feature_student["feats"][self.hint_layer])
        loss_feat = F.mse_loss(f_s, feature_teacher["feats"][self.hint_layer])
        losses_dict = {
            "loss_ce": loss_ce,
            "loss_kd": self.feat_loss_weight * (loss_cam + loss_feat),
        }
        return logits_student, losses_dict
'''
CLASSIFIER_KEYS = """
CFG.CLASSIFIER = CN()
CFG.CLASSIFIER.HINT_LAYER = 2
CFG.CLASSIFIER.INPUT_SIZE = (32, 32)
CFG.CLASSIFIER.LOSS = CN()
CFG.CLASSIFIER.LOSS.CE_WEIGHT = 1.0
CFG.CLASSIFIER.LOSS.FEAT_WEIGHT = 100.0
"""

# Name -> file, class, keys, overrides of the run, names of its losses.
METHODS = {
    "ZKD": (LOGITS, "ZKD", LOGITS_KEYS, ["EXPERIMENT.LOGIT_STAND", "True", "ZKD.MARGIN", "0.5"], ["ce", "kd"]),
    "VIEWS": (VIEWS, "Views", VIEWS_KEYS, [], ["ce", "kd", "bc"]),
    "CLASSIFIER": (CLASSIFIER, "Classifier", CLASSIFIER_KEYS, ["CLASSIFIER.HINT_LAYER", "3"], ["ce", "kd"]),
}
CONFIG = """
EXPERIMENT: {PROJECT: mine, TAG: my}
DATASET: {TYPE: digits, TRAIN_FRACTION: 0.03}
DISTILLER: {TEACHER: resnet14, STUDENT: resnet8, TEACHER_CKPT: teacher}
SOLVER: {EPOCHS: 1, BATCH_SIZE: 32}
LOG: {WANDB: false}
"""


@pytest.fixture
def fork(clone):  # noqa: F811
    """A copy of the package with an untrained teacher and a configuration; `add` gives it a method."""
    (clone / "my.yaml").write_text(CONFIG)
    run(
        clone, "-c",
        "import torch; from mdistiller.models import cifar_model_dict as d;"
        "torch.save({'model': d['resnet14'][0](num_classes=10).state_dict()}, 'teacher')",
    )  # fmt: skip
    return clone


def add(fork, name):
    """The documented steps: the file, its class in the dictionary, its keys."""
    text, cls, keys, *_ = METHODS[name]
    (fork / f"mdistiller/distillers/{cls}.py").write_text(text)
    append(
        fork / "mdistiller/distillers/__init__.py",
        f'from .{cls} import {cls}\n\ndistiller_dict.update({{"{name}": {cls}}})\n',
    )
    append(fork / "mdistiller/engine/cfg.py", keys)


def run(fork, *words):
    done = subprocess.run([sys.executable, *words], cwd=fork, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def train(fork, name, *overrides):
    words = ["DISTILLER.TYPE", name, *METHODS[name][3], *overrides]
    return run(fork, "tools/train.py", "--cfg", "my.yaml", *words)


@pytest.mark.parametrize("name", METHODS)
def test_a_published_file_runs_unchanged(name, fork):
    add(fork, name)
    said = train(fork, name)
    (metrics,) = fork.glob("output/mine/*/metrics.csv")
    with metrics.open() as file:
        (row,) = csv.DictReader(file)
    losses = {f"loss/loss_{part}": float(row[f"loss/loss_{part}"]) for part in METHODS[name][4]}
    assert all(0 < loss < float("inf") for loss in losses.values())
    assert float(row["train_loss"]) == pytest.approx(sum(losses.values()), rel=1e-4)
    if name == "ZKD":
        assert "margin 0.5 standardised True" in said
    folder = metrics.parent.relative_to(fork)
    for key, value in zip(METHODS[name][3][::2], METHODS[name][3][1::2]):
        assert f"{key}:{value}" in folder.name or f"{key}={value}" in folder.name
    scored = run(fork, "tools/eval.py", "-m", "resnet8", "-d", "digits", "-c", f"{folder}/student_best")
    assert f"{float(row['test_acc']):.2f}" in scored or f"{float(row['test_acc']):.1f}" in scored
