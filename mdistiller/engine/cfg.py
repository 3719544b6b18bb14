"""The configuration tree `CFG`: what can be set, its defaults, and how YAML files and overrides are read over it.

The settings of the engine stand here; each method's hyper-parameters stand in its own file under `distillers/` and
join the tree through `method_defaults`. A method that declares none there may add its node here: `CFG.MYKD = CN()`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from ..distillers import method_defaults
from ..errors import UserError
from ..registry import near_names

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

CFG.DATASET = CN()
CFG.DATASET.TYPE = "cifar100"
# The folder that holds cifar-100-python, tiny-imagenet-200 and imagenet.
CFG.DATASET.ROOT = "./data"
CFG.DATASET.NUM_WORKERS = 2
# A fixed share of every class of the training set; the same images whatever the seed.
CFG.DATASET.TRAIN_FRACTION = 1.0
# This share of the training set is held out and validated on, in place of the test set.
CFG.DATASET.VAL_FRACTION = 0.0
CFG.DATASET.TEST = CN()
CFG.DATASET.TEST.BATCH_SIZE = 64

CFG.DISTILLER = CN()
CFG.DISTILLER.TYPE = "NONE"
CFG.DISTILLER.TEACHER = "ResNet50"
# The teacher's weights; empty: the published checkpoint under download_ckpts (ImageNet: torchvision's weights).
CFG.DISTILLER.TEACHER_CKPT = ""
CFG.DISTILLER.STUDENT = "resnet32"

CFG.SOLVER = CN()
CFG.SOLVER.TRAINER = "base"
CFG.SOLVER.BATCH_SIZE = 64
CFG.SOLVER.EPOCHS = 240
CFG.SOLVER.LR = 0.05
# After each of these epochs the learning rate is multiplied by LR_DECAY_RATE.
CFG.SOLVER.LR_DECAY_STAGES = [150, 180, 210]
CFG.SOLVER.LR_DECAY_RATE = 0.1
CFG.SOLVER.WEIGHT_DECAY = 0.0001
CFG.SOLVER.MOMENTUM = 0.9
CFG.SOLVER.TYPE = "SGD"
CFG.SOLVER.DOT = CN()
CFG.SOLVER.DOT.DELTA = 0.075

CFG.LOG = CN()
# Scalars go to TensorBoard every so many iterations.
CFG.LOG.TENSORBOARD_FREQ = 500
# epoch_N and student_N are kept every so many epochs.
CFG.LOG.SAVE_CHECKPOINT_FREQ = 40
CFG.LOG.PREFIX = "./output"
CFG.LOG.WANDB = True

for section, defaults in method_defaults.items():
    CFG[section] = defaults.clone()


def load_cfg(path: str | Path, overrides: Sequence[str] = ()) -> CN:
    """The configuration of a run: `CFG`, under the YAML file at `path`, under `KEY VALUE` overrides.

    An int is taken where the default is a float, and a float where it happens to be an int.

    Raises:
        UserError: no such file, not a YAML mapping, an unknown key, a value of the wrong type or range.
    """
    cfg = CFG.clone()
    _merge(cfg, _read_yaml(Path(path)), ())
    for key, value in override_pairs(overrides):
        node: Any = value
        for part in reversed(key.split(".")):
            node = {part: node}
        _merge(cfg, node, ())
    check_cfg(cfg)
    cfg.freeze()
    return cfg


def override_pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """["A.B", "1", ...] as [("A.B", "1"), ...].

    Raises:
        UserError: a key without a value.
    """
    if len(overrides) % 2:
        raise UserError(f"override {overrides[-1]!r} has no value; write KEY VALUE pairs, such as SOLVER.LR 0.1")
    return list(zip(overrides[::2], overrides[1::2]))


def show_cfg(cfg: CN) -> str:
    """The configuration as YAML, without the sections of the methods that this run does not use."""
    used = cfg.clone()
    used.defrost()
    # DCGD_KD takes DCGD's settings and KD's; plain DCGD those of its DCGD.BASE.
    kinds = {cfg.DISTILLER.TYPE, *cfg.DISTILLER.TYPE.split("_")}
    if "DCGD" in kinds:
        kinds.add(cfg.DCGD.BASE)
    for section in method_defaults:
        if section not in kinds:
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds a {type(tree).__name__}, not sections such as SOLVER: and DISTILLER:")
    return tree


def _merge(cfg: CN, tree: dict[Any, Any], above: tuple[str, ...]) -> None:
    """Read `tree` over `cfg`, in place; `above` is where in the whole tree we are."""
    for key, value in tree.items():
        name = ".".join((*above, str(key)))
        if key not in cfg:
            near = [".".join((*above, k)) for k in near_names(str(key), cfg)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(cfg)}"
            raise UserError(f"unknown config key {name!r}; {hint}")
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                raise UserError(f"{name} is a section with keys {', '.join(cfg[key])}; it cannot be set to {value!r}")
            _merge(cfg[key], value, (*above, str(key)))
        else:
            cfg[key] = _coerce(name, value, cfg[key])


def _coerce(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`, or an error that says what is due."""
    if isinstance(default, str):
        # TAG: 1 and NAME: true are names that happen to look like something else to YAML.
        if isinstance(value, (str, int, float)):
            return str(value)
        raise UserError(f"{name} must be text, not {value!r}")
    if isinstance(value, str):
        # Command-line values arrive as text, and so does YAML's 1e-4.
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise UserError(f"{name} must be True or False, not {value!r}")
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name} must be a number such as {default}, not {value!r}")
        return float(value) if isinstance(default, float) else value
    if isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list such as {list(default)}, not {value!r}")
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
            raise UserError(f"{name} must be a list of numbers such as {list(default)}, not {value!r}")
        return list(value)
    raise AssertionError(f"default of {name} has the unforeseen type {type(default).__name__}")


def _is_int(low: int) -> Any:
    return f"a whole number >= {low}", lambda v: isinstance(v, int) and v >= low


# Key -> (what is due, its test). NaN fails every comparison, infinity the upper ones.
_RANGES: dict[str, tuple[str, Any]] = {
    "EXPERIMENT.SEED": ("a whole number from 0 to 2**63 - 1", lambda v: isinstance(v, int) and 0 <= v < 2**63),
    "DATASET.NUM_WORKERS": _is_int(0),
    "DATASET.TRAIN_FRACTION": ("in (0, 1]", lambda v: 0 < v <= 1),
    "DATASET.VAL_FRACTION": ("in [0, 1)", lambda v: 0 <= v < 1),
    "DATASET.TEST.BATCH_SIZE": _is_int(1),
    "SOLVER.BATCH_SIZE": _is_int(1),
    "SOLVER.EPOCHS": _is_int(1),
    "SOLVER.LR": ("positive and finite", lambda v: 0 < v < float("inf")),
    "SOLVER.LR_DECAY_RATE": ("positive and finite", lambda v: 0 < v < float("inf")),
    "SOLVER.WEIGHT_DECAY": (">= 0 and finite", lambda v: 0 <= v < float("inf")),
    "SOLVER.MOMENTUM": ("in [0, 1)", lambda v: 0 <= v < 1),
    "SOLVER.DOT.DELTA": ("in (-1, 1)", lambda v: -1 < v < 1),
    "LOG.TENSORBOARD_FREQ": _is_int(1),
    "LOG.SAVE_CHECKPOINT_FREQ": _is_int(1),
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
            raise UserError(f"{key} must be {due}, not {node!r}")
