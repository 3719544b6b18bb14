"""AT against its equations."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import AT, method_defaults
from mdistiller.distillers.AT import at_loss, single_stage_at_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .oracles.at import naive_at_loss, naive_single_stage_at_loss


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 4.5])
@pytest.mark.parametrize(
    "shape_s, shape_t", [((1, 1, 1, 1), (1, 2, 1, 1)), ((3, 5, 4, 7), (3, 2, 4, 7)), ((2, 3, 7, 5), (2, 4, 3, 2))]
)
def test_agrees_with_the_naive_form(shape_s, shape_t, p):
    maps = normal(*shape_s), normal(*shape_t, seed=1)
    for f_s, f_t in (maps, maps[::-1]):
        check_agrees(
            lambda s, t: single_stage_at_loss(s, t, p), lambda s, t: naive_single_stage_at_loss(s, t, p), f_s, f_t
        )


def test_sums_over_the_stages():
    g_s, g_t = ([normal(2, c, s, s, seed=c) for c, s in ((a, 4), (b, 2))] for a, b in ((3, 5), (2, 7)))
    assert at_loss(g_s, g_t, 2).item() == pytest.approx(naive_at_loss(g_s, g_t, 2).item(), rel=1e-12)


def test_by_hand():
    # Student: A = (9 + 16) / 2 and 0, so a = (1, 0). Teacher: A = 9 and 16, so a = (9, 16) / sqrt(337).
    f_s = torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]]], dtype=torch.float64)
    f_t = torch.tensor([[[[3.0, 4.0]]]], dtype=torch.float64)
    expected = ((1 - 9 / 337**0.5) ** 2 + 256 / 337) / 2
    assert single_stage_at_loss(f_s, f_t, 2).item() == pytest.approx(expected, rel=1e-12)
    assert single_stage_at_loss(f_s, 5 * f_s, 2).item() == pytest.approx(0, abs=1e-15)


def test_relation_to_the_papers_equation_2():
    """Its term is |a_s - a_t| for each image, with A a sum over the channels; here its square, divided by HW."""
    f_s, f_t = normal(1, 3, 4, 5), normal(1, 2, 4, 5, seed=1)
    maps = [f.square().sum(dim=1).flatten() for f in (f_s, f_t)]
    term = (maps[0] / maps[0].norm() - maps[1] / maps[1].norm()).norm().item()
    assert single_stage_at_loss(f_s, f_t, 2).item() == pytest.approx(term**2 / 20, rel=1e-12)


@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_gradients_and_precision(p):
    f_s, f_t = normal(2, 3, 2, 3), normal(2, 2, 2, 3, seed=1)
    assert gradcheck(lambda f: single_stage_at_loss(f, f_t, p), f_s.clone().requires_grad_())
    check_precision(lambda s, t: single_stage_at_loss(s, t, p), f_s, f_t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.5, 1, 2, 3])
def test_zero_maps_and_entries(p, dtype):
    f_s = normal(2, 3, 4, 4).relu().to(dtype)
    f_s[0] = 0
    f_s.requires_grad_()
    loss = single_stage_at_loss(f_s, normal(2, 3, 4, 4, seed=1).to(dtype), p)
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()
    assert f_s.grad[0].eq(0).all() and f_s.grad[f_s == 0].eq(0).all()


def build(student, teacher):
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    return AT(*nets, CN({"AT": method_defaults["AT"].clone()}))


def test_pairs():
    method = build("ShuffleV1", "resnet14").train()  # 16x16 to 4x4 against 32x32 to 8x8
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([3, 4]), epoch=1)
    assert losses["loss_kd"].isfinite()
    assert build("resnet8", "vgg8").pairs.indices == [(0, 1), (1, 2), (2, 3), (3, 4)]
    with pytest.raises(ValueError, match="positive, it is 0"):
        single_stage_at_loss(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
