"""ICKD against its equations."""

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import ICKD, method_defaults
from mdistiller.distillers.ICKD import Embedding, ickd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from .. import _golden
from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .oracles.stages import naive_ickd_loss


@pytest.mark.parametrize("row", tensor_rows.rows("ICKD"))
def test_tensor_rows(row):
    """With the authors' names of the embedding, from which its values are drawn."""
    widths = row["opts"]["channels"]
    embed = Embedding(*widths)
    with torch.no_grad():
        for key, tensor in embed.state_dict().items():
            name = "embed_s." + key.replace("conv.", "conv2d.").replace("bn.", "l2norm.")
            tensor.copy_(torch.as_tensor(_golden.value(f"extra.{name}", name, tuple(tensor.shape))).float())
    embed.double().train()
    student, teacher = (tensor_rows.normal(row["seed"] + k, (8, c, 8, 8)) for k, c in zip((4, 5), widths))
    weight = {"embed_s.conv2d.weight": embed.conv.weight}
    tensor_rows.check(row, lambda: ickd_loss(embed(student), teacher.detach()), student=student, **weight)


@pytest.mark.parametrize("size", [(2, 2), (3, 1)])
def test_agrees_with_the_naive_form(size):
    check_agrees(ickd_loss, naive_ickd_loss, normal(2, 3, 2, 2), normal(2, 3, *size, seed=1))


def test_by_hand():
    # Equal channels correlate as much with each other as with themselves, orthogonal ones with themselves alone.
    f_s, f_t = torch.ones(1, 2, 1, 2), torch.eye(2).reshape(1, 2, 1, 2)
    assert ickd_loss(f_s, f_t).item() == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 2)
    assert ickd_loss(f_s, 5 * f_s).item() == pytest.approx(0, abs=1e-12)


def test_gradients_and_precision():
    f_t = normal(2, 3, 2, 2, seed=1)
    assert gradcheck(lambda f: ickd_loss(f, f_t), normal(2, 3, 2, 2).requires_grad_())
    check_precision(ickd_loss, normal(2, 3, 2, 2), f_t)


def test_an_empty_channel_gets_no_gradient():
    f_s = normal(2, 3, 2, 2).float()
    f_s[0, 1] = 0
    f_s.requires_grad_()
    loss = ickd_loss(f_s, normal(2, 3, 2, 2, seed=1).float())
    loss.backward()
    assert loss.isfinite() and f_s.grad.abs().max() < 100


def build(*settings):
    cfg = CN({"ICKD": method_defaults["ICKD"].clone(), "DISTILLER": CN({"PAIRS": []})})
    cfg.merge_from_list(list(settings))
    torch.manual_seed(0)
    networks = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4"))
    return ICKD(*networks, cfg, image_size=32).train()


def test_the_term_of_kd_is_optional():
    batch = {"image": normal(4, 3, 32, 32).float(), "target": torch.arange(4)}
    assert build()(**batch)[1].keys() == {"loss_ce", "loss_feat"}
    method = build("ICKD.LOSS.KD_WEIGHT", 0.5)
    logits, losses = method(**batch)
    expected = 0.5 * kd_loss(logits, method.teacher(batch["image"])[0], 4)
    assert losses["loss_kd"].item() == pytest.approx(expected.item())
    assert method.frozen["teacher"] == ("logits", "feats[3]") and build().frozen["teacher"] == ("feats[3]",)


def test_pairs_and_refusals():
    method = build("DISTILLER.PAIRS", [[1, 2]])
    assert method.embed.conv.weight.shape == (128, 16, 1, 1)
    with pytest.raises(UserError, match="ICKD compares one pair of maps"):
        build("DISTILLER.PAIRS", [[1, 1], [2, 2]])
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 1\), the teacher's \(2, 4, 1, 1\)"):
        ickd_loss(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, 1, 1))
