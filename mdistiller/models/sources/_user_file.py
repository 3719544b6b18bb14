"""Networks of the user's own code: "path/to/file.py:function"."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn as nn

from ...errors import UserError
from ...paths import expanded
from ...registry import near_names, unknown_name
from ._source import IMAGENET, NativeInput, Source

FORM = "path/to/file.py:FUNCTION"


class UserFile(Source):
    """A function, or a class, of a Python file, which is called with num_classes.

    It also gets image_size and pretrained if it has parameters of these names. The file may say for which images its
    networks are made: INPUT = {"size": 32, "mean": [...], "std": [...]}; without it, as ImageNet's.
    """

    def build(self, name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
        function = _function(name)
        offered = {"num_classes": num_classes, "image_size": image_size or self.native_input(name).size}
        offered["pretrained"] = pretrained
        taken = {key: value for key, value in offered.items() if _takes(function, key)}
        if "num_classes" not in taken:
            raise UserError(f"{name} takes no num_classes; let the function have such a parameter")
        if pretrained and "pretrained" not in taken:
            raise UserError(
                f"{name} takes no pretrained: it publishes no weights; set DISTILLER.STUDENT_PRETRAINED False, or name "
                "a file of them (DISTILLER.STUDENT_CKPT, TEACHER_CKPT, tools/eval.py -c)"
            )
        network = function(**taken)
        if not isinstance(network, nn.Module):
            raise UserError(f"{name} returns {type(network).__name__}, not a torch.nn.Module")
        return network

    def native_input(self, name: str, image_size: int = 0) -> NativeInput:
        function_file, _ = _parts(name)
        told = getattr(_loaded(function_file), "INPUT", None)
        if told is None:
            return IMAGENET
        allowed = [field.name for field in fields(NativeInput)]
        for key in told:
            if key not in allowed:
                raise unknown_name(f"entry of INPUT in {function_file}", key, allowed)
        return NativeInput(**{"size": IMAGENET.size, "mean": IMAGENET.mean, "std": IMAGENET.std, **told})

    def num_classes(self, name: str) -> int:
        parameter = signature(_function(name)).parameters.get("num_classes")
        default = parameter.default if parameter is not None else 0
        return default if isinstance(default, int) else 0


def _parts(name: str) -> tuple[Path, str]:
    """The file and the function of a name."""
    file, colon, function = name.rpartition(":")
    if not (colon and function and file.endswith(".py")):
        raise UserError(f"{name!r} names no function of a file; write {FORM}")
    path = Path(expanded(file))
    if not os.path.isfile(path):
        near = near_names(path.name, [own.name for own in path.parent.glob("*.py")]) if path.parent.is_dir() else []
        hint = f"did you mean {' or '.join(str(path.parent / own) for own in near)}?" if near else f"write {FORM}"
        raise UserError(f"no file {path} (from {Path.cwd()}); {hint}")
    return path, function


def _function(name: str) -> Callable[..., Any]:
    path, own = _parts(name)
    module = _loaded(path)
    function = getattr(module, own, None)
    if callable(function):
        return function
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise unknown_name(f"function of {path}", own, known)


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = signature(function).parameters.values()
    return any(p.name == name or p.kind is Parameter.VAR_KEYWORD for p in parameters)


def _loaded(path: Path) -> ModuleType:
    """The file as a module, which is run once, and again when it was edited, as between the cells of a notebook.

    It can import its neighbours, as a script can.
    """
    path = path.resolve()
    edited = path.stat()
    name = f"mdistiller_user_file_{path.stem}_{abs(hash((str(path), edited.st_mtime_ns, edited.st_size)))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
