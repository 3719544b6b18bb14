"""CAT-KD's class maps and loss against loops over samples, classes and cells."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mdistiller.distillers import CAT_KD
from mdistiller.distillers.CAT_KD import cat_loss, class_maps
from mdistiller.engine.cfg import CFG
from mdistiller.engine.split_update import TASK_LOSSES
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.models.classifier import classifier_of

from . import tensor_rows
from .checks import check_agrees, check_precision, normal


def naive_maps(x, weight, r):
    """The classifier at every position first, then the average of each cell."""
    full = torch.einsum("cd,bdhw->bchw", weight, x)
    height, width = x.shape[2:]
    cells = [
        [
            full[
                :, :, i * height // r : math.ceil((i + 1) * height / r), j * width // r : math.ceil((j + 1) * width / r)
            ].mean((2, 3))
            for j in range(r)
        ]
        for i in range(r)
    ]
    return torch.stack([torch.stack(row, dim=2) for row in cells], dim=2)


def naive_loss(s, t, normalize):
    """Loops over samples and classes."""
    total, (batch, classes, r, _) = s.new_zeros(()), s.shape
    for i in range(batch):
        for c in range(classes):
            a, b = s[i, c], t[i, c]
            if normalize:
                a, b = (m / max(m.square().sum().sqrt(), m.new_tensor(1e-12)) for m in (a, b))
            total = total + (a - b).square().sum()
    return total / (batch * classes * r * r)


@pytest.mark.parametrize("size, r", [(8, 2), (7, 2), (7, 4), (2, 4), (4, 4), (1, 2), (5, 1)])
def test_class_maps(size, r):
    x, weight = normal(2, 3, size, size), normal(5, 3, seed=1)
    torch.testing.assert_close(class_maps(x, weight, r), naive_maps(x, weight, r))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 4, 2, 2), (2, 5, 4, 4)])
def test_agrees_with_loops(shape, normalize):
    s, t = normal(*shape), 3 * normal(*shape, seed=1)
    check_agrees(lambda s, t: cat_loss(s, t, normalize), lambda s, t: naive_loss(s, t, normalize), s, t)


def test_by_hand():
    s = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    t = torch.tensor([[[[0.0, 0.0], [0.0, 2.0]]]])
    assert cat_loss(s, t).item() == pytest.approx((9 + 4) / 4)
    assert cat_loss(s, t, True).item() == pytest.approx((0.6**2 + 0.2**2) / 4)  # (3, 4) / 5 against (0, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_and_precision(normalize):
    s, t = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1)
    assert gradcheck(lambda s: cat_loss(s, t, normalize), (s.clone().requires_grad_(),))
    check_precision(lambda s, t: cat_loss(s, t, normalize), s, t)
    x, weight = normal(2, 3, 4, 4, seed=2), normal(3, 3, seed=3)
    assert gradcheck(
        lambda x, w: cat_loss(class_maps(x, w, 2), t, normalize), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_far_and_zero_maps(normalize):
    for s, t in (
        (torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)),
        (torch.full((1, 2, 2, 2), 1e4), torch.zeros(1, 2, 2, 2)),
    ):
        s = s.clone().requires_grad_()
        loss = cat_loss(s, t, normalize)
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()
    same = normal(1, 2, 2, 2).requires_grad_()
    loss = cat_loss(same, same.detach(), normalize)
    loss.backward()
    assert loss.item() == 0 and same.grad.abs().max() < 1e-12


@pytest.mark.parametrize("row", tensor_rows.rows("CAT_KD"))
def test_pinned(row):
    own, opts = row["seed"], row["opts"]
    first, second = ((8, 100, n, n) for n in opts["sizes"])
    s, t = tensor_rows.normal(own + 4, first), tensor_rows.normal(own + 5, second).detach()
    identity = torch.eye(100, dtype=torch.float64)

    def loss():
        maps = (class_maps(x, identity, opts["CAM_RESOLUTION"]) for x in (s, t))
        return cat_loss(*maps, opts["IF_NORMALIZE"])

    tensor_rows.check(row, loss, student=s)


def built(*options, student="resnet8", teacher="vgg8"):
    torch.manual_seed(0)
    cfg = CFG.clone()
    cfg.merge_from_list(list(options))
    nets = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    return CAT_KD(*nets, cfg, image_size=32).train()


@pytest.mark.parametrize("teacher", ["vgg8", "wrn_16_1", "MobileNetV2"])
def test_a_step(teacher):
    distiller = built(
        "CAT_KD.LOSS.CAT_loss_weight", "3.0", "CAT_KD.IF_NORMALIZE", "True", "CAT_KD.LOSS.CAM_RESOLUTION", "4",
        teacher=teacher,
    )  # fmt: skip
    image, target = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    _, losses = distiller(image=image, target=target, epoch=1)
    maps = [
        naive_maps(n(image)[1]["last_map"], classifier_of(n).weight, 4) for n in (distiller.student, distiller.teacher)
    ]
    torch.testing.assert_close(losses["loss_CAT"], 3 * naive_loss(*maps, True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_CE"], F.cross_entropy(distiller.student(image)[0], target))
    assert {k for k in distiller.state_dict() if not k.startswith(("student.", "teacher."))} == set()
    weight, bias = distiller.student.fc.weight, distiller.student.fc.bias
    losses["loss_CAT"].backward()
    assert weight.grad.abs().sum() > 0 and bias.grad is None  # class maps have no bias
    assert next(distiller.student.parameters()).grad.abs().sum() > 0
    assert "loss_CE" in TASK_LOSSES  # of DOT


def test_refusals():
    with pytest.raises(UserError, match=r"\(1, 3, 2, 2\) and teacher class maps \(1, 4, 2, 2\) differ in shape"):
        cat_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2))
