"""A fake GPU: its tensors say "cuda:0", hold their numbers on the CPU, and tell when the host would wait for them.

As far as Python sees, everything is as on a GPU: autocast is CUDA's, optimizers are fused, memory can be pinned. An
operation on tensors of this GPU and of the CPU fails. One for which the host waits for a GPU is recorded with the file
and line of whoever called it, and gives its result, so that a whole run goes on.

No kernel of CUDA runs: what only a GPU shows, such as an unsupported dtype, is not seen here.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

import mdistiller

from ._autograd import run_backward

aten = torch.ops.aten
# Within it, operations run as they are.
_undispatched: Any = torch._C._DisableTorchDispatch
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(mdistiller.__file__).parent.parent
_LIBRARIES = (Path(torch.__file__).parent, Path(torchvision.__file__).parent, Path(sysconfig.get_path("stdlib")))
# Not where a wait is caused: torch, Python's library, and the files of this folder that are not tests.
_ELSEWHERE = (*(f"{library}/" for library in _LIBRARIES), f"{Path(__file__).parent}/_", "<")


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the GPU, or reads what a step that is replayed as one graph could not.

    Attributes:
        what: in words.
        file: relative to the repository, with slashes.
        function: the function around `line`.
    """

    what: str
    file: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """Without the line, which moves: "mdistiller/engine/meters.py means"."""
        return f"{self.file} {self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function}): {self.what}"


class WrongDevice(AssertionError):
    """An operation on tensors of which some are on the GPU and some are not."""


class GPUTensor(Tensor):
    """A tensor of the fake GPU; `held`, on the CPU, has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> GPUTensor:
        own = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        own.held = held
        return own  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of a fake GPU that is no longer there")

    def backward(self, **_: Any) -> None:  # type: ignore[override]
        run_backward(self)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            of_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if of_parameter else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a tensor on the CPU: the host reads it to save it."""
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return repr(self.detach().cpu())


class FakeGPU(TorchDispatchMode):
    """Within this context torch has a GPU, "cuda:0".

    Attributes:
        waits: what the host waited for, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._pinned: list[Tensor] = []  # alive, so that no other tensor gets their memory
        self._around = ExitStack()

    def __enter__(self) -> FakeGPU:
        # Lets torch take the word "cuda" without a driver, as it finds no GPU yet. No tensor reaches it.
        self._around.enter_context(FakeTensorMode())
        stand_ins = _CUDA | {"cuda.synchronize": self._synchronize, "load": _without_modes(torch.load)}
        for name, value in stand_ins.items():
            self._around.enter_context(mock.patch(f"torch.{name}", value))
        self._around.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: self._pin(tensor)))
        self._around.enter_context(mock.patch.object(Tensor, "is_pinned", lambda tensor, *_: self._is_pinned(tensor)))
        # cuDNN's operations have no form on the CPU; torch's own BatchNorm has.
        self._around.enter_context(torch.backends.cudnn.flags(enabled=False))
        self._around.callback(
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        # A module's parameters stay the same objects when it is moved, as on a GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Within an operation, see the operations that it is composed of."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def note(self, what: str) -> None:
        """Record a wait by whoever calls torch now."""
        frame = _caller()
        named = frame
        while named.f_back is not None and named.f_code.co_name.startswith("<"):  # a generator, a lambda
            named = named.f_back
        self.waits.append(Wait(what, _relative(frame.f_code.co_filename), frame.f_lineno, named.f_code.co_name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # else autograd has taken composed operations apart
            with self._again():
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [*_tensors((*args, *kwargs.values()))]
        here = [isinstance(tensor, GPUTensor) for tensor in tensors]
        device = kwargs.get("device") or (GPU if any(here) else CPU)
        target = torch.device(device).type
        with _undispatched():
            if not any(here) and target == "cpu":
                return self._on_cpu(func, args, kwargs)
            if func in _COPIES:
                self._judge_copies(_COPIES[func](args, kwargs, target), bool(kwargs.get("non_blocking")))
            else:
                self._judge(func, args, kwargs, tensors)
            result = _on_held(func, args, kwargs)
        if target == "cpu":
            return result
        # Whether a view in inference mode is an inference tensor depends on its base, so here no tensor is one.
        with torch.inference_mode(False), _undispatched():
            wrapped = _mapped(GPUTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(here) else wrapped

    def _on_cpu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if pinned:
            self._pinned.append(result)
        return result

    def _judge(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Fail on tensors of two devices; record an operation for which the host waits."""
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise WrongDevice(f"{_where()}: {func} on the GPU with a generator of the CPU")
        if func in _INDEXING:
            self._judge_indexing(func, *args)
            return
        if tensors:
            self._judge_devices(func, tensors)
        if _TAGS & set(func.tags) or func.overloadpacket in _SOLVERS or {func, func.overloadpacket} & _CHECKED:
            self.note(f"{func} waits for the GPU")

    def _judge_devices(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """A number of the CPU, which is no tensor to the kernel, may be there."""
        others = [tensor for tensor in tensors if not isinstance(tensor, GPUTensor)]
        if any(tensor.ndim for tensor in others) or len(others) == len(tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in others)
            raise WrongDevice(f"{_where()}: {func} on tensors of the GPU and on {shapes} of the CPU")
        if others:
            self.note(f"{func} with a number (a tensor of no dimension) in the host's memory")

    def _judge_indexing(
        self, func: Any, own: Tensor, indices: Sequence[Tensor | None], value: Tensor | None = None, *_: Any
    ) -> None:
        """Indices may be on either device; of a mask, the host reads how many entries are set."""
        given = [index for index in indices if index is not None]
        masks = [index for index in given if index.dtype in (torch.bool, torch.uint8)]
        if len(masks) == len(given) == 1 and value is not None and not value.ndim and not isinstance(value, GPUTensor):
            self._judge_devices(func, [own, *masks])  # x[mask] = 0 is masked_fill_
            return
        self._judge_devices(func, [own] if value is None else [own, value])
        if not all(isinstance(index, GPUTensor) for index in given):
            self.note(f"{func} by an index in the host's memory, which is copied to the GPU")
        if masks:
            self.note(f"{func} waits for the GPU")

    def _judge_copies(self, copies: list[tuple[Tensor, str]], at_once: bool) -> None:
        """Record the copies (of a tensor, to a kind of device) that the host waits for."""
        for source, target in copies:
            if isinstance(source, GPUTensor) and target == "cpu":
                self.note(f"a tensor {tuple(source.shape)} is copied to the host")
            elif not isinstance(source, GPUTensor) and target == "cuda" and not (at_once and self._is_pinned(source)):
                why = "without non_blocking" if self._is_pinned(source) else "from memory that is not pinned"
                self.note(f"a tensor {tuple(source.shape)} is copied to the GPU {why}")

    def _synchronize(self, device: Any = None) -> None:
        self.note("torch.cuda.synchronize")

    def _pin(self, tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        self._pinned.append(copied)
        return copied

    def _is_pinned(self, tensor: Tensor) -> bool:
        with _undispatched():
            memory = tensor.untyped_storage().data_ptr()
            return any(memory == one.untyped_storage().data_ptr() for one in self._pinned)


# What torch asks the driver -> the answer.
_CUDA: dict[str, Any] = {
    "cuda.is_available": lambda: True,
    "cuda.device_count": lambda: 1,
    "cuda.current_device": lambda: 0,
    "cuda.device": nullcontext,
    "cuda.is_bf16_supported": lambda *_: True,
    "cuda.is_current_stream_capturing": lambda: False,
    "cuda.get_device_name": lambda *_: "fake GPU",
    "cuda.max_memory_allocated": lambda *_: 0,
    "cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "cuda.set_rng_state": lambda *_: None,
    # Of the thread of a DataLoader that pins memory.
    "accelerator.is_available": lambda: True,
    "accelerator.current_device_index": lambda: 0,
    "accelerator.set_device_index": lambda *_: None,
}

# The host waits for their results, or for the size of them.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Their kernels end with a check of the solver by the host.
_SOLVERS = {aten._linalg_eigh, aten._linalg_svd, aten.linalg_eig, aten._linalg_check_errors}
# Before or in their kernels the host reads a number: a range, a sum of probabilities, a norm, how many differ.
_CHECKED = {
    aten.multinomial, aten.histc, aten.linalg_matrix_exp, aten.linalg_pinv, aten.embedding_renorm_,
    aten.normal.Tensor_Tensor, aten.normal.float_Tensor,
}  # fmt: skip
_INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _of_lists(args: Any, kwargs: Any, target: str) -> list[tuple[Tensor, str]]:
    return [(source, own.device.type) for own, source in zip(args[0], args[1])]


# Operations that copy -> which tensor goes to which kind of device.
_COPIES: dict[Any, Callable[[Any, Any, str], list[tuple[Tensor, str]]]] = {
    aten._to_copy.default: lambda args, kwargs, target: [(args[0], target)],
    aten.copy_.default: lambda args, kwargs, target: [(args[1], args[0].device.type)],
    aten._foreach_copy_.default: _of_lists,
}


def _on_held(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def held(tensor: Tensor) -> Tensor:
        return tensor.held if isinstance(tensor, GPUTensor) else tensor

    named = {name: _mapped(held, value) for name, value in kwargs.items()}
    if named.get("device") is not None:
        named["device"] = CPU
    return func(*_mapped(held, args), **named)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of an operation's arguments, which are nested in lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An operation's arguments or results with `change` applied to the tensors."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, one) for one in value) if isinstance(value, (list, tuple)) else value


def _caller() -> FrameType:
    """The innermost frame that is neither torch's nor Python's nor this file's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_ELSEWHERE):
            return frame
        frame = frame.f_back
    raise AssertionError("nobody calls")


def _where() -> str:
    frame = _caller()
    return f"{_relative(frame.f_code.co_filename)}:{frame.f_lineno}"


def _relative(name: str) -> str:
    path = Path(name)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
