"""What a network's layers take and return in one forward: every call, in the order in which the calls end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .eval_mode import eval_mode
from .taps import tensor_of


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        path: of the layer in the network.
        number: of the call among those of this layer.
        begin, end: places in the order of all beginnings and ends.
        input, output: None where they are no tensors.
    """

    path: str
    layer: nn.Module
    number: int
    begin: int
    end: int
    input: Tensor | None
    output: Tensor | None

    @property
    def passes_on(self) -> bool:
        """Whether the output is the input itself, as of a Dropout in eval mode."""
        return self.output is not None and self.input is not None and same_memory(self.input, self.output)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    same = one.shape == other.shape and one.stride() == other.stride()
    return one is other or (same and one.data_ptr() == other.data_ptr())


def calls_of(network: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """What `run` returns, and the calls of the network's layers in it; of the network itself too, with the path ""."""
    calls: list[Call] = []
    clock, numbers, open_calls = iter(range(10**9)), Counter[str](), []
    handles = []

    def begin(layer: nn.Module, args: Any) -> None:
        open_calls.append((next(clock), tensor_of(args)))

    def ending(path: str) -> Callable[..., None]:
        def end(layer: nn.Module, args: Any, output: Any) -> None:
            started, given = open_calls.pop()
            calls.append(Call(path, layer, numbers[path], started, next(clock), given, tensor_of(output)))
            numbers[path] += 1

        return end

    try:
        for path, layer in network.named_modules():
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(ending(path)))
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result, calls


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """A context in eval mode, without gradients, with random numbers of its own: nothing of the outside changes.

    torch's fast path for attention is off: it is left where a layer has hooks, and rounds otherwise.
    """
    tensor = next(network.parameters(), None)
    devices = [tensor.device] if tensor is not None and tensor.is_cuda else []
    with eval_mode(network), torch.random.fork_rng(devices), _without_fast_path():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the other GPUs
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def probe_image(network: nn.Module, size: int) -> Tensor:
    """Two random images (2, 3, size, size), on the network's device and of its dtype."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)
