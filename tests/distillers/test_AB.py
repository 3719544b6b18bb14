"""AB against its equation, and its stage."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import AB, method_defaults
from mdistiller.distillers.AB import ab_loss, boundary_loss
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .oracles.stages import naive_ab_loss

SHAPES = [(8, 16 * 2**i, 8 // 2**i, 8 // 2**i) for i in range(3)]


@pytest.mark.parametrize("row", tensor_rows.rows("AB"))
def test_tensor_rows(row):
    g_s = [tensor_rows.normal(row["seed"] + 4 + i, shape) for i, shape in enumerate(SHAPES)]
    g_t = [tensor_rows.normal(row["seed"] + 14 + i, shape).detach() for i, shape in enumerate(SHAPES)]
    tensor_rows.check(row, lambda: ab_loss(g_s, g_t), **{f"student{i}": f for i, f in enumerate(g_s)})


def test_agrees_with_the_naive_form():
    others = normal(2, 3, 1, 1, seed=1), normal(2, 2, 2, 1, seed=2), normal(2, 3, 1, 1, seed=3)
    check_agrees(
        lambda f: ab_loss([f, others[0]], others[1:], 0.5),
        lambda f: naive_ab_loss([f, others[0]], others[1:], 0.5),
        2 * normal(2, 2, 2, 1),
    )


def test_by_hand():
    s, t = (torch.tensor(values).reshape(1, 4, 1, 1) for values in ([2.0, 0.0, -2.0, 0.5], [1.0, 3.0, -1.0, 0.0]))
    # On the right side by the margin: 0. At 0 for an active neuron: 1. At 0.5 for one that is not: 1.5^2.
    assert boundary_loss(s, t).item() == pytest.approx(1 + 2.25)
    assert ab_loss([s, s], [t, t]).item() == pytest.approx(3.25 * 3 / 1000 * 1.5)


def test_gradients_and_precision():
    f_t = normal(2, 3, 2, 2, seed=1)
    assert gradcheck(lambda f: boundary_loss(f, f_t), normal(2, 3, 2, 2).requires_grad_())
    check_precision(boundary_loss, normal(2, 3, 2, 2), f_t)
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 1\), the teacher's \(1, 3, 1, 1\)"):
        boundary_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1))


def build(teacher):
    cfg = CN({"AB": method_defaults["AB"].clone()})
    torch.manual_seed(0)
    return AB(*(cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", teacher)), cfg, image_size=32)


def test_the_stage_trains_connectors_and_trunk():
    method, batch = build("resnet8x4"), {"image": normal(4, 3, 32, 32).float(), "target": torch.arange(4)}
    (stage,) = method.stages()
    assert (stage.name, stage.epochs) == ("boundaries", 30)
    method.turn_to(stage)
    method.train()
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    assert trained == {
        key for key, _ in method.named_parameters()
        if key.startswith(("student.", "connectors.")) and not key.startswith("student.fc")
    }  # fmt: skip
    assert method.student.layer3.training and not method.student.fc.training
    _, losses = method(**batch)
    maps = [network(batch["image"])[1]["preact_feats"][1:] for network in (method.student, method.teacher)]
    embedded = [connector(f) for connector, f in zip(method.connectors, maps[0])]
    assert losses["loss_kd"].item() == pytest.approx(ab_loss(embedded, maps[1]).item(), rel=1e-5)
    method.turn_to(None)
    assert method.train()(**batch)[1].keys() == {"loss_ce"}
    assert not any(p.requires_grad for p in method.connectors.parameters())


def test_maps_of_one_shape_need_no_connector():
    method = build("resnet14")
    assert method.get_extra_parameters() == 0 and build("resnet8x4").get_extra_parameters() > 0
