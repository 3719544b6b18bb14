"""Combinations of the modes in `engine.modes`, as runs of train_small.py that stop and resume."""

from __future__ import annotations

import signal
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.engine.modes import MODES, Setup, broken_rule
from mdistiller.engine.overrides import merge, override_pairs
from mdistiller.engine.trainer import trainer_dict

from .covering import Case, Pair, covering_array, pairs_in, pairs_of
from .runs import Launcher, Run, Zygote

TOOL = Path(__file__).with_name("train_small.py")
OFF = "-"
BY_NAME = {mode.name: mode for mode in MODES}
# One method of each kind: of logits; with a bank; with a teacher in training mode; with several heads; without teacher.
METHODS = ("KD", "CRD", "OFD", "DCGD", "NONE")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
# What makes a run small. Its own values of a mode's settings replace these.
BASE = {
    "EXPERIMENT.PROJECT": "p", "EXPERIMENT.NAME": "run", "EXPERIMENT.DEVICE": "cpu", "LOG.WANDB": "False",
    "DATASET.ROOT": "../data", "DATASET.NUM_WORKERS": "0", "DATASET.TRAIN_FRACTION": "1.0", "DATASET.VAL_FRACTION": "0",
    "DATASET.TEST.BATCH_SIZE": "8", "DISTILLER.TEACHER": "small", "DISTILLER.TEACHER_CKPT": "../data/teacher",
    "SOLVER.EPOCHS": "2", "SOLVER.LR_DECAY_STAGES": "[1]", "LOG.TENSORBOARD_FREQ": "2",
    "LOG.SAVE_CHECKPOINT_FREQ": "1", "LOG.SAVE_CHECKPOINT_ITERS": "0", "CRD.NCE.K": "8", "AB.INIT_EPOCHS": "1",
    "FSP.INIT_EPOCHS": "1", "FT.INIT_EPOCHS": "1",
    "DCGD.GROUPS": "../data/groups.json",
}  # fmt: skip


def _factors() -> dict[str, tuple[str, ...]]:
    """Factor -> its levels. Modes of the same setting are levels of one factor."""
    by_setting: dict[str, list[str]] = {}
    for mode in MODES:
        by_setting.setdefault(next(iter(mode.settings), mode.name), [OFF]).append(mode.name)
    return {
        "method": METHODS,
        "student": ("small", "dropout"),
        "data": ("small_images", "small_files"),
        "last batch": ("short", "whole"),
        "stopped by": tuple(SIGNALS),
        **{key: tuple(levels) for key, levels in by_setting.items()},
    }


FACTORS = _factors()
COMPILED = ("SOLVER.COMPILE", "compiled")


class Anything(Distiller):
    """A method that every mode goes with, in place of one that a case leaves open."""

    compares_maps = True
    soft_labels = True
    standardizes_logits = True
    decouples = True
    teacher_outputs = ("logits",)


def world_of(case: Case) -> int:
    return 2 if case.get("several ranks", OFF) != OFF else 1


def settings_of(case: Case) -> dict[str, str]:
    """The settings of a case, which may leave factors open."""
    modes = [BY_NAME[level] for level in case.values() if level in BY_NAME]
    chosen = {key: str(value) for mode in modes for key, value in mode.settings.items()}
    named = {"method": "DISTILLER.TYPE", "student": "DISTILLER.STUDENT", "data": "DATASET.TYPE"}
    chosen |= {key: case[factor] for factor, key in named.items() if factor in case}
    return {**chosen, "SOLVER.BATCH_SIZE": str(batch_size(case))}


def launcher_of(case: Case, zygote: Zygote) -> Launcher:
    """Starts the case's processes: one, or the ranks as torchrun would start them."""
    return partial(zygote.launch if world_of(case) == 1 else zygote.launch_pair, tool=TOOL)


def run_of(case: Case, folder: Path, launcher: Launcher, stop: str = "") -> Run:
    """A run of the case; `stop`, if given, is the STOP of train_small.py."""
    return Run(folder, BASE | settings_of(case), launcher, {"STOP": stop} if stop else {})


def batch_size(case: Case) -> int:
    """12, of which the last batch has 8 images, or a divisor of the number of images; 70 of 80 are left to train on."""
    if case.get("last batch") == "short":
        return 12
    return 14 if case.get("DATASET.VAL_FRACTION", OFF) != OFF else 16


def steps_of(case: Case) -> int:
    """Steps in an epoch."""
    images = 70 if case.get("DATASET.VAL_FRACTION", OFF) != OFF else 80
    return -(-images // batch_size(case))


def refused(case: Case) -> bool:
    """Whether the table refuses a case; of factors that are left open, nothing is assumed."""
    settings = settings_of(case)
    method = distiller_dict[case["method"]] if "method" in case else Anything
    update = trainer_dict[settings.get("SOLVER.TRAINER", "base")].update_rule
    loader = SimpleNamespace(variants=None if case.get("data") == "small_files" else 1)
    return broken_rule(Setup(_tree(tuple(settings.items())), method, update, world_of(case), loader)) is not None


@cache
def _tree(settings: tuple[tuple[str, str], ...]):
    cfg = CFG.clone()
    for key, value in override_pairs([word for pair in settings for word in pair]):
        node = value
        for part in reversed(key.split(".")):
            node = {part: node}
        merge(cfg, node, CFG)
    return cfg


@cache
def refused_pairs() -> frozenset[Pair]:
    """The pairs of levels that the table refuses."""
    return frozenset(pair for pair in pairs_of(FACTORS) if refused(dict(pair)))


def allowed(case: Case) -> bool:
    """Whether a case, with some method if it leaves that open, holds no refused pair."""
    if "method" not in case:
        return any(allowed({"method": method, **case}) for method in METHODS)
    return not pairs_in(case, list(FACTORS)) & refused_pairs()


def plain_cases() -> list[Case]:
    """Every allowed pair of levels, without compiling, which takes seconds a run."""
    factors = {**FACTORS, COMPILED[0]: (OFF,)}
    return covering_array(factors, pairs_of(factors), allowed, seed=1)


def compiled_cases() -> list[Case]:
    """Compiling, paired with every level."""
    factors = {**FACTORS, COMPILED[0]: COMPILED[1:]}
    return covering_array(factors, [pair for pair in pairs_of(factors) if COMPILED in pair], allowed, seed=1)


def described(case: Case) -> str:
    """A case in a few words: its levels, without the modes that are off."""
    return ", ".join(level for level in case.values() if level != OFF)
