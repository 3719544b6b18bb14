"""From keyword arguments to the configuration tree.

A setting may be given by its last part in lower case (`lr=0.05` is SOLVER.LR), by as many of its last parts as tell it
from others (`dot_delta=0.1`), by its whole name (`**{"SOLVER.LR": 0.05}`), or with its section (`DKD={"T": 4}`). Where
a short name fits several settings, the one that lies least deep is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..distillers import distiller_dict, method_defaults
from ..engine.cfg import CFG, nested
from ..engine.overrides import flat_settings, shown
from ..errors import UserError
from ..registry import unknown_name

Tree = dict[str, Any]

# Short names that no key has.
_ALIASES = {"optimizer": "SOLVER.TYPE"}
_DATA = "DATASET."
# What the images that a caller brings still leave open; and what the trainer does to whole batches of them.
_OF_ANY_DATA = {f"{_DATA}{key}" for key in ("NUM_CLASSES", "IMAGE_SIZE", "MEAN", "STD")}
_OF_BATCHES = {f"{_DATA}{key}" for key in ("MIXUP", "CUTMIX", "ERASING")}
# Settings that other arguments decide, and which.
_DECIDED = {
    "DISTILLER.TYPE": "the method is the argument `method`",
    "DISTILLER.TEACHER": "the teacher is the argument `teacher`",
    "DISTILLER.STUDENT": "the student is the argument `student`",
    "SOLVER.BATCH_SIZE": "the training loader decides it; give its DataLoader another batch_size",
    "LOG.PREFIX": "the run's folder is the argument `output`",
    "EXPERIMENT.NAME": "the run's folder is the argument `output`",
}  # fmt: skip
# What a loss alone reads; the rest is of the training loop.
_OF_LOSS = (
    "DISTILLER.PAIRS", "DISTILLER.TEACHER_FEATS", "DISTILLER.STUDENT_FEATS", "SOLVER.EPOCHS", "SOLVER.LABEL_SMOOTHING",
    "EXPERIMENT.SEED", "EXPERIMENT.LOGIT_STAND",
)  # fmt: skip


def method_name(name: str) -> str:
    """The registered name of a method, in whatever case `name` is.

    Raises:
        UnknownNameError: there is none; the message suggests near names.
    """
    by_lower = {known.lower(): known for known in distiller_dict}
    if str(name).lower() not in by_lower:
        raise unknown_name("method", str(name), distiller_dict)
    return by_lower[str(name).lower()]


def settings_given(method: str, keywords: Mapping[str, Any], loss_only: bool = False) -> dict[str, Any]:
    """The settings that keyword arguments mean, by their whole names.

    Args:
        method: the registered name; its own hyper-parameters have short names too.
        loss_only: refuse those of a training loop, which `mdistiller.distiller` has none of.

    Raises:
        UserError: an unknown name, one that means several settings, or a setting that another argument decides.
    """
    own = _own_sections(method)
    known = _keys(own)
    short = _short_names(known)
    found: dict[str, Any] = {}
    for keyword, value in keywords.items():
        for key, one in _meant(keyword, value, known, short, method):
            if key in found:
                raise UserError(f"{key} is given twice, as {shown(found[key])} and {shown(one)}; give it once")
            _check_taken(key, one, own, loss_only)
            found[key] = str(one) if isinstance(one, (Path, torch.device)) else one
    return found


def tree_of(settings: Mapping[str, Any]) -> list[Tree]:
    """Settings by their whole names, as trees for `cfg_of`."""
    return [nested(key, value) for key, value in settings.items()]


def _own_sections(method: str) -> set[str]:
    sections: set[str] = distiller_dict[method].config_sections(CFG)
    return sections


def _keys(own: set[str]) -> list[str]:
    """The whole names of the engine's settings and of those in the sections `own`."""
    others = method_defaults.keys() - own
    return [key for key in flat_settings(CFG) if key.partition(".")[0] not in others]


def _short_names(keys: Iterable[str]) -> dict[str, list[str]]:
    """Every short name, with the settings that it fits and that lie least deep."""
    fitting: dict[str, list[str]] = {}
    for key in keys:
        parts = key.lower().split(".")
        for start in range(len(parts)):
            fitting.setdefault("_".join(parts[start:]), []).append(key)
    depth = {name: min(key.count(".") for key in found) for name, found in fitting.items()}
    return {name: [key for key in found if key.count(".") == depth[name]] for name, found in fitting.items()}


def _meant(
    keyword: str, value: Any, known: list[str], short: Mapping[str, list[str]], method: str
) -> Iterable[tuple[str, Any]]:
    """The settings that one keyword argument gives, with their values."""
    whole, own_case = keyword.upper(), {key.upper(): key for key in known}  # a method's own keys may be of lower case
    section = whole in CFG or any(key.startswith(f"{whole}.") for key in own_case)
    if isinstance(value, Mapping) and (keyword == "settings" or section):
        above = "" if keyword == "settings" else f"{whole}."
        for key, inner in value.items():
            yield from _meant(f"{above}{key}", inner, known, short, method)
        return
    if whole in own_case:
        yield own_case[whole], value
        return
    keys = [_ALIASES[keyword]] if keyword in _ALIASES else short.get(keyword.lower(), [])
    if len(keys) > 1:
        raise UserError(f"{keyword} could be {' or '.join(keys)}; write settings={{{keys[0]!r}: {shown(value)}}}")
    if not keys:
        raise _unknown(keyword, known, short, method)
    yield keys[0], value


def _unknown(keyword: str, known: list[str], short: Mapping[str, list[str]], method: str) -> UserError:
    section = keyword.partition(".")[0].upper()
    if section in CFG and section in method_defaults and section not in _own_sections(method):
        return UserError(f"{keyword} is a setting of another method than {method}, which would ignore it; leave it out")
    names = known if "." in keyword else [*_ALIASES, *(name for name, keys in short.items() if len(keys) == 1)]
    return unknown_name("setting", keyword, names)


def _check_taken(key: str, value: Any, own: set[str], loss_only: bool) -> None:
    """Refuse a setting that would be ignored."""
    if key in _DECIDED:
        raise UserError(f"{key} {shown(value)} would be ignored: {_DECIDED[key]}")
    if key.startswith(_DATA) and key not in _OF_ANY_DATA | _OF_BATCHES:
        raise UserError(f"{key} {shown(value)} would be ignored: it is of the data sets that the library reads itself")
    if loss_only and not (key in _OF_ANY_DATA or key in _OF_LOSS or key.partition(".")[0] in own):
        raise UserError(
            f"{key} {shown(value)} would be ignored: it is of the training loop, which is your own; mdistiller.distill "
            "has one"
        )
