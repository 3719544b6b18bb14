"""KDSVD against a full singular value decomposition, also for inputs on which that one fails."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import KDSVD, method_defaults
from mdistiller.distillers.KDSVD import directions, kdsvd_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .oracles.kdsvd import naive_directions, naive_kdsvd_loss


def stages(batch, channels, sizes, seed=0):
    return [normal(batch, c, *size, seed=seed + i) for i, (c, size) in enumerate(zip(channels, sizes))]


CASES = [  # batch, student's channels, teacher's channels, sizes
    (1, (2, 3), (4, 3), ((4, 4), (2, 2))),
    (3, (3, 4, 5), (5, 4, 3), ((6, 7), (3, 5), (4, 2))),
    (2, (1, 2), (3, 1), ((3, 5), (4, 4))),
]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("batch, channels_s, channels_t, sizes", CASES)
def test_agrees_with_the_naive_form(batch, channels_s, channels_t, sizes, k):
    g_s, g_t = stages(batch, channels_s, sizes), stages(batch, channels_t, sizes, seed=9)
    k = min(k, *(min(f.shape[1] * f.shape[2], f.shape[3]) for f in g_s + g_t))  # no more than each map has
    for i in range(len(g_s)):
        check_agrees(
            lambda f, i=i: kdsvd_loss([*g_s[:i], f, *g_s[i + 1 :]], g_t, k),
            lambda f, i=i: naive_kdsvd_loss([*g_s[:i], f, *g_s[i + 1 :]], g_t, k),
            g_s[i],
            rtol=1e-7,
        )


def test_by_hand():
    # Columns of length 3 and 1 that are orthogonal: directions (1, 0) and (0, 1).
    f = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    vectors, sigma = directions(f, 2)
    torch.testing.assert_close(vectors[0], torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(sigma[0], torch.tensor([3.0, 1.0], dtype=torch.float64))
    # The teacher's direction is (1, 0) twice: R_t = [[1, g], [g, 1]], g = exp(-1/8). The student's is (1, 0), then
    # (0, 1) alone, which has cosine 0 with the teacher's and counts as (0, 0): R_s = [[g, 1], [g, 1]].
    lone = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]], dtype=torch.float64)
    assert kdsvd_loss([f, lone], [f, f], 1).item() == pytest.approx(2 * (1 - math.exp(-1 / 8)) ** 2, rel=1e-12)
    assert kdsvd_loss([f, f], [f, 7 * f], 1).item() == 0


def test_directions_have_a_fixed_sign():
    f = normal(4, 3, 5, 6)
    vectors, sigma = directions(f, 3)
    assert vectors.sum(dim=1).ge(0).all()
    torch.testing.assert_close(directions(-f, 3), (vectors, sigma))
    torch.testing.assert_close(directions(f.flip(1), 3), (vectors, sigma))  # another order of rows
    for image, v, s in zip(f, vectors, sigma):
        naive_v, naive_s = naive_directions(image, 3)
        torch.testing.assert_close(s, naive_s)
        torch.testing.assert_close(v, naive_v * naive_v.sum(dim=0).sign())


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_and_precision(k):
    g_s, g_t = stages(2, (3, 4), ((3, 4), (4, 3))), stages(2, (2, 3), ((3, 4), (4, 3)), seed=9)
    leaves = [f.clone().requires_grad_() for f in g_s]
    assert gradcheck(lambda *g: kdsvd_loss(g, g_t, k), leaves)
    check_precision(lambda *g: kdsvd_loss(g[:2], g[2:], k), *g_s, *g_t, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_and_zero_singular_values(dtype, k):
    f = normal(5, 2, 4, 4).to(dtype)
    f[0] = 0
    f[1] = torch.eye(4)  # all singular values equal
    f[2] = 1  # rank 1
    f[3] = torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.0]))
    f.requires_grad_()
    loss = kdsvd_loss([f, 2 * f.flip(3)], [f.detach().flip(0), normal(5, 2, 4, 4, seed=1).to(dtype)], k)
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6
    vectors, sigma = directions(f, k)
    assert vectors[0].eq(0).all() and sigma[0].eq(0).all() and vectors[2, :, 1:].eq(0).all()


def build(student, teacher):
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    return KDSVD(*nets, CN({"KDSVD": method_defaults["KDSVD"].clone()}))


def test_pairs():
    method = build("wrn_16_1", "resnet8x4").train()  # other channels, the same sizes
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), epoch=1)
    assert losses["loss_kd"].isfinite()
    with pytest.raises(ValueError, match=r"KDSVD pairs .* student: .*\(1, 64, 8, 8\); teacher: .*\(1, 512, 4, 4\)"):
        build("resnet8", "vgg8")
    with pytest.raises(ValueError, match=r"KDSVD .* student's \(1, 240, 16, 16\), the teacher's \(1, 16, 32, 32\)"):
        build("ShuffleV1", "resnet14")
    with pytest.raises(ValueError, match=r"KDSVD\.K must be at least 1, it is 0"):
        kdsvd_loss([torch.ones(1, 1, 1, 1)] * 2, [torch.ones(1, 1, 1, 1)] * 2, 0)
    with pytest.raises(ValueError, match="there are 1"):
        kdsvd_loss([torch.ones(1, 1, 1, 1)], [torch.ones(1, 1, 1, 1)], 1)
