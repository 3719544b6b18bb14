"""FT against its equation, and its paraphraser."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import FT, method_defaults
from mdistiller.distillers.contract import check_distiller
from mdistiller.distillers.FT import ft_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .oracles.stages import naive_ft_loss


@pytest.mark.parametrize("row", tensor_rows.rows("FT"))
def test_tensor_rows(row):
    student, teacher = (tensor_rows.normal(row["seed"] + k, (8, 32, n, n)) for k, n in ((4, 8), (5, 4)))
    tensor_rows.check(row, lambda: ft_loss(student, teacher.detach()), student=student)


def test_agrees_with_the_naive_form():
    check_agrees(ft_loss, naive_ft_loss, normal(2, 3, 2, 3), normal(2, 4, 2, 3, seed=1))


def test_by_hand():
    # Factors (1, 0) and (3, 4) / 5: the differences are 2/5 and 4/5.
    f_s = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    f_t = torch.tensor([3.0, 4.0]).sqrt().reshape(1, 1, 1, 2)
    assert ft_loss(f_s, f_t).item() == pytest.approx((0.4 + 0.8) / 2)
    assert ft_loss(-3 * f_t, f_t).item() == pytest.approx(0, abs=1e-7)


def test_gradients_and_precision():
    f_t = normal(2, 3, 2, 2, seed=1)
    assert gradcheck(lambda f: ft_loss(f, f_t), normal(2, 2, 4, 4).requires_grad_())
    check_precision(ft_loss, normal(2, 3, 2, 2), f_t)
    empty = torch.zeros(2, 3, 2, 2, requires_grad=True)
    ft_loss(empty, f_t.float()).backward()
    assert empty.grad.isfinite().all()


def build(*settings):
    cfg = CN({"FT": method_defaults["FT"].clone(), "DISTILLER": CN({"PAIRS": []})})
    cfg.merge_from_list(list(settings))
    torch.manual_seed(0)
    networks = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet14"))
    return FT(*networks, cfg, image_size=32).train()


BATCH = {"image": normal(4, 3, 32, 32).float(), "target": torch.arange(4)}


def test_the_paraphraser_learns_in_its_stage_alone():
    method = build("FT.INIT_EPOCHS", 3, "FT.INIT_LR", 0.02)
    check_distiller(method)
    (stage,) = method.stages()
    assert (stage.name, stage.epochs, stage.lr) == ("paraphraser", 3, 0.02)
    method.turn_to(stage)
    assert method.train().paraphraser.training and not method.translator.training and not method.student.training
    optimizer = torch.optim.SGD(stage.learnable, lr=0.02)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        _, losses = method(**BATCH)
        losses["loss_reconstruction"].backward()
        optimizer.step()
        values.append(losses["loss_reconstruction"].item())
    assert values == sorted(values, reverse=True)
    f_t = method.teacher(BATCH["image"])[1]["feats"][-1]
    assert values[-1] > method(**BATCH)[1]["loss_reconstruction"].item()
    assert method(**BATCH)[1]["loss_reconstruction"].item() == pytest.approx(
        (method.paraphraser(f_t) - f_t).square().mean().item(), rel=1e-5
    )
    method.turn_to(None)
    assert not method.train().paraphraser.training and method.translator.training
    assert not any(p.requires_grad for p in method.paraphraser.parameters())


def test_widths_pairs_and_refusals():
    method = build("FT.K", 0.25, "DISTILLER.PAIRS", [[1, 2]])
    assert method.translator.encoder[6].weight.shape == (8, 8, 3, 3)
    assert method.paraphraser.decoder[6].weight.shape == (32, 32, 3, 3)
    assert method(**BATCH)[1]["loss_kd"].isfinite()
    with pytest.raises(UserError, match="FT compares one pair of maps"):
        build("DISTILLER.PAIRS", [[1, 1], [2, 2]])
