"""KDSVD against a full singular value decomposition, also for inputs on which that one fails."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import KDSVD, method_defaults
from mdistiller.distillers.KDSVD import directions, kdsvd_loss
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.errors import UserError
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


def check_kdsvd(g_s, g_t, k, axis):
    """Agreement of value and gradient at every stage of the student."""
    for i in range(len(g_s)):
        check_agrees(
            lambda f, i=i: kdsvd_loss([*g_s[:i], f, *g_s[i + 1 :]], g_t, k, axis=axis),
            lambda f, i=i: naive_kdsvd_loss([*g_s[:i], f, *g_s[i + 1 :]], g_t, k, axis),
            g_s[i],
            rtol=1e-7,
        )


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("batch, channels_s, channels_t, sizes", CASES)
def test_agrees_with_the_naive_form(batch, channels_s, channels_t, sizes, k):
    g_s, g_t = stages(batch, channels_s, sizes), stages(batch, channels_t, sizes, seed=9)
    k = min(k, *(min(f.shape[1] * f.shape[2], f.shape[3]) for f in g_s + g_t))  # no more than each map has
    check_kdsvd(g_s, g_t, k, "columns")


CHANNEL_CASES = [  # batch, channels (some more than there are positions), student's sizes, teacher's sizes
    (1, (4, 3), ((4, 4), (2, 2)), ((4, 4), (2, 2))),
    (3, (3, 9, 5), ((6, 7), (2, 3), (2, 2)), ((6, 7), (2, 3), (2, 2))),
    (2, (7, 2), ((3, 2), (3, 3)), ((2, 4), (1, 5))),
]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("batch, channels, sizes_s, sizes_t", CHANNEL_CASES)
def test_agrees_with_the_naive_form_over_channels(batch, channels, sizes_s, sizes_t, k):
    g_s, g_t = stages(batch, channels, sizes_s), stages(batch, channels, sizes_t, seed=9)
    k = min(k, *(min(f.shape[1], f.shape[2] * f.shape[3]) for f in g_s + g_t))
    check_kdsvd(g_s, g_t, k, "channels")


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


def test_channels_by_hand():
    # Two pixels with the channels (3, 4) and (0, 0): one direction, (0.6, 0.8).
    f = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]], dtype=torch.float64)
    vectors, sigma = directions(f, 2, "channels")
    torch.testing.assert_close(vectors[0], torch.tensor([[0.6, 0], [0.8, 0]], dtype=torch.float64))
    torch.testing.assert_close(sigma[0], torch.tensor([5.0, 0.0], dtype=torch.float64))
    vectors, sigma = directions(f, 2)  # over columns: (1, 0)
    torch.testing.assert_close(vectors[0], torch.tensor([[1.0, 0], [0, 0]], dtype=torch.float64))
    # Over channels the teacher has (0.6, 0.8) twice; the student the same, then (0.8, 0.6), with cosine 0.96.
    other = f.flip(1)
    changes = [math.exp(-((a - b) ** 2) / 8) for a in (0.6, 0.8) for b in (0.6, 0.8)]
    changed = [math.exp(-((a - b) ** 2) / 8) for a in (0.8, 0.6) for b in (0.6, 0.8)]
    expected = sum((a - b) ** 2 for a, b in zip(changes, changed))
    assert kdsvd_loss([f, other], [f, f], 1, axis="channels").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 7, 2, 2), (2, 6, 1, 1)])
def test_channels_are_the_columns_of_the_transposed_map(shape):
    f = normal(*shape).requires_grad_()
    found = []
    for vectors, sigma in (directions(f, 4, "channels"), directions(f.flatten(2).mT.unsqueeze(1), 4)):
        (slope,) = torch.autograd.grad((vectors * normal(*vectors.shape, seed=1)).sum(), f)
        assert vectors.shape == (2, shape[1], min(4, shape[1])) and sigma.shape == (2, min(4, shape[1]))
        found.append((vectors.detach(), sigma, slope))
    torch.testing.assert_close(*found)


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


@pytest.mark.parametrize(
    "axis, channels_s, channels_t, sizes",
    [("columns", (3, 4), (2, 3), ((3, 4), (4, 3))), ("channels", (3, 6), (3, 6), ((3, 2), (2, 2)))],
)
@pytest.mark.parametrize("k", [1, 2])
def test_gradients_and_precision(k, axis, channels_s, channels_t, sizes):
    g_s, g_t = stages(2, channels_s, sizes), stages(2, channels_t, sizes, seed=9)
    leaves = [f.clone().requires_grad_() for f in g_s]
    assert gradcheck(lambda *g: kdsvd_loss(g, g_t, k, axis=axis), leaves)
    check_precision(lambda *g: kdsvd_loss(g[:2], g[2:], k, axis=axis), *g_s, *g_t, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", ["columns", "channels"])
def test_repeated_and_zero_singular_values(axis, dtype, k):
    f = normal(5, 2, 4, 4).to(dtype)
    f[0] = 0
    f[1] = torch.eye(4)  # all singular values equal
    f[2] = 1  # rank 1
    f[3] = torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.0]))
    if axis == "channels":  # 8 channels, 4 positions
        f = f.flatten(1, 2).unsqueeze(2)
    f.requires_grad_()
    teacher = f.detach().flip(0), normal(*f.shape, seed=1).to(dtype)
    loss = kdsvd_loss([f, 2 * f.flip(3)], teacher, k, axis=axis)
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all() and f.grad.abs().max() < 1e6
    vectors, sigma = directions(f, k, axis)
    assert vectors[0].eq(0).all() and sigma[0].eq(0).all() and vectors[2, :, 1:].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])  # the square of 1e30 overflows in float32
@pytest.mark.parametrize("axis", ["columns", "channels"])
@pytest.mark.parametrize("place", range(4))  # the student's first or second stage, or the teacher's
def test_a_map_that_is_not_finite_makes_the_loss_nan(place, axis, bad):
    maps = [normal(3, 5, 4, 4, seed=i).float() for i in range(4)]
    maps[place][1, 2, 3, 0] = bad
    for f in maps[:2]:
        f.requires_grad_()
    loss = kdsvd_loss(maps[:2], maps[2:], 2, axis=axis)
    loss.backward()
    assert loss.isnan()
    vectors, sigma = directions(maps[place], 2, axis)
    assert vectors[1].isnan().all() and sigma[1].isnan().all()
    others = torch.tensor([0, 2])
    torch.testing.assert_close((vectors[others], sigma[others]), directions(maps[place][others], 2, axis))


def test_a_run_with_an_exploding_learning_rate_skips_its_steps(tmp_path, capsys):
    """The error is that of the policy, which has seen the NaN, and not one of torch.linalg."""
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=10).state_dict()}, tmp_path / "resnet8")
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        f"""LOG.WANDB False LOG.PREFIX {tmp_path} EXPERIMENT.DEVICE cpu DATASET.TRAIN_FRACTION 0.1 SOLVER.BATCH_SIZE 8
        DISTILLER.TYPE KDSVD DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {tmp_path / "resnet8"}
        SOLVER.LR 1e20 SOLVER.NAN_POLICY skip SOLVER.NAN_LIMIT 1""".split(),
    )
    with pytest.raises(NonFiniteLossError, match="loss_kd = nan"):
        build_trainer(cfg).train()
    skipped = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert len(skipped) == 1 and all("loss_kd = nan" in line for line in skipped)


def build(student, teacher, **settings):
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    cfg = CN({"KDSVD": method_defaults["KDSVD"].clone()})
    cfg.KDSVD.update(settings)
    return KDSVD(*nets, cfg)


def test_pairs():
    method = build("wrn_16_1", "resnet8x4").train()  # other channels, the same sizes
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), epoch=1)
    assert losses["loss_kd"].isfinite()
    assert build("resnet8", "vgg8").pairs.indices == [(0, 1), (1, 2), (2, 3), (3, 4)]
    method = build("ShuffleV1", "resnet14").train()  # 16x16 to 4x4 against 32x32 to 8x8, pooled to the smaller
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), epoch=1)
    assert losses["loss_kd"].isfinite()
    with pytest.raises(ValueError, match=r"KDSVD\.K must be at least 1, it is 0"):
        kdsvd_loss([torch.ones(1, 1, 1, 1)] * 2, [torch.ones(1, 1, 1, 1)] * 2, 0)
    with pytest.raises(ValueError, match="there are 1"):
        kdsvd_loss([torch.ones(1, 1, 1, 1)], [torch.ones(1, 1, 1, 1)], 1)


def test_axis():
    method = build("resnet8", "resnet14", AXIS="channels").train()
    image, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 4])
    _, losses = method(image=image, target=target, epoch=1)
    g_s, g_t = (network(image)[1]["feats"][1:] for network in (method.student, method.teacher))
    assert losses["loss_kd"].item() == pytest.approx(kdsvd_loss(g_s, g_t, 1, axis="channels").item(), rel=1e-4)
    assert losses["loss_kd"].item() != pytest.approx(kdsvd_loss(g_s, g_t, 1).item(), rel=1e-2)
    with pytest.raises(
        ValueError, match=r"AXIS channels .* student's \(1, 16, 32, 32\), the teacher's \(1, 64, 32, 32"
    ):
        build("resnet8", "resnet8x4", AXIS="channels")
    for wrong in (lambda: build("resnet8", "resnet14", AXIS="chanels"), lambda: directions(g_s[0], 1, "chanels")):
        with pytest.raises(UserError, match=r"unknown KDSVD\.AXIS 'chanels'; did you mean channels"):
            wrong()
