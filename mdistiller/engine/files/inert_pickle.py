"""Reads a pickle without running anything of it: `torch.load(path, pickle_module=inert_pickle, weights_only=False)`.

Trainers save all kinds of objects beside the weights: the parsed arguments, NumPy scalars, paths, schedules, their own
configurations. torch's safe reader refuses such a file. This one makes tensors, arrays and plain containers as usual.
Every other class or function that the pickle names becomes a `StandIn`, which keeps what it is given and does nothing;
no module is imported.
"""

from __future__ import annotations

import builtins
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor


class StandIn(dict[Any, Any]):
    """Stands for an object of a class that is not made: a dict of its items, if it was one.

    Attributes:
        args: what it was constructed from, and its elements if it was a list or a set.
        state: what its attributes were set from.
    """

    __slots__ = ("args", "state")
    args: list[Any]
    state: Any
    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key
    __eq__ = object.__eq__
    dump_patches = False  # read by torch, of a module's class in the format before zip

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = super().__new__(cls)
        self.args, self.state = list(args), {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.args.append(item)

    add = append

    def extend(self, items: Any) -> None:
        self.args.extend(items)


def _stand_in(module: str, name: str) -> type[StandIn]:
    return type(name, (StandIn,), {"__module__": module, "__slots__": ()})


def _attribute(owner: Any, name: str) -> type[StandIn]:
    """What getattr stands for: a class within a class, a method, a member of an enumeration."""
    return _stand_in("builtins", "getattr")


def _plain(tensor: Tensor, *_: Any) -> Tensor:
    """A parameter as the tensor that it holds."""
    return tensor


def _without_class(rebuild: Any, _: Any, args: Any, *state: Any) -> Any:
    """A tensor of a subclass, or with attributes, as a plain tensor."""
    return rebuild(*args)


def _bytes(text: str, encoding: str) -> bytes:
    """How bytes are written in the formats before Python 3. (Other encodings could make a small file very large.)"""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode(encoding)


def _dictionary(*_: Any) -> dict[Any, Any]:
    """A dictionary in place of one that makes its missing values."""
    return {}


def _dtype(name: Any, *_: Any) -> Any:
    """A dtype whose elements are numbers, texts or times: of others, bytes of the file would be used as addresses."""
    found = np.dtype(name) if isinstance(name, str) else None
    return found if found is not None and found.kind in "biufcSUmM" else _stand_in("numpy", "dtype")()


def _array(*_: Any) -> np.ndarray[Any, Any]:
    """An empty array, of which pickle then sets shape, dtype and content."""
    return np.zeros(0, np.int8)


def _scalar(dtype: Any, *content: Any) -> Any:
    return _NUMPY_SCALAR(dtype, *content) if isinstance(dtype, np.dtype) else None


def _name(text: Any) -> str:
    return text if isinstance(text, str) else ""


_NUMPY_SCALAR: Any = np.float64().__reduce__()[0]
# What a pickle may name and gets, by module and name. None of it has effects beyond the object that it returns.
_KNOWN: dict[str, Any] = {
    "collections OrderedDict": OrderedDict, "collections defaultdict": _dictionary, "_codecs encode": _bytes,
    **{f"builtins {name}": vars(builtins)[name] for name in ("set", "frozenset", "complex", "slice")},
    **{f"torch {name}": kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)},
    "builtins getattr": _attribute,
    "torch Size": torch.Size, "torch device": torch.device, "torch.storage UntypedStorage": torch.UntypedStorage,
    "torch.serialization _get_layout": _name,
    **{f"torch._utils {name}": getattr(torch._utils, name)
       for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") if hasattr(torch._utils, name)},
    **{f"torch._utils _rebuild_parameter{kind}": _plain for kind in ("", "_with_state")},
    "torch._tensor _rebuild_from_type_v2": _without_class,
    "numpy dtype": _dtype,
    **{f"numpy.{core}.multiarray {name}": make  # NumPy 2.0 renamed numpy.core to numpy._core
       for core in ("core", "_core") for name, make in (("_reconstruct", _array), ("scalar", _scalar))},
}  # fmt: skip

# What no trainer saves beside weights, and what a file that is made to do harm names. Here it would be as inert as
# anything else; but such a file is not what it claims to be.
_HARMFUL = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|runpy|importlib|ctypes|torch\.(hub|serialization))(\.\S+)? .*"
    r"|builtins (eval|exec|compile|open|input|breakpoint|globals|vars|setattr|delattr|__import__)|torch (load|save)"
)


def _check_byte_order(state: Any) -> None:
    """Refuse what a pickle says of a dtype beside its name, but for this machine's byte order."""
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    if order not in ("|", "=", "<" if sys.byteorder == "little" else ">"):
        raise pickle.UnpicklingError("it holds a NumPy array in the byte order of another machine")


def _is_plain_array(state: Any) -> bool:
    """Whether an array's version, shape, dtype, order and content are those of numbers: bytes or, of Python 2, text."""
    if not (isinstance(state, tuple) and len(state) == 5):
        return False
    return isinstance(state[2], np.dtype) and isinstance(state[4], (bytes, str))


# `pickle.Unpickler` in Python: of it, single operations can be refused.
_PythonUnpickler: Any = pickle._Unpickler


class Unpickler(_PythonUnpickler):
    """As `pickle.Unpickler`, but nothing that the pickle names runs."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # the names of Python 2
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        known = _KNOWN.get(f"{module} {name}")
        if known is not None:
            return known
        if _HARMFUL.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}; only tensors, arrays and plain values are read"
            )
        return _stand_in(module, name)

    def load_build(self) -> None:
        made, state = self.stack[-2:]
        if callable(made):  # a class or a function, which outlives the file
            raise pickle.UnpicklingError("it sets attributes of a class or a function")
        if isinstance(made, np.dtype):
            self.stack.pop()
            _check_byte_order(state)
        elif isinstance(made, StandIn) or (isinstance(made, np.ndarray) and _is_plain_array(state)):
            super().load_build()
        elif isinstance(made, (OrderedDict, np.ndarray)):  # its _metadata; an array of objects, which stays empty
            self.stack.pop()
        else:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(made).__name__}")

    def load_bytearray8(self) -> None:
        raise pickle.UnpicklingError("it holds a bytearray")

    def load_pop(self) -> None:
        raise pickle.UnpicklingError("it makes an object only to drop it")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.POP[0]] = dispatch[pickle.POP_MARK[0]] = load_pop


def load(file: Any, **options: Any) -> Any:
    """As `pickle.load`."""
    return Unpickler(file, **options).load()
