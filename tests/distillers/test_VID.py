"""VID against its equations; its log-scales are trained, saved and moved, and the original's checkpoints load."""

import math

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import VID, method_defaults
from mdistiller.distillers.VID import vid_loss
from mdistiller.models import cifar_model_dict

from .oracles.vid import naive_vid_loss


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def regressor(channels_s, channels_t, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Conv2d(channels_s, channels_t, 1).to(dtype)


def build(student="resnet8", teacher="resnet14", **changes):
    cfg = CN({"VID": method_defaults["VID"].clone()})
    cfg.VID.update(changes)
    return VID(*(cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)), cfg)


@pytest.mark.parametrize(
    "shape_s, shape_t", [((2, 3, 5, 5), (2, 4, 5, 5)), ((3, 1, 7, 7), (3, 2, 3, 3)), ((1, 2, 2, 2), (1, 3, 5, 5))]
)
def test_agrees_with_the_naive_form(shape_s, shape_t):
    f_s, f_t = maps(*shape_s).requires_grad_(), maps(*shape_t, seed=1)
    log_scale = maps(shape_t[1], seed=2).requires_grad_()
    arguments = regressor(shape_s[1], shape_t[1]), log_scale, f_s, f_t, 1e-3
    ours, naive = vid_loss(*arguments), naive_vid_loss(*arguments)
    assert ours.shape == () and ours.item() == pytest.approx(naive.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (f_s, log_scale)), torch.autograd.grad(naive, (f_s, log_scale))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_by_hand():
    # Errors 1 and 3 at variance 2: 1/2 (mean(1, 9) / 2 + log 2).
    log_scale = torch.tensor([math.log(math.exp(2 - 1e-5) - 1)], dtype=torch.float64)
    f_s = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    f_t = torch.tensor([[[[1.0, -3.0]]]], dtype=torch.float64)
    loss = vid_loss(torch.nn.Identity(), log_scale, f_s, f_t, 1e-5)
    assert loss.item() == pytest.approx(0.5 * (5 / 2 + math.log(2)), rel=1e-12)


def test_gradcheck():
    net, f_t = regressor(2, 3), maps(2, 3, 2, 2, seed=1)
    f_s, log_scale = maps(2, 2, 4, 4).requires_grad_(), maps(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, scale: vid_loss(net, scale, f, f_t), (f_s, log_scale))


def test_extreme_scales_and_autocast():
    f_s, f_t = maps(2, 3, 4, 4, dtype=torch.float32), maps(2, 2, 4, 4, dtype=torch.bfloat16)
    log_scale = torch.tensor([-200.0, 200.0], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vid_loss(regressor(3, 2, torch.float32), log_scale, f_s, f_t)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and log_scale.grad.isfinite().all()


def test_log_scales_start_train_and_save():
    method = build().train()
    start = math.log(math.exp(5.0 - 1e-5) - 1)
    assert [p.shape for p in method.log_scales] == [(16,), (32,), (64,)]
    assert all(p.eq(torch.tensor(start)).all() for p in method.log_scales)
    learnable = {id(p) for p in method.get_learnable_parameters()}
    assert {id(p) for p in (*method.log_scales, *method.regressors.parameters())} <= learnable
    assert method.get_extra_parameters() == sum(p.numel() for p in method.regressors.parameters())
    assert build(INIT_PRED_VAR=1000.0).log_scales[0][0].item() == pytest.approx(1000)

    method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))[1]["loss_kd"].backward()
    assert all(p.grad.ne(0).any() for p in method.log_scales)
    with torch.no_grad():
        method.log_scales[0].fill_(1.5)
    copy = build()
    copy.load_state_dict(method.state_dict())
    assert copy.log_scales[0].eq(1.5).all()


def test_state_of_the_original_loads():
    state = build().state_dict()
    original = {k: v for k, v in state.items() if not k.startswith("log_scales")}
    assert len(original) == len(state) - 3
    method = build()
    method.load_state_dict(original)
    torch.testing.assert_close(method.regressors[1][2].weight, original["regressors.1.2.weight"], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"regressors\.0\.0\.weight"):
        method.load_state_dict({k: v for k, v in state.items() if k != "regressors.0.0.weight"})


def test_building_leaves_the_networks_alone():
    nets = [cifar_model_dict[name][0](num_classes=10).train() for name in ("resnet8", "resnet14")]
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    VID(*nets, CN({"VID": method_defaults["VID"].clone()}))
    for net, state in zip(nets, before):
        assert all(v.equal(state[k]) for k, v in net.state_dict().items())


def test_refusals():
    with pytest.raises(ValueError, match=r"they are 1e-06 and 1e-05"):
        build(INIT_PRED_VAR=1e-6)
