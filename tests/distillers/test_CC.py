"""CC against its equation."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import CC, method_defaults
from mdistiller.distillers.CC import cc_loss
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .oracles.stages import naive_cc_loss


@pytest.mark.parametrize("row", tensor_rows.rows("CC"))
def test_tensor_rows(row):
    student, teacher = (tensor_rows.normal(row["seed"] + k, (8, 128)) for k in (4, 5))
    tensor_rows.check(row, lambda: cc_loss(student, teacher.detach()), student=student)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (5, 4)])
def test_agrees_with_the_naive_form(shape):
    check_agrees(cc_loss, naive_cc_loss, normal(*shape), normal(*shape, seed=1))


def test_by_hand():
    f_s, f_t = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 5.0]])
    # Distances (1, 2), (2, 0), (3, 4): products 2 and 6.
    assert cc_loss(f_s, f_t).item() == pytest.approx(4)
    assert cc_loss(f_s[[1, 0, 2]], f_t[[1, 0, 2]]).item() == pytest.approx((2 + 11) / 2)  # the order counts
    assert cc_loss(f_s[:1], f_t[:1]).item() == 0


def test_gradients_and_precision():
    f_t = normal(4, 3, seed=1)
    assert gradcheck(lambda f: cc_loss(f, f_t), normal(4, 3).requires_grad_())
    check_precision(cc_loss, normal(4, 3), f_t)
    large = (1e4 * normal(4, 3)).float().requires_grad_()
    cc_loss(large, f_t.float()).backward()
    assert large.grad.isfinite().all()


def test_refusals_and_widths():
    with pytest.raises(ValueError, match=r"\(2, 3\), not \(2, 4\)"):
        cc_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    cfg = CN({"CC": method_defaults["CC"].clone()})
    cfg.CC.FEAT_DIM = 7
    method = CC(*(cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4")), cfg, image_size=32)
    assert method.embed_s.weight.shape == (7, 64) and method.embed_t.weight.shape == (7, 256)
    assert method.get_extra_parameters() == 7 * (64 + 1 + 256 + 1)
