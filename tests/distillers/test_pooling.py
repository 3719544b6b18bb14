"""Average pooling to a size: against torch's, and a loop over the cells."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mdistiller.distillers
from mdistiller.distillers._pooling import average_pool

from .checks import normal

SIZES = [(8, 8, 4, 4), (7, 7, 4, 4), (7, 5, 2, 2), (2, 2, 4, 4), (1, 1, 4, 4), (4, 4, 4, 4), (8, 6, 1, 1), (6, 9, 2, 3)]


def naive(x: Tensor, rows: int, columns: int) -> Tensor:
    def cell(i: int, size: int, n: int) -> slice:
        return slice(math.floor(i * size / n), math.ceil((i + 1) * size / n))

    height, width = x.shape[2:]
    return torch.stack(
        [
            torch.stack(
                [x[:, :, cell(i, height, rows), cell(j, width, columns)].mean((2, 3)) for j in range(columns)], dim=2
            )
            for i in range(rows)
        ],
        dim=2,
    )


@pytest.mark.parametrize("height, width, rows, columns", SIZES)
def test_it_is_adaptive_average_pooling(height: int, width: int, rows: int, columns: int) -> None:
    x = normal(2, 3, height, width).requires_grad_()
    own, wanted = average_pool(x, (rows, columns)), F.adaptive_avg_pool2d(x, (rows, columns))
    torch.testing.assert_close(own, naive(x, rows, columns))
    torch.testing.assert_close(own, wanted)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (own, wanted)]
    torch.testing.assert_close(*gradients)


def test_no_method_pools_without_deterministic_gradients() -> None:
    """CUDA's adaptive average pooling stops a run under EXPERIMENT.DETERMINISTIC."""
    folder = Path(mdistiller.distillers.__file__).parent
    kernel = re.compile(r"adaptive_avg_pool2d\(|AdaptiveAvgPool2d")
    assert [path.name for path in folder.glob("*.py") if kernel.search(path.read_text(encoding="utf-8"))] == []
