"""The configuration tree `CFG`: what can be set, its defaults, and how YAML files and overrides are read over it.

The settings of the engine stand here; each method's hyper-parameters stand in its own file under `distillers/` and
join the tree through `method_defaults`. A method that declares none there may add its node here: `CFG.MYKD = CN()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from ..console import one_line
from ..distillers import distiller_dict, method_defaults
from ..errors import UserError
from ..paths import find_file
from .overrides import merge, override_pairs, shown

CFG = CN()

# The experiment's identity: the run's folder is LOG.PREFIX/PROJECT/NAME (TAG when NAME is empty).
CFG.EXPERIMENT = CN()
CFG.EXPERIMENT.PROJECT = "distill"
CFG.EXPERIMENT.NAME = ""
CFG.EXPERIMENT.TAG = "default"
# Every random draw of a run follows from this number: initialisation, data order, augmentation, negatives.
CFG.EXPERIMENT.SEED = 0
# "auto" is CUDA where there is one, else the CPU; or a torch device: "cpu", "cuda:1".
CFG.EXPERIMENT.DEVICE = "auto"
# On a GPU: only kernels that give the same bits every time (slower); on the CPU they always do.
CFG.EXPERIMENT.DETERMINISTIC = False

CFG.DATASET = CN()
CFG.DATASET.TYPE = "cifar100"
# The folder that holds cifar-100-python, tiny-imagenet-200 and imagenet.
CFG.DATASET.ROOT = "./data"
CFG.DATASET.NUM_WORKERS = 2
# A fixed share of every class of the training set; the same images whatever the seed.
CFG.DATASET.TRAIN_FRACTION = 1.0
# This share of the training set is held out and validated on, in place of the test set.
CFG.DATASET.VAL_FRACTION = 0.0
# Go on without the image files that cannot be read, and count them.
CFG.DATASET.SKIP_BROKEN = False
CFG.DATASET.TEST = CN()
CFG.DATASET.TEST.BATCH_SIZE = 64

CFG.DISTILLER = CN()
CFG.DISTILLER.TYPE = "NONE"
CFG.DISTILLER.TEACHER = "ResNet50"
# The teacher's weights; empty: the published checkpoint under download_ckpts (ImageNet: torchvision's weights).
CFG.DISTILLER.TEACHER_CKPT = ""
CFG.DISTILLER.STUDENT = "resnet32"
# A folder in which the teacher's outputs are kept and found again, within a run and by later runs; empty: nowhere.
CFG.DISTILLER.TEACHER_CACHE = ""
CFG.DISTILLER.TEACHER_CACHE_DTYPE = "fp16"
# The most that one teacher's outputs on one data set may take on the disk, in GiB.
CFG.DISTILLER.TEACHER_CACHE_GIB = 8.0

CFG.SOLVER = CN()
CFG.SOLVER.TRAINER = "base"
# Of one step of the optimizer, whatever the number of devices and of parts (ACCUMULATE).
CFG.SOLVER.BATCH_SIZE = 64
CFG.SOLVER.EPOCHS = 240
CFG.SOLVER.LR = 0.05
# After each of these epochs the learning rate is multiplied by LR_DECAY_RATE.
CFG.SOLVER.LR_DECAY_STAGES = [150, 180, 210]
CFG.SOLVER.LR_DECAY_RATE = 0.1
CFG.SOLVER.WEIGHT_DECAY = 0.0001
CFG.SOLVER.MOMENTUM = 0.9
# SGD or AdamW.
CFG.SOLVER.TYPE = "SGD"
CFG.SOLVER.BETAS = [0.9, 0.999]
CFG.SOLVER.DOT = CN()
CFG.SOLVER.DOT.DELTA = 0.075
# "step" (LR_DECAY_STAGES) or "cosine" (from LR down to LR_MIN at the end of the last epoch).
CFG.SOLVER.LR_SCHEDULE = "step"
CFG.SOLVER.LR_MIN = 0.0
# During the first so many epochs the learning rate rises from 0 to what the schedule says, step by step.
CFG.SOLVER.WARMUP_EPOCHS = 0
# Half precision: "none", "bf16", "fp16" (with loss scaling), or of the teacher only: "bf16-teacher", "fp16-teacher".
CFG.SOLVER.AMP = "none"
# Compile student, teacher and loss with torch.compile.
CFG.SOLVER.COMPILE = False
CFG.SOLVER.CHANNELS_LAST = True
# Gradients longer than this are cut to this length (L2, over all parameters); 0: never.
CFG.SOLVER.CLIP_GRAD_NORM = 0.0
# Decay of the running mean of the student's weights, such as 0.999, which is then validated too; 0: none is kept.
CFG.SOLVER.EMA = 0.0
# A batch is taken in so many parts, whose gradients are summed: less memory, the same step.
CFG.SOLVER.ACCUMULATE = 1
# BatchNorm over the images of all devices.
CFG.SOLVER.SYNC_BN = False
# At a loss that is not finite: "stop", or "skip" the step, at most NAN_LIMIT times in a row.
CFG.SOLVER.NAN_POLICY = "stop"
CFG.SOLVER.NAN_LIMIT = 10

CFG.LOG = CN()
# Scalars go to TensorBoard every so many iterations.
CFG.LOG.TENSORBOARD_FREQ = 500
# epoch_N and student_N are kept every so many epochs.
CFG.LOG.SAVE_CHECKPOINT_FREQ = 40
# `latest` is also written every so many iterations; 0: only at an epoch's end.
CFG.LOG.SAVE_CHECKPOINT_ITERS = 0
# So many of the newest epoch_N are kept; 0: all of them.
CFG.LOG.KEEP_CHECKPOINTS = 0
# When a checkpoint cannot be written: "stop", or "continue" to the next one.
CFG.LOG.SAVE_ERROR = "stop"
CFG.LOG.PREFIX = "./output"
CFG.LOG.WANDB = True

for section, defaults in method_defaults.items():
    CFG[section] = defaults.clone()


def load_cfg(path: str | Path, overrides: Sequence[str] = ()) -> CN:
    """The configuration of a run: `CFG`, under the YAML file at `path`, under `KEY VALUE` overrides.

    An int is accepted where the default is a float, and a float where the default happens to be an int.

    Args:
        path: from the current folder, or the name of a shipped file, such as configs/digits/kd.yaml.
        overrides: ["SOLVER.LR", "0.1", ...].

    Raises:
        UserError: no such file, not a YAML mapping, an unknown key, a value of the wrong type or range.
    """
    cfg = CFG.clone()
    merge(cfg, _read_yaml(find_file(path) or Path(path)), ())
    for key, value in override_pairs(overrides):
        node: Any = value
        for part in reversed(key.split(".")):
            node = {part: node}
        merge(cfg, node, ())
    check_cfg(cfg)
    cfg.freeze()
    return cfg


def show_cfg(cfg: CN) -> str:
    """The configuration as YAML, without the sections of the methods that this run does not use."""
    used = cfg.clone()
    used.defrost()
    for section in method_defaults.keys() - distiller_dict[cfg.DISTILLER.TYPE].config_sections(cfg):
        del used[section]
    return used.dump()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} is not a text file ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}; configs/ holds the published ones") from None
    try:
        tree = yaml.safe_load(text)
    except Exception as error:  # PyYAML lets those of its parts through: ValueError, AttributeError, KeyError, ...
        raise UserError(f"config {path} is not valid YAML: {one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds a {type(tree).__name__}, not sections such as SOLVER: and DISTILLER:")
    return tree


def _is_int(low: int) -> Any:
    return f"a whole number >= {low}", lambda v: isinstance(v, int) and v >= low


def _is_one_of(*values: str) -> Any:
    return f"one of {', '.join(values)}", lambda v: v in values


_POSITIVE = ("positive and finite", lambda v: 0 < v < float("inf"))
_NOT_NEGATIVE = (">= 0 and finite", lambda v: 0 <= v < float("inf"))

# Key -> (what is due, its test). NaN fails every comparison, infinity the upper ones.
_RANGES: dict[str, tuple[str, Any]] = {
    "EXPERIMENT.SEED": ("a whole number from 0 to 2**63 - 1", lambda v: isinstance(v, int) and 0 <= v < 2**63),
    "DATASET.NUM_WORKERS": _is_int(0),
    "DATASET.TRAIN_FRACTION": ("in (0, 1]", lambda v: 0 < v <= 1),
    "DATASET.VAL_FRACTION": ("in [0, 1)", lambda v: 0 <= v < 1),
    "DATASET.TEST.BATCH_SIZE": _is_int(1),
    "SOLVER.BATCH_SIZE": _is_int(1),
    "SOLVER.EPOCHS": _is_int(1),
    "DISTILLER.TEACHER_CACHE_DTYPE": _is_one_of("fp16", "fp32"),
    "DISTILLER.TEACHER_CACHE_GIB": _POSITIVE,
    "SOLVER.LR": _POSITIVE,
    "SOLVER.LR_DECAY_RATE": _POSITIVE,
    "SOLVER.LR_SCHEDULE": _is_one_of("step", "cosine"),
    "SOLVER.LR_MIN": _NOT_NEGATIVE,
    "SOLVER.WARMUP_EPOCHS": _is_int(0),
    "SOLVER.AMP": _is_one_of("none", "bf16", "fp16", "bf16-teacher", "fp16-teacher"),
    "SOLVER.CLIP_GRAD_NORM": _NOT_NEGATIVE,
    "SOLVER.EMA": ("in [0, 1)", lambda v: 0 <= v < 1),
    "SOLVER.ACCUMULATE": _is_int(1),
    "SOLVER.NAN_POLICY": _is_one_of("stop", "skip"),
    "SOLVER.NAN_LIMIT": _is_int(1),
    "SOLVER.BETAS": ("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v)),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": ("in [0, 1)", lambda v: 0 <= v < 1),
    "SOLVER.DOT.DELTA": ("in (-1, 1)", lambda v: -1 < v < 1),
    "LOG.TENSORBOARD_FREQ": _is_int(1),
    "LOG.SAVE_CHECKPOINT_FREQ": _is_int(1),
    "LOG.SAVE_CHECKPOINT_ITERS": _is_int(0),
    "LOG.KEEP_CHECKPOINTS": _is_int(0),
    "LOG.SAVE_ERROR": _is_one_of("stop", "continue"),
}


def check_cfg(cfg: CN) -> None:
    """Refuse values out of range.

    Raises:
        UserError: naming the key, the value and what is due.
    """
    for key, (due, holds) in _RANGES.items():
        node: Any = cfg
        for part in key.split("."):
            node = node[part]
        if not holds(node):
            raise UserError(f"{key} must be {due}, not {shown(node)}")
