"""FSP against its equation, and its stage."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import FSP, method_defaults
from mdistiller.distillers.FSP import flow, fsp_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .oracles.stages import naive_fsp_loss
from .test_AB import SHAPES


@pytest.mark.parametrize("row", tensor_rows.rows("FSP"))
def test_tensor_rows(row):
    g_s = [tensor_rows.normal(row["seed"] + 4 + i, shape) for i, shape in enumerate(SHAPES)]
    g_t = [tensor_rows.normal(row["seed"] + 14 + i, shape).detach() for i, shape in enumerate(SHAPES)]
    tensor_rows.check(row, lambda: fsp_loss(g_s, g_t), **{f"student{i}": f for i, f in enumerate(g_s)})


def test_agrees_with_the_naive_form():
    others = [normal(2, c, 2, 2, seed=seed) for seed, c in ((1, 4), (2, 2), (3, 3), (4, 4), (5, 2))]
    check_agrees(
        lambda f: fsp_loss([f, *others[:2]], others[2:]), lambda f: naive_fsp_loss([f, *others[:2]], others[2:]),
        normal(2, 3, 2, 2),
    )  # fmt: skip


def test_by_hand():
    lower, upper = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2), torch.tensor([2.0, 4.0]).reshape(1, 1, 1, 2)
    assert flow(lower, upper).item() == pytest.approx((2 + 12) / 2)
    assert flow(lower, upper[..., :1]).item() == pytest.approx(2 * 2)  # the larger one is averaged
    assert fsp_loss([lower, upper], [upper, upper]).item() == pytest.approx((7 - 10) ** 2)


def test_gradients_and_precision():
    others = normal(2, 2, 1, 1, seed=1), normal(2, 3, 2, 2, seed=2), normal(2, 2, 2, 2, seed=3)
    loss = lambda f: fsp_loss([f, others[0]], others[1:])  # noqa: E731
    assert gradcheck(loss, normal(2, 3, 2, 2).requires_grad_())
    check_precision(lambda f, *g: fsp_loss([f, g[0]], g[1:]), normal(2, 3, 2, 2), *others)


def build(student, teacher, pairs=()):
    cfg = CN({"FSP": method_defaults["FSP"].clone(), "DISTILLER": CN({"PAIRS": list(pairs)})})
    torch.manual_seed(0)
    return FSP(*(cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)), cfg, image_size=32)


def test_the_stage_trains_the_trunk():
    method, batch = build("resnet8", "resnet14"), {"image": normal(4, 3, 32, 32).float(), "target": torch.arange(4)}
    assert method.pairs.indices == [(0, 0), (1, 1), (2, 2), (3, 3)]  # the stems' maps too
    (stage,) = method.stages()
    assert (stage.name, stage.epochs) == ("flow", 30)
    method.turn_to(stage)
    method.train()
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    assert trained == {f"student.{key}" for key, _ in method.student.named_parameters() if not key.startswith("fc")}
    _, losses = method(**batch)
    maps = [network(batch["image"])[1]["feats"] for network in (method.student, method.teacher)]
    assert losses["loss_kd"].item() == pytest.approx(50 * fsp_loss(*maps).item(), rel=1e-5)
    method.turn_to(None)
    assert method.train()(**batch)[1].keys() == {"loss_ce"}


def test_chosen_pairs_end_the_trunk():
    (stage,) = build("resnet8", "resnet14", [[1, 1], [2, 2]]).stages()
    assert len(stage.parameters) < len(build("resnet8", "resnet14").stages()[0].parameters)


def test_refuses_other_widths_in_one_line():
    with pytest.raises(UserError, match=r"student ResNet.* has \[16, 16, 32, 64\], the teacher ResNet.* \[32, 64, 128"):
        build("resnet8", "resnet8x4")
    with pytest.raises(ValueError, match=r"student's \[2\], the teacher's \[2\]"):
        fsp_loss([torch.zeros(1, 2, 1, 1)], [torch.zeros(1, 2, 1, 1)])
