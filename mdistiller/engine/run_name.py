"""The name of a run, which is also its folder, and the settings that do not enter the name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from yacs.config import CfgNode as CN

from ..system import takes_colons
from .overrides import override_pairs

# Settings that say where and how a run is executed, not what it computes. They do not enter its name, and may differ
# between a plan and the finished run that it finds.
_MACHINE_KEYS = re.compile(
    r"LOG\.|EXPERIMENT\.(PROJECT|NAME|TAG|DEVICE)$|DATASET\.(ROOT|NUM_WORKERS|TEST\.BATCH_SIZE)$"
    r"|DISTILLER\.TEACHER_CACHE(_GIB)?$"
)
_CACHE_DTYPE = "DISTILLER.TEACHER_CACHE_DTYPE"


def is_machine_key(key: str) -> bool:
    """Whether the setting `key`, such as "DATASET.ROOT", has no effect on what a run computes."""
    return _MACHINE_KEYS.match(key) is not None


def experiment_name(cfg: CN, overrides: Sequence[str] = ()) -> str:
    """`<project>/<name or tag>` plus `KEY:VALUE` of the overrides, valid as a path.

    A run with a teacher cache also names the cache's dtype, which rounds the teacher's outputs. On a file system whose
    names cannot have a `:`, such as Windows's, it is `=`.
    """
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    pairs = [(key, value) for key, value in override_pairs(overrides) if not is_machine_key(key)]
    if cfg.DISTILLER.TEACHER_CACHE and _CACHE_DTYPE not in dict(pairs):
        pairs.append((_CACHE_DTYPE, cfg.DISTILLER.TEACHER_CACHE_DTYPE))
    name += ",".join(f"{key}:{value}" for key, value in pairs)
    colon = ":" if takes_colons(cfg.LOG.PREFIX) else "="
    return "/".join(_path_part(part).replace(":", colon) for part in (cfg.EXPERIMENT.PROJECT, name))


def _path_part(name: str) -> str:
    """`name` as the name of one folder: separators, blanks, control characters and leading dots become `_`.

    File systems allow 255 bytes: a longer name is cut, and a digest of the whole name keeps it unique.
    """
    fit = re.sub(r"^\.+|[/\\*?\"<>|\s\x00-\x1f]", "_", name) or "_"
    if len(fit.encode()) <= 255:
        return fit
    digest = hashlib.sha256(fit.encode()).hexdigest()[:8]
    return f"{fit.encode()[:240].decode(errors='ignore')}~{digest}"
