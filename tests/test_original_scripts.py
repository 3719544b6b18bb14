"""Scripts written for the original run over this package: they train, resume and score, on a CPU.

The scripts below call the names that the original's tools/train.py and tools/eval.py call, with their arguments.
"""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# What the scripts need on a machine without CUDA, a published teacher, and the same start every time: they set no seed.
HARNESS = """
import torch
torch.manual_seed(0)
for kind in (torch.nn.Module, torch.Tensor):
    kind.cuda = lambda self, *args, **kwargs: self
from mdistiller.models import cifar_model_dict
if __import__("os").path.exists("teacher"):
    cifar_model_dict["resnet8"] = cifar_model_dict["resnet8"][0], "teacher"
"""

TRAIN = """
import argparse
import os

import torch.backends.cudnn as cudnn

from mdistiller.dataset import get_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG as cfg
from mdistiller.engine.cfg import show_cfg
from mdistiller.engine.utils import load_checkpoint, log_msg
from mdistiller.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

cudnn.benchmark = True
parser = argparse.ArgumentParser()
parser.add_argument("--cfg", default="")
parser.add_argument("--resume", action="store_true")
parser.add_argument("opts", default=None, nargs=argparse.REMAINDER)
args = parser.parse_args()
cfg.merge_from_file(args.cfg)
cfg.merge_from_list(args.opts)
cfg.freeze()
show_cfg(cfg)

train_loader, val_loader, num_data, num_classes = get_dataset(cfg)
student = cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=num_classes)
if cfg.DISTILLER.TYPE == "NONE":
    distiller = distiller_dict["NONE"](student)
else:
    print(log_msg("the teacher", "INFO"))
    network, path = cifar_model_dict[cfg.DISTILLER.TEACHER]
    teacher = network(num_classes=num_classes)
    teacher.load_state_dict(load_checkpoint(path)["model"])
    if cfg.DISTILLER.TYPE == "CRD":
        distiller = distiller_dict["CRD"](student, teacher, cfg, num_data)
    else:
        distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg)
distiller = torch.nn.DataParallel(distiller.cuda())
if cfg.DISTILLER.TYPE != "NONE":
    print(log_msg(f"extra parameters: {distiller.module.get_extra_parameters()}", "INFO"))
name = os.path.join(cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG)
trainer = trainer_dict[cfg.SOLVER.TRAINER](name, distiller, train_loader, val_loader, cfg)
trainer.train(resume=args.resume)
"""

EVAL = """
import sys

from mdistiller.dataset import get_dataset
from mdistiller.dataset.imagenet import get_imagenet_val_loader
from mdistiller.distillers import Vanilla
from mdistiller.engine.cfg import CFG as cfg
from mdistiller.engine.utils import load_checkpoint, validate

cfg.DATASET.TYPE = "digits"
cfg.DATASET.TEST.BATCH_SIZE = 64
_, val_loader, _, num_classes = get_dataset(cfg)
model = cifar_model_dict["resnet8"][0](num_classes=num_classes)
model.load_state_dict(load_checkpoint(sys.argv[1])["model"])
model = torch.nn.DataParallel(Vanilla(model).cuda())
test_acc, test_acc_top5, test_loss = validate(val_loader, model)
print(f"{float(test_acc):.3f}")
"""

CONFIG = """
EXPERIMENT: {{PROJECT: mine, TAG: "{tag}"}}
DATASET: {{TYPE: digits}}
DISTILLER: {{TYPE: {method}, TEACHER: resnet8, STUDENT: resnet8}}
SOLVER: {{TRAINER: {trainer}, BATCH_SIZE: 32, EPOCHS: 2, LR: 0.1, LR_DECAY_STAGES: [1]}}
CRD: {{NCE: {{K: 16}}}}
LOG: {{WANDB: false}}
"""


def script(code, *arguments, cwd, preamble=HARNESS):
    command = [sys.executable, "-c", preamble + code, *map(str, arguments)]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def train(folder, method, trainer="base", *arguments):
    config = CONFIG.format(tag=method.lower(), method=method, trainer=trainer)
    (folder / f"{method}.yaml").write_text(config)
    done = script(TRAIN, "--cfg", f"{method}.yaml", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    with (folder / "output/mine" / method.lower() / "metrics.csv").open() as file:
        return done, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a trained `teacher`, its run, and what the script printed."""
    folder = tmp_path_factory.mktemp("original")
    done, rows = train(folder, "NONE")
    (folder / "output/mine/none/student_latest").rename(folder / "teacher")
    return folder, done, rows


def test_the_training_script_trains_and_shows_configuration_and_progress(teacher):
    _, done, rows = teacher
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["test_acc"]) > 30
    assert done.stdout.startswith("\033[36m[INFO] CONFIG:\n") and "TYPE: digits" in done.stdout
    assert "\nepoch 2/2: lr 0.01" in done.stdout and "\nBest accuracy: " in done.stdout


@pytest.mark.parametrize("method, trainer", [("KD", "base"), ("CRD", "crd"), ("DKD", "dot")])
def test_the_training_script_distils(teacher, method, trainer):
    folder, *_ = teacher
    done, rows = train(folder, method, trainer)
    assert len(rows) == 2 and "loss/loss_kd" in rows[0]
    assert "[INFO] the teacher" in done.stdout and "[INFO] extra parameters: " in done.stdout


def test_the_training_script_resumes(teacher):
    folder, *_ = teacher
    train(folder, "AT", "base", "SOLVER.EPOCHS", "1")
    done, rows = train(folder, "AT", "base", "--resume", "SOLVER.EPOCHS", "2")
    assert [row["epoch"] for row in rows] == ["1", "2"] and "epoch 1/2" not in done.stdout


def test_the_scoring_script_gives_and_shows_the_accuracy_that_training_logged(teacher):
    folder, _, rows = teacher
    done = script(EVAL, "teacher", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(rows[-1]["test_acc"]), abs=0.01)
    assert re.search(rf"Top-1:{done.stdout.strip()}\| Top-5:[\d.]+", done.stderr)


# The original's modules -> the names that a script may import from them. Left out are its data set classes.
NAMES = {
    "mdistiller.engine": "BaseTrainer CRDTrainer DOT CRDDOT trainer_dict",
    "mdistiller.engine.trainer": "BaseTrainer CRDTrainer DOT CRDDOT",
    "mdistiller.engine.cfg": "CFG show_cfg",
    "mdistiller.engine.dot": "DistillationOrientedTrainer",
    "mdistiller.engine.utils": "AverageMeter accuracy adjust_learning_rate load_checkpoint log_msg save_checkpoint "
    "validate",
    "mdistiller.dataset": "get_dataset get_cifar100_dataloaders get_cifar100_dataloaders_sample "
    "get_imagenet_dataloaders get_imagenet_dataloaders_sample get_tinyimagenet_dataloader "
    "get_tinyimagenet_dataloader_sample",
    "mdistiller.dataset.cifar100": "get_cifar100_dataloaders get_cifar100_dataloaders_sample "
    "get_cifar100_train_transform get_cifar100_test_transform",
    "mdistiller.dataset.imagenet": "get_imagenet_dataloaders get_imagenet_dataloaders_sample get_imagenet_val_loader "
    "get_imagenet_train_transform get_imagenet_test_transform",
    "mdistiller.dataset.tiny_imagenet": "get_tinyimagenet_dataloader get_tinyimagenet_dataloader_sample",
    "mdistiller.distillers": "Vanilla KD AT OFD RKD FitNet KDSVD CRD NST PKT SP VID ReviewKD DKD distiller_dict",
    "mdistiller.distillers._base": "Distiller Vanilla",
    "mdistiller.distillers._common": "ConvReg get_feat_shapes",
    "mdistiller.models": "cifar_model_dict imagenet_model_dict tiny_imagenet_model_dict",
    "mdistiller.models.cifar": "cifar_model_dict tiny_imagenet_model_dict",
    "mdistiller.models.imagenet": "imagenet_model_dict",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_of_the_original_can_be_imported(module):
    __import__(module)
    assert [name for name in NAMES[module].split() if not hasattr(sys.modules[module], name)] == []
