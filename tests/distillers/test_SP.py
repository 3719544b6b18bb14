"""SP against its equations."""

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import SP, method_defaults
from mdistiller.distillers.SP import similarity_loss, sp_loss
from mdistiller.models import cifar_model_dict

from .oracles.sp import naive_sp_loss


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape_s, shape_t", [((2, 3), (2, 5)), ((5, 3, 4, 7), (5, 2, 3, 3)), ((7, 1, 1, 1), (7, 9))])
def test_agrees_with_the_naive_form(shape_s, shape_t):
    g_s = [maps(*shape_s).requires_grad_(), maps(*shape_s, seed=1)]
    g_t = [maps(*shape_t, seed=2), maps(*shape_t, seed=3)]
    ours, naive = sp_loss(g_s, g_t), naive_sp_loss(g_s, g_t)
    assert ours.shape == ()  # the reference's has shape (1,)
    assert ours.item() == pytest.approx(naive.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, g_s[0])[0] for loss in (ours, naive)), rtol=1e-9, atol=1e-12)


def test_by_hand():
    # Student: equal samples, rows (1, 1) / sqrt(2). Teacher: orthogonal ones, rows (1, 0) and (0, 1).
    f_s, f_t = torch.ones(2, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert similarity_loss(f_s, f_t).item() == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4, rel=1e-12)
    assert similarity_loss(f_s, 5 * f_s).item() == pytest.approx(0, abs=1e-15)
    assert similarity_loss(f_s[:1], f_t[:1]).item() == pytest.approx(0, abs=1e-15)


def test_gradcheck():
    f_t = maps(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda f: similarity_loss(f, f_t), maps(4, 2, 3, 1).requires_grad_())


def test_zero_samples_and_autocast():
    f_s, f_t = maps(4, 3, 2, 2, dtype=torch.bfloat16), maps(4, 7, dtype=torch.bfloat16)
    f_s[1] = 0
    f_s.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sp_loss([f_s], [f_t])
    loss.backward()
    assert loss.dtype == torch.float32 and f_s.grad.isfinite().all()
    assert loss.item() == pytest.approx(sp_loss([f_s.double()], [f_t.double()]).item(), rel=1e-5)
    assert similarity_loss(1e3 * f_s.float(), f_t.float()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_refuses_unequal_batches():
    with pytest.raises(ValueError, match=r"student's has 3 samples, the teacher's 2"):
        similarity_loss(maps(3, 2), maps(2, 2))


def test_method_pools_the_larger_map():
    cfg = CN({"SP": method_defaults["SP"].clone()})
    method = SP(*(cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "vgg8")), cfg)  # 8x8 and 4x4
    method.train()
    torch.manual_seed(0)
    image, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    _, losses = method(image=image, target=target)
    f_s, f_t = (net(image)[1]["feats"][-1] for net in (method.student, method.teacher))
    expected = 3000 * similarity_loss(torch.nn.functional.avg_pool2d(f_s, 2), f_t)
    assert losses["loss_kd"].shape == ()
    assert losses["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-6)
