"""Run code in a separate Python process, with real signals and files, without importing torch, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# Makes the package importable without running its __init__ files, which import everything.
_LIGHT = f"""
import sys, types
for name in ("mdistiller", "mdistiller.engine"):
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = [{str(REPOSITORY)!r} + "/" + name.replace(".", "/")]
"""


def light_command(code: str, *arguments: object) -> list[str]:
    """The command that runs `code`; it may import what needs no torch, such as mdistiller.engine.logs.logger"""
    return [sys.executable, "-c", _LIGHT + code, *map(str, arguments)]


def light(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `light_command`."""
    return subprocess.Popen(light_command(code, *arguments), text=True, **options)


def in_mount(size: str, code: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str] | None:
    """Run `light_command(code)` in `folder`, on a new file system of `size`; None if none can be mounted here."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        return None
    inside = 'mount -t tmpfs -o size="$1" tmpfs "$2" && cd "$2" && exec "$3" -c "$0"'
    command = ["unshare", "-rm", "sh", "-c", inside, light_command(code)[-1], size, str(folder), sys.executable]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def read_only(folder: Path) -> list[str] | None:
    """The start of a command line whose rest then finds `folder` on a read-only file system; None if none can be."""
    inside = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inside, str(folder)]
    return None if subprocess.run([*command, "true"], capture_output=True).returncode else command


def without_write_permission(folder: Path) -> list[str] | None:
    """The same where `folder` and those below it give no permission to write; None if this user has it nevertheless."""
    for inner in (folder, *folder.rglob("*")):
        if inner.is_dir():
            inner.chmod(0o555)
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if not os.getuid() else []
    try:
        tried = subprocess.run([*command, "touch", str(folder / "tried")], capture_output=True)
    except FileNotFoundError:  # root, and no setpriv
        return None
    return command if tried.returncode == 1 else None
