"""Which run `--resume` continues, where the overrides given with it are not those that the run was started with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode as CN

from ..console import note
from ..distributed.ranks import Ranks
from ..errors import UserError
from .cfg import load_cfg
from .files.run_folder import newest_whole, resumable_files
from .overrides import flat_settings
from .resume_facts import CHANGES, Change, check_same_run
from .run_name import experiment_name, name_with, named_overrides, override_text, overrides_in

_Pairs = list[tuple[str, str]]
# A name that was cut does not tell its overrides: it is compared with those of up to so many overrides less.
_LEFT_OUT = 3
# Runs of several seeds are several runs, whether it was named in each or not.
_SEED = "EXPERIMENT.SEED"


class _Candidate(NamedTuple):
    """A run in the same project, of the same name or tag, all of whose overrides are given again.

    Attributes:
        same: how many of the overrides in its name have the given value, maybe since it was resumed.
        minus_other: minus the number of those that have another one.
        changed: whether any of the given overrides would change the run.
    """

    same: int
    minus_other: int
    folder: Path
    changed: bool


def run_to_resume(cfg: CN, overrides: Sequence[str], ranks: Ranks) -> str:
    """The name of the run to resume. Every rank must call this; all get the answer of the first.

    It is the run of this configuration and these overrides, its `experiment_name`. If none was begun, it is the run
    that was started with the most of these overrides; a difference in the others is what the user wants to change. It
    may also have been started with other values of them, unless these tell runs apart (`Change.BETWEEN_EPOCHS`, such as
    the batch size). It has the same seed, and is not trained to SOLVER.EPOCHS already if anything would change.

    Raises:
        UserError: there is no such run, there are several, or the one cannot go on with the settings of `cfg`.
    """
    answer: tuple[str, str] = ("", "")
    if ranks.first:
        try:
            answer = _find(cfg, overrides), ""
        except UserError as error:
            answer = "", str(error)
    name, refused = ranks.gather(answer)[0]
    if refused:
        raise UserError(refused)
    return name


def _find(cfg: CN, overrides: Sequence[str]) -> str:
    wanted = experiment_name(cfg, overrides)
    own = Path(cfg.LOG.PREFIX) / wanted
    other = None if _has_begun(own) else _likeliest(cfg, own, named_overrides(cfg, overrides))
    folder = own if other is None else other.folder
    recorded = _recorded(folder)
    if recorded is not None:
        try:
            check_same_run(recorded, cfg)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    if other is not None:
        _check_not_trained(cfg, own, other)
        note(f"no run was started as {own}; resuming {folder}")
    return f"{wanted.split('/')[0]}/{folder.name}"


def _has_begun(folder: Path) -> bool:
    """Whether a run was begun in `folder`.

    Raises:
        UserError: it ended before its first checkpoint.
    """
    if resumable_files(folder):
        return True
    if not os.path.isfile(folder / "config.yaml"):
        return False
    raise UserError(
        f"no checkpoint at {folder / 'latest'}; this run ended before its first one, so leave out --resume to start it"
    )


def _check_not_trained(cfg: CN, own: Path, found: _Candidate) -> None:
    """Refuse to take a run that is trained already for a change of it."""
    done = newest_whole(found.folder)[0]["epoch"]
    if found.changed and done >= cfg.SOLVER.EPOCHS:
        raise UserError(
            f"no checkpoint at {own / 'latest'}, and {found.folder} is trained already, to epoch {done}; raise "
            "SOLVER.EPOCHS to resume that run, or leave out --resume to start this one"
        )


def _likeliest(cfg: CN, own: Path, given: _Pairs) -> _Candidate:
    """The run that is resumed in place of `own`, which does not exist."""
    found = list(_candidates(cfg, own, given))
    best = max(found, default=None)
    if best is None:
        raise UserError(f"no checkpoint at {own / 'latest'}{_what_else(cfg, own)}")
    equals = [other.folder for other in found if other[:2] == best[:2]]
    if len(equals) > 1:
        raise UserError(
            f"no run was started as {own}, and --resume may mean {' or '.join(map(str, equals))}; name one of them, "
            f"such as EXPERIMENT.NAME '{equals[0].name}'"
        )
    return best


def _candidates(cfg: CN, own: Path, given: _Pairs) -> Iterator[_Candidate]:
    keys, texts, settings = {key for key, _ in given}, {override_text(cfg, *pair) for pair in given}, flat_settings(cfg)
    # Names of fewer overrides, and these.
    fewer = {
        name_with(cfg, some).split("/")[1]: some
        for count in range(max(len(given) - _LEFT_OUT, 0), len(given))
        for some in combinations(given, count)
    }
    for folder in _runs(own.parent):
        named = overrides_in(folder.name, cfg)
        if folder.name in fewer:
            named = [(key, override_text(cfg, key, value)) for key, value in fewer[folder.name]]
        if named is None or not {key for key, _ in named} <= keys:
            continue
        recorded = _recorded(folder)
        if recorded is None:
            changed = keys - {key for key, text in named if text in texts}
        else:
            now = flat_settings(recorded)
            changed = {key for key in keys if now[key] != settings[key]}
        other = [key for key, text in named if text not in texts and key in changed]
        apart = [key for key in other if CHANGES.get(key) is Change.BETWEEN_EPOCHS]
        if not apart and _SEED not in changed:
            yield _Candidate(len(named) - len(other), -len(other), folder, bool(changed))


def _runs(project: Path) -> Iterator[Path]:
    """The folders in `project` that hold a run to resume, by name."""
    with suppress(OSError):
        yield from (folder for folder in sorted(project.iterdir()) if resumable_files(folder))


def _recorded(folder: Path) -> CN | None:
    """The configuration of the run in `folder`; None where it cannot be read, as in a run of the original."""
    with suppress(UserError):
        return load_cfg(folder / "config.yaml")
    return None


def _what_else(cfg: CN, own: Path) -> str:
    """What a user may have meant who asked for the run `own`, as the end of a sentence."""
    others = [folder.name for folder in _runs(own.parent) if overrides_in(folder.name, cfg) is not None]
    if not others:
        return "; leave out --resume to start this run"
    return (
        f"; {own.parent} holds {', '.join(others[:3])}{', ...' if others[3:] else ''}: to resume one of them, give its "
        f"overrides too, or its name, such as EXPERIMENT.NAME '{others[0]}'"
    )
