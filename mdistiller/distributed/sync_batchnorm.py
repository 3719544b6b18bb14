"""BatchNorm over the images of all ranks. PyTorch has it for GPUs; this module adds CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ranks import joined


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm2d synchronised over the ranks; names, weights and statistics stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    replacements: dict[nn.Module, nn.Module] = {}  # a layer with several names stays one layer
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) is nn.BatchNorm2d:
            replacements[layer] = replacements.get(layer) or HostSyncBatchNorm2d.like(layer)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, replacements[layer])
    return module


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
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
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
        if self.affine:
            scale = scale * self.weight
        y = centred * scale[:, None, None]
        return y + self.bias[:, None, None] if self.affine else y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)


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
