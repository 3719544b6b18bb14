"""Losses in full precision under autocast."""

import torch

from mdistiller.distillers._precision import full_precision


def test_full_precision():
    @full_precision
    def product(a, b, label):
        """Doc."""
        return a @ b, label

    half = torch.full((2, 2), 1.0078125, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (half.float() @ half.float()).dtype == torch.bfloat16
        out, label = product(half, b=half.float(), label="x")
        assert product(half.double(), half.double(), 0)[0].dtype == torch.float64
    assert out.dtype == torch.float32 and out[0, 0].item() == 2 * 1.0078125**2 and label == "x"
    assert product.__doc__ == "Doc."


def test_without_autocast_none_is_entered(monkeypatch):
    """Entering a context takes the host as long as an operation."""
    monkeypatch.setattr(torch, "autocast", None)
    double = full_precision(lambda x: x * 2)
    assert double(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
