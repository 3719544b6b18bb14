"""BatchNorm over the images of all ranks. PyTorch has it for GPUs; this module adds CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ranks import joined


def synchronize_batchnorm(module: nn.Module, device: torch.device, skip: Iterable[str] = ()) -> nn.Module:
    """`module` with every BatchNorm2d synchronised over the ranks; names, weights and statistics stay.

    On CUDA, every BatchNorm of another dimension as well.

    Args:
        skip: names of submodules that keep their layers: frozen networks, which evaluate. A layer that such a network
            shares with a trained one stays as it is in both, because it is in one mode, which is the frozen network's.

    Raises:
        AttributeError: `module` has no submodule of a name in `skip`.
    """
    kept = {layer for name in skip for layer in module.get_submodule(name).modules()}
    layers = [layer for layer in module.modules() if layer not in kept]
    # A layer with several names stays one layer.
    replacements = {layer: _synchronized(layer, device) for layer in layers if _is_local(layer, device)}
    for parent in layers:
        for name, layer in list(parent._modules.items()):
            if layer in replacements:
                setattr(parent, name, replacements[layer])
    return replacements.get(module, module)


def _is_local(layer: nn.Module, device: torch.device) -> bool:
    """Whether it is a BatchNorm that can be synchronised on `device`, and is not yet."""
    if device.type == "cuda":
        return isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
    followed = isinstance(layer, nn.BatchNorm2d) and any(True for _ in layer.children())
    return type(layer) is nn.BatchNorm2d or (followed and not isinstance(layer, HostSyncBatchNorm2d))


def _synchronized(layer: Any, device: torch.device) -> nn.Module:
    """A layer with the tensors, the layers and the forward hooks of `layer`."""
    own: nn.Module
    if any(True for _ in layer.children()):
        own = (_SyncThen if device.type == "cuda" else _HostSyncThen).like(layer)
    elif device.type == "cuda":
        own = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    else:
        own = HostSyncBatchNorm2d.like(layer)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(own, name).update(getattr(layer, name))
    return own


class HostSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that computes mean and variance over the images of all ranks while training.

    Every rank must pass a batch of the same height and width. (B, C, H, W) -> (B, C, H, W).
    """

    @classmethod
    def like(cls, other: nn.BatchNorm2d) -> HostSyncBatchNorm2d:
        """A layer with the settings, the parameters and the buffers of `other`; the tensors are shared."""
        own = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        own.weight, own.bias = other.weight, other.bias
        for name, buffer in other.named_buffers():
            setattr(own, name, buffer)
        return own.train(other.training)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and joined()):
            return super().forward(x)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # sums in half precision would lose the small terms
        dims = (0, 2, 3)
        sums = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        sums = _SumOverRanks.apply(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # From the centred values: E[x^2] - E[x]^2 would lose precision by cancellation.
        variance = _SumOverRanks.apply(centred.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = centred * scale[:, None, None]
        return (y if self.bias is None else y + self.bias[:, None, None]).to(dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # track_running_stats=False
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), momentum)


class _Then:
    """A BatchNorm with further layers in it, which it calls one after another, such as timm's with its activation."""

    @classmethod
    def like(cls, other: Any) -> Any:
        """As `HostSyncBatchNorm2d.like`; the layers are shared too."""
        own: Any = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)  # type: ignore[call-arg]
        own.weight, own.bias = other.weight, other.bias
        for name, buffer in other.named_buffers(recurse=False):
            setattr(own, name, buffer)
        for name, layer in other.named_children():
            own.add_module(name, layer)
        own.training = other.training
        return own

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)  # type: ignore[misc]
        for layer in self.children():  # type: ignore[attr-defined]
            x = layer(x)
        return x


class _SyncThen(_Then, nn.SyncBatchNorm):  # type: ignore[misc]
    pass


class _HostSyncThen(_Then, HostSyncBatchNorm2d):  # type: ignore[misc]
    pass


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on it, so its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad
