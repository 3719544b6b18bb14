"""Faster forms of a method's frozen networks for training, which compute the same functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx
from yacs.config import CfgNode as CN

from ...console import note, out_of_memory
from ...dataset import info_of
from ...distillers import Distiller
from ...distributed.ranks import current_ranks
from ...models.copies import copy_without_hooks, has_hooks
from ...models.eval_mode import eval_mode
from ...models.outputs import output_names
from ...models.own_input import OwnInput
from ...registry import unknown_name
from .cache import TeacherCache, cache_wanted, no_cache, teacher_cache
from .flat import flatten_calls
from .fold_batchnorm import CannotFold, fold_batchnorm
from .original import Original
from .rows import RowSource

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenNetworks:
    """The frozen networks of a distiller, each in the fastest form that its method cannot notice.

    A network whose outputs the method declares runs as a copy: BatchNorms folded, undeclared outputs left out, its
    convolutions called without their modules, and in half precision if the run is. The network itself runs if nothing
    is declared, if it has hooks, or once its weights change. The modules of the distiller and the checkpoints do not
    change. A teacher that runs in training mode (OFD) is left alone, because its BatchNorms use the statistics of the
    batch.

    Args:
        loader: the loader of the training images, for the cache.

    Attributes:
        cache: of the teacher's outputs, if the settings ask for one.
        runners: frozen network -> what runs at present: a copy, the cache, or the network itself.
        words: frozen network -> what became of it, for the log.

    Raises:
        UserError: a cache is asked for, and its folder cannot be used, or the device has no room for it.
    """

    def __init__(self, distiller: Distiller, loader: Any, cfg: CN) -> None:
        self.distiller, self.cfg = distiller, cfg
        self.cache: TeacherCache | None = None
        self.runners: dict[str, Callable[[Tensor], Any]] = {}
        self.words: dict[str, str] = {}
        self._copied: dict[str, Original] = {}
        self._precision = _Precision(cfg.SOLVER.AMP)
        for name in distiller.evaluated:
            network, outputs = distiller.get_submodule(name), distiller.frozen[name]
            if next(network.parameters(), None) is None:  # a method without a teacher has a placeholder
                continue
            distiller.run_frozen_by(name, None)  # a former cache gives its memory back
            image = _example(network, cfg)
            _check_outputs(f"{type(distiller).__name__}'s {name}", network, outputs, image)
            form = self._form(network, outputs, image, cfg)
            runner, self.words[name] = form.run, form.words
            if name == "teacher" and cache_wanted(cfg):
                dtype, arithmetic = cfg.DISTILLER.TEACHER_CACHE_DTYPE, form.arithmetic(image.device)
                source = RowSource(network, runner, arithmetic, image, loader, outputs or (), dtype)
                runner = self.cache = teacher_cache(source, cfg)
                self.words[name] += f"; its outputs are kept in {runner.place}"
            if outputs is not None:
                self._copied[name] = Original(network)
            self.runners[name] = runner
            distiller.run_frozen_by(name, partial(self._run, name))

    def _form(self, network: nn.Module, outputs: Sequence[str] | None, image: Tensor, cfg: CN) -> _Form:
        """The fastest form of a network, of which the method reads `outputs`."""
        if isinstance(network, OwnInput) and outputs is not None and not has_hooks(network):
            # In float32: half precision would round the image twice.
            with torch.no_grad():
                form = self._form(network.network, outputs, network.seen(image), cfg)
            assert isinstance(form.run, nn.Module)  # as outputs are declared
            return replace(form, run=network.around(form.run))
        itself = self._precision.around(network)
        if outputs is None:
            return _Form(itself, "itself, as the method does not declare what it reads", False, self._precision.dtype)
        if has_hooks(network):
            return _Form(itself, "itself, as it has hooks", False, self._precision.dtype)
        copied: nn.Module = network
        words = "a copy with its BatchNorms folded"
        try:
            copied = fold_batchnorm(network.eval(), image, [name for name in outputs if name != "logits"])
        except CannotFold as why:
            words = f"BatchNorms not folded ({why})"
        if copied is not network and cfg.SOLVER.CHANNELS_LAST:
            copied.to(memory_format=torch.channels_last)
        dtype = self._precision.dtype
        run = self._precision.of_copy(copied, image)
        for part in list(run.modules()) if copied is not network else ():
            if isinstance(part, fx.GraphModule):
                flatten_calls(part)
        return _Form(run, words, copied is not network, dtype)

    def unchanging(self) -> set[Tensor]:
        """The weights and buffers of the networks that run as a copy, which sees any change of them."""
        networks = [original.network for original in self._copied.values()]
        return {tensor for network in networks for tensor in (*network.parameters(), *network.buffers())}

    def begin_epoch(self) -> None:
        """Prepare the cache for the loader's epoch: its rows are those of a teacher that has not changed.

        Raises:
            UserError: it has changed.
        """
        if self.cache is not None:
            self._check("teacher", thoroughly=True)
            self.cache.begin_epoch()

    def check(self, thoroughly: bool = True) -> None:
        """Run a network itself from now on if it has got hooks, or if its weights have changed.

        Args:
            thoroughly: also see changes that autograd does not, through `.data`. This reads every weight.

        Raises:
            UserError: the cache's network has changed.
        """
        for name in list(self._copied):
            self._check(name, thoroughly)

    def _check(self, name: str, thoroughly: bool) -> None:
        original = self._copied.get(name)
        what = original.change(thoroughly) if original is not None else ""
        if original is None or not what:
            return
        if name == "teacher" and self.cache is not None:
            raise no_cache(self.cfg, what)
        del self._copied[name]
        self.runners[name] = self._precision.around(original.network)
        self.words[name] = f"itself, as {what}"
        if current_ranks().first:
            note(f"from now on the {name} runs without its faster copy, as {what}")

    def _run(self, name: str, image: Tensor) -> Any:
        """The output of a frozen network; checked at every call, as a method may change it within a step."""
        if not torch.compiler.is_compiling():
            self._check(name, thoroughly=False)
        return self.runners[name](image)


@dataclass(frozen=True)
class _Form:
    """A form of a frozen network.

    Attributes:
        run: image (B, 3, H, W) -> (logits, features by name).
        words: what it is, for the log.
        folded: whether BatchNorms are folded.
        dtype: of its convolutions and linear layers; None for float32.
    """

    run: Callable[[Tensor], Any]
    words: str
    folded: bool
    dtype: torch.dtype | None

    def arithmetic(self, device: torch.device) -> str:
        """What its outputs' rounding depends on."""
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return f"{device.type} {self.dtype or torch.float32}{' TF32' if tf32 else ''}{' folded' if self.folded else ''}"


def _check_outputs(owner: str, network: nn.Module, outputs: Sequence[str] | None, image: Tensor) -> None:
    """Refuse a declared output that the network does not have. One with hooks is not run, as it would call them.

    Raises:
        UserError: naming the near ones.
    """
    if has_hooks(network):
        return
    try:
        with eval_mode(network):
            _, features = network(image)
        names = output_names(features)
    except Exception:  # a network that cannot take this image, or another form of output, shows it in the first step
        return
    for name in outputs or ():
        if name not in names:
            raise unknown_name(f"output of {owner}", name, names)


def _example(network: nn.Module, cfg: CN) -> Tensor:
    """A random image (1, 3, H, W) of the data set's size, on the network's device."""
    size = info_of(cfg).image_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return image.to(next(network.parameters()))


class _Precision:
    """The precision of frozen networks, from SOLVER.AMP.

    Attributes:
        dtype: of their convolutions and linear layers; None for float32.
        full_output: whether the student is in float32 ("bf16-teacher").
    """

    def __init__(self, amp: str) -> None:
        name, _, only = amp.partition("-")
        self.dtype = DTYPES.get(name)
        self.full_output = bool(only)

    def around(self, network: nn.Module) -> Callable[[Tensor], Any]:
        """The network itself, under autocast."""
        if self.dtype is None:
            return network

        def run(image: Tensor) -> Any:
            with torch.autocast(image.device.type, self.dtype):
                output = network(image)
            return _each_tensor(_full, output) if self.full_output else output

        return run


    def of_copy(self, network: nn.Module, image: Tensor) -> nn.Module:
        """A network whose weights are converted once; or under autocast, where that does not do for it.

        Transformers mix their layers with parameters of their own, which stay in float32.
        """
        if self.dtype is None:
            return network
        half = HalfPrecision(network, self.dtype, self.full_output)
        try:
            with torch.no_grad():
                half(image)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return Autocast(network, self.dtype, self.full_output)
        return half


class Autocast(nn.Module):
    """A network under autocast, which converts its weights at every call. The arguments are `HalfPrecision`'s."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, full_output: bool) -> None:
        super().__init__()
        self.network, self.dtype, self.full_output = copy_without_hooks(network), dtype, full_output

    def forward(self, image: Tensor) -> Any:
        with torch.autocast(image.device.type, self.dtype):
            output = self.network(image)
        return _each_tensor(_full, output) if self.full_output else output


class HalfPrecision(nn.Module):
    """A copy of a trained network whose convolutions and linear layers compute in half precision.

    Their weights are converted once; autocast would convert those of a frozen network at every step. The remaining
    BatchNorms keep float32 statistics.

    Args:
        full_output: return float32, for a student that is not in half precision.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, full_output: bool) -> None:
        super().__init__()
        self.network = copy_without_hooks(network)
        self.dtype = dtype
        self.full_output = full_output
        for layer in self.network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)
            elif isinstance(layer, fx.GraphModule):
                _convert_called(layer, dtype)

    def forward(self, image: Tensor) -> Any:
        with torch.autocast(image.device.type, enabled=False):
            output = self.network(image.to(self.dtype))
        return _each_tensor(_full, output) if self.full_output else output


def _convert_called(network: fx.GraphModule, dtype: torch.dtype) -> None:
    """Convert the weights of convolutions and linear layers that a traced network calls as functions."""
    for node in network.graph.nodes:
        if node.op == "call_function" and node.target in (F.conv2d, F.linear):
            for read in (*node.args, *node.kwargs.values()):
                if isinstance(read, fx.Node) and read.op == "get_attr":
                    weight = attrgetter(str(read.target))(network)
                    weight.data = weight.data.to(dtype)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` applied to every tensor in its dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_tensor(change, v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each_tensor(change, v) for v in value)
    return value
