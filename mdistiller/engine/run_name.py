"""The name of a run, which is also its folder, and the settings that do not enter the name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence

from yacs.config import CfgNode as CN

from ..system import takes_colons
from .overrides import flat_settings, override_pairs
from .teacher.cache import cache_wanted

# Settings that say where and how a run is executed, not what it computes. They do not enter its name, and may differ
# between a plan and the finished run that it finds.
_MACHINE_KEYS = re.compile(
    r"LOG\.|EXPERIMENT\.(PROJECT|NAME|TAG|DEVICE)$|DATASET\.(ROOT|MEMORY_GIB|NUM_WORKERS|TEST\.BATCH_SIZE)$"
    r"|DISTILLER\.(TEACHER_CACHE(_GIB|_DEVICE)?|SCORE_TEACHER)$"
)
# Bytes that are left of a name which is too long for a folder.
_CUT_TO = 240
_CACHE_DTYPE = "DISTILLER.TEACHER_CACHE_DTYPE"


def is_machine_key(key: str) -> bool:
    """Whether the setting `key`, such as "DATASET.ROOT", has no effect on what a run computes."""
    return _MACHINE_KEYS.match(key) is not None


def experiment_name(cfg: CN, overrides: Sequence[str] = ()) -> str:
    """`<project>/<name or tag>` plus `KEY:VALUE` of the overrides, valid as a path.

    A run with a teacher cache also names the cache's dtype, which rounds the teacher's outputs. On a file system whose
    names cannot have a `:`, such as Windows's, it is `=`.
    """
    return name_with(cfg, named_overrides(cfg, overrides))


def named_overrides(cfg: CN, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """The overrides that enter a run's name, as (KEY, VALUE)."""
    pairs = [(key, value) for key, value in override_pairs(overrides) if not is_machine_key(key)]
    if cache_wanted(cfg) and _CACHE_DTYPE not in dict(pairs):
        pairs.append((_CACHE_DTYPE, cfg.DISTILLER.TEACHER_CACHE_DTYPE))
    return pairs


def name_with(cfg: CN, pairs: Iterable[tuple[str, str]]) -> str:
    """The name of a run whose named overrides are `pairs`."""
    name = _base(cfg) + ",".join(f"{key}:{value}" for key, value in pairs)
    return f"{_path_part(cfg, cfg.EXPERIMENT.PROJECT)}/{_path_part(cfg, name)}"


def override_text(cfg: CN, key: str, value: str) -> str:
    """An override as it stands in a run's name."""
    return _path_part(cfg, f"{key}:{value}")


def overrides_in(folder: str, cfg: CN) -> list[tuple[str, str]] | None:
    """The overrides in the name of a run's folder, as (KEY, its `override_text`).

    None if the folder is of another NAME or TAG than that of `cfg`, or so long that it may have been cut.
    """
    base = _path_part(cfg, _base(cfg))
    if not folder.startswith(base) or len(os.fsencode(folder)) > _CUT_TO:
        return None
    keys = {_path_part(cfg, f"{key}:"): key for key in flat_settings(cfg)}
    start, *found = re.split(rf"(?:^|,)({'|'.join(map(re.escape, keys))})", folder[len(base) :])
    return None if start else [(keys[key], key + value) for key, value in zip(found[::2], found[1::2])]


def _base(cfg: CN) -> str:
    """What a run's name begins with, before the overrides."""
    return str(cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG)


def _path_part(cfg: CN, name: str) -> str:
    """`name` as the name of one folder: separators, blanks, control characters and leading dots become `_`.

    File systems allow 255 bytes: a longer name is cut, and a digest of the whole name keeps it unique.
    """
    fit = re.sub(r"^\.+|[/\\*?\"<>|\s\x00-\x1f]", "_", name) or "_"
    if not takes_colons(cfg.LOG.PREFIX):
        fit = fit.replace(":", "=")
    if len(fit.encode()) <= 255:
        return fit
    digest = hashlib.sha256(fit.encode()).hexdigest()[:8]
    return f"{fit.encode()[:_CUT_TO].decode(errors='ignore')}~{digest}"
