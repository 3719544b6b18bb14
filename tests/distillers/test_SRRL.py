"""SRRL's two losses against loops, its connector, and both of its forms."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck

from mdistiller.distillers import SRRL
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.SRRL import srrl_losses
from mdistiller.engine.cfg import CFG, load_cfg
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.models.sources import build_network

from .checks import check_agrees, check_precision, normal


def naive(g, h, z, weight, bias):
    """Loops over samples, channels and classes."""
    (batch, width), classes = g.shape, len(weight)
    fm = sum((g[i, d] - h[i, d]) ** 2 for i in range(batch) for d in range(width)) / (batch * width)
    sr = g.new_zeros(())
    for i in range(batch):
        for c in range(classes):
            own = bias[c] + sum(weight[c, d] * g[i, d] for d in range(width))
            sr = sr + (own - z[i, c]) ** 2
    return fm, sr / (batch * classes)


@pytest.mark.parametrize("batch, width, classes", [(1, 1, 2), (3, 4, 5)])
@pytest.mark.parametrize("part", [0, 1])
def test_agrees_with_loops(batch, width, classes, part):
    rest = (
        normal(batch, width, seed=1),
        3 * normal(batch, classes, seed=2),
        normal(classes, width, seed=3),
        normal(classes),
    )
    check_agrees(lambda g: srrl_losses(g, *rest)[part], lambda g: naive(g, *rest)[part], normal(batch, width))


def test_by_hand():
    g, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    weight, bias, z = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.0]])
    fm, sr = srrl_losses(g, h, z, weight, bias)
    assert fm.item() == (1 + 4) / 2 and sr.item() == (0.5**2 + 2**2) / 2


@pytest.mark.parametrize("part", [0, 1])
def test_gradients_and_precision(part):
    g, rest = normal(2, 3), (normal(2, 3, seed=1), normal(2, 4, seed=2), normal(4, 3, seed=3), normal(4, seed=4))
    assert gradcheck(lambda g: srrl_losses(g, *rest)[part], (g.clone().requires_grad_(),))
    check_precision(lambda g, *rest: srrl_losses(g, *rest)[part], g, *rest)
    far = (1e4 * g.float()).requires_grad_()
    loss = srrl_losses(far, *(x.float() for x in rest))[part]
    loss.backward()
    assert loss.isfinite() and far.grad.isfinite().all()


def built(*options, student="resnet8", teacher="wrn_16_2"):
    torch.manual_seed(0)
    cfg = CFG.clone()
    cfg.merge_from_list(list(options))
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    return SRRL(*nets, cfg, image_size=32).train()


@pytest.mark.parametrize("on, kd", [("map", 0.0), ("pooled", 1.0)])
@pytest.mark.parametrize("student, teacher", [("ShuffleV2", "wrn_16_2"), ("wrn_16_1", "MobileNetV2")])
def test_a_step(on, kd, student, teacher):
    distiller = built("SRRL.ON", on, "SRRL.LOSS.KD_WEIGHT", kd, student=student, teacher=teacher)
    width = distiller.classifiers[0].in_features
    assert set(distiller.connector.state_dict()) == {
        "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    own = distiller.connector[0].in_channels
    assert distiller.get_extra_parameters() == own * width + 2 * width
    image, target = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    distiller.student.eval()
    _, losses = distiller(image=image, target=target, epoch=1)
    z, features = distiller.student(image)
    with torch.no_grad():
        z_t, features_t = distiller.teacher(image)
        x = features["last_map"] if on == "map" else features["pooled_feat"][..., None, None]
        x = F.conv2d(x, distiller.connector[0].weight)
        x = F.batch_norm(x, None, None, training=True).relu().mean((2, 3))  # scale 1, shift 0 at the start
        classifier = distiller.classifiers[0]
        fm = (x - features_t["last_map"].mean((2, 3))).square().mean()
        sr = (classifier(x) - z_t).square().mean()
    torch.testing.assert_close(losses["loss_feat"].detach(), fm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_sr"].detach(), sr, rtol=1e-4, atol=1e-6)
    assert ("loss_kd" in losses) == (kd > 0)
    if kd:
        torch.testing.assert_close(losses["loss_kd"], kd_loss(z, z_t, 4.0))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(p.grad is not None for p in (*distiller.student.parameters(), *distiller.connector.parameters()))


def test_the_teachers_classifier_may_read_a_class_token():
    pytest.importorskip("timm")
    student = cifar_model_dict["resnet8"][0](num_classes=10)
    distiller = SRRL(student, build_network("timm/vit_tiny_patch16_224", 10, 32), CFG.clone(), image_size=32)
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]), epoch=1)
    assert all(loss.isfinite() for loss in losses.values())


class NoMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        pooled = x.mean((2, 3))
        return self.fc(pooled), {"pooled_feat": pooled}


def test_refusals():
    own, cfg = cifar_model_dict["resnet8"][0](num_classes=10), CFG.clone()
    with pytest.raises(UserError, match="SRRL reads the last map of the student NoMap, but it has none"):
        SRRL(NoMap(), own, cfg, image_size=32)
    with pytest.raises(UserError, match="NoMap does not tell its classifier"):
        SRRL(own, NoMap(), cfg, image_size=32)
    cfg.merge_from_list(["SRRL.ON", "pooled"])
    SRRL(NoMap(), own, cfg, image_size=32)
    pytest.importorskip("torchvision")
    with pytest.raises(UserError, match=r"its logits are not its classifier's output for `pooled_feat`"):
        SRRL(own, build_network("torchvision/squeezenet1_1", 10, 64), cfg, image_size=64)
    with pytest.raises(UserError, match=r"SRRL\.ON must be one of map, pooled"):
        load_cfg("configs/cifar100/kd.yaml", ["DISTILLER.TYPE", "SRRL", "SRRL.ON", "maps"])
