"""3x3 convolutions in half the multiplications, for a frozen network on the CPU: Winograd's F(4, 3) along the height.

Four rows of the output come from six products in place of twelve: the six rows of the map that they read, and the
three rows of the kernel, are combined linearly (`ROWS`, `KERNELS`), convolved along the width, and combined again
(in `_rows_of_output`). Along one axis alone it costs less memory traffic than along both, which is what decides here.

Reference: Winograd 1980, "Arithmetic complexity of computations"; Lavin & Gray 2016, arXiv 1509.09308.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# What each of the six products takes of the kernel's rows: its values at 0, 1, -1, 2, -2 and infinity, scaled.
KERNELS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Below, combining costs more than it saves.
FEWEST_CHANNELS = 64
# Of the map, for each thread, so that what is made of it stays in the core's cache.
PIECE = 2**20


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, whose weights stay as they are; under torch.inference_mode only.

    (B, C, H, W) float32, channels last -> (B, K, H, W); maps whose height is not a multiple of 4 go the usual way.
    Rounding errors are two to five times those of the usual way, 1e-6 to 4e-6 of the largest output.
    """

    kernels: Tensor  # (6K, C, 1, 3)
    biases: Tensor  # (6K,)

    def prepare(self) -> WinogradConv2d:
        """Combine the kernel's rows, once for all."""
        combine = torch.tensor(KERNELS, dtype=torch.float64, device=self.weight.device)
        with torch.no_grad():
            kernels = torch.einsum("pr,kcrs->pkcs", combine, self.weight.double()).to(self.weight.dtype)
            biases = self.weight.new_zeros(len(KERNELS), self.out_channels)
            if self.bias is not None:
                biases[1] = self.bias  # the product that every row of the output takes once
        kernels = kernels.flatten(0, 1).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        self.register_buffer("kernels", kernels, persistent=False)
        self.register_buffer("biases", biases.flatten(), persistent=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 4 or x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        shape = len(x), self.out_channels, *x.shape[2:]
        out = torch.empty(shape, device=x.device, memory_format=torch.channels_last)
        # A call also copies the kernels; pieces are no smaller than they.
        piece = max(PIECE * torch.get_num_threads(), self.kernels.nbytes) // x[0].nbytes or 1
        for own, other in zip(x.split(piece), out.split(piece)):
            self._convolve(own.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1))
        return out

    def _convolve(self, x: Tensor, out: Tensor) -> None:
        """(B, H, W, C) into (B, H, W, K)."""
        batch, height, width, channels = x.shape
        count = len(KERNELS)
        rows = x.new_empty(batch, height // 4, width, count, channels)
        _rows_of_input(x, rows.unbind(3))
        rows = rows.view(batch, height // 4, width, count * channels).permute(0, 3, 1, 2)
        products = F.conv2d(rows, self.kernels, self.biases, padding=(0, 1), groups=count).permute(0, 2, 3, 1)
        _rows_of_output(products.unflatten(3, (count, -1)).unbind(3), out)


def _rows_of_input(x: Tensor, rows: tuple[Tensor, ...]) -> None:
    """The six combinations of rows 4t-1 ... 4t+4 of x (B, H, W, C), zero beyond it, each into (B, H / 4, W, C)."""
    d1, d2, d3, d4 = (x[:, k::4] for k in range(4))
    even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    torch.add(even, odd, out=rows[1])
    torch.sub(even, odd, out=rows[2])
    torch.sub(even, d2, out=rows[0])  # 4 d0 - 5 d2 + d4, where d0 is the d4 of the tile before
    rows[0][:, 1:].add_(d4[:, :-1], alpha=4)
    torch.add(odd, d3, alpha=4, out=rows[5]).neg_()  # 4 d1 - 5 d3 + d5, where d5 is the d1 of the tile after
    rows[5][:, :-1].add_(d1[:, 1:])
    torch.sub(d4, d2, out=even)
    torch.sub(d3, d1, out=odd)
    torch.add(even, odd, alpha=2, out=rows[3])
    torch.sub(even, odd, alpha=2, out=rows[4])


def _rows_of_output(m: tuple[Tensor, ...], out: Tensor) -> None:
    """The six products, each (B, H / 4, W, K), into the rows of out (B, H, W, K)."""
    y0, y1, y2, y3 = (out[:, k::4] for k in range(4))
    ones, twos = m[1] + m[2], m[3] + m[4]
    torch.add(m[0], ones, out=y0).add_(twos)
    torch.add(ones, twos, alpha=4, out=y2)
    torch.sub(m[1], m[2], out=ones)
    torch.sub(m[3], m[4], out=twos)
    torch.add(ones, twos, alpha=2, out=y1)
    torch.add(ones, twos, alpha=8, out=y3).add_(m[5])


def use_winograd(network: nn.Module) -> None:
    """Change the convolutions of `network` that gain by it, in place.

    Only where torch convolves groups of channels fast, on x86 processors with AVX2.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return
    for layer in network.modules():
        if type(layer) is nn.Conv2d and _gains(layer):
            layer.__class__ = WinogradConv2d
            layer.prepare()  # type: ignore[operator]


def _gains(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return plain and min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS
