"""NST against its equations, in both of its forms."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode as CN

from mdistiller.distillers import NST, method_defaults
from mdistiller.distillers.NST import nst_loss, single_stage_nst_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .oracles.nst import naive_nst_loss, naive_single_stage_nst_loss

# Few channels on large maps (the form over channels), many on small maps (over positions), and maps of two sizes.
SHAPES = [
    ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((3, 2, 5, 3), (3, 4, 5, 3)),
    ((2, 9, 2, 1), (2, 7, 2, 1)),
    ((2, 3, 7, 5), (2, 4, 3, 2)),
]


@pytest.mark.parametrize("shape_s, shape_t", SHAPES)
def test_agrees_with_the_naive_form(shape_s, shape_t):
    maps = normal(*shape_s), normal(*shape_t, seed=1)
    for f_s, f_t in (maps, maps[::-1]):
        check_agrees(single_stage_nst_loss, naive_single_stage_nst_loss, f_s, f_t)


def test_sums_over_the_stages():
    g_s, g_t = ([normal(2, c, s, s, seed=c) for c, s in ((a, 4), (b, 2))] for a, b in ((3, 5), (2, 7)))
    assert nst_loss(g_s, g_t).item() == pytest.approx(naive_nst_loss(g_s, g_t).item(), rel=1e-12)


def test_by_hand():
    # Channels (1, 0) and (0, 1) against (1, 1) / sqrt(2): 2/4 - 2 * (1/2 + 1/2) / 2 + 1.
    f_s = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]], dtype=torch.float64)
    f_t = torch.tensor([[[[5.0, 5.0]]]], dtype=torch.float64)
    assert single_stage_nst_loss(f_s, f_t).item() == pytest.approx(0.5, rel=1e-12)
    assert single_stage_nst_loss(f_s, 5 * f_s.flip(1)).item() == pytest.approx(0, abs=1e-15)  # order does not count


@pytest.mark.parametrize("shape_s, shape_t", SHAPES[1:3])
def test_gradients_and_precision(shape_s, shape_t):
    f_s, f_t = normal(*shape_s), normal(*shape_t, seed=1)
    assert gradcheck(single_stage_nst_loss, (f_s.clone().requires_grad_(), f_t.clone().requires_grad_()))
    check_precision(single_stage_nst_loss, f_s, f_t)


@pytest.mark.parametrize("shape_s, shape_t", SHAPES[1:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_channels(shape_s, shape_t, dtype):
    f_s, f_t = normal(*shape_s), normal(*shape_t, seed=1)
    f_s[:, 0], f_t[0] = 0, 0
    f_s = f_s.to(dtype).requires_grad_()
    loss = single_stage_nst_loss(f_s, f_t.to(dtype))
    loss.backward()
    assert f_s.grad.isfinite().all() and f_s.grad[:, 0].eq(0).all()
    assert loss.item() == pytest.approx(naive_single_stage_nst_loss(f_s.double(), f_t).item(), rel=1e-4)


@pytest.mark.parametrize("channels, size", [(24, 12), (64, 4)])
def test_no_tensor_of_channel_pairs_by_positions(channels, size):
    batch, largest = 2, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if x is not None))
            return out

    f_s = torch.randn(batch, channels, size, size, requires_grad=True)
    with Sizes():
        single_stage_nst_loss(f_s, torch.randn(batch, channels, size, size)).backward()
    assert largest <= batch * channels * max(channels, size**2)


def build(student, teacher):
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    return NST(*nets, CN({"NST": method_defaults["NST"].clone()}))


def test_pairs():
    method = build("ShuffleV1", "resnet14").train()  # 16x16 to 4x4 against 32x32 to 8x8
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), epoch=1)
    assert losses["loss_kd"].isfinite()
    assert build("resnet8", "vgg8").pairs.indices == [(0, 1), (1, 2), (2, 3), (3, 4)]
