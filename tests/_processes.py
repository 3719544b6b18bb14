"""Run code in a separate Python process, with real signals and files, without importing torch, which takes seconds."""

from __future__ import annotations

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
