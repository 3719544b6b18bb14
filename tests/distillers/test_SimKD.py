"""SIMKD against its equations, and what it deploys: the student's trunk, the projector, the teacher's classifier."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.distillers import SimKD
from mdistiller.distillers.contract import check_scores, learnable_parameters, not_averaged
from mdistiller.distillers.SimKD import projector, simkd_loss
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.modes import check_modes
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.models import tiny_imagenet_model_dict
from mdistiller.models.cost import network_cost

from .._networks import TwoMaps
from . import by_hand
from .by_hand import batch, network
from .checks import check_agrees, check_precision, normal


def test_agrees_with_loops_over_cells():
    def naive(projected, f_t):
        total = 0.0
        for b in range(2):
            for c in range(3):
                for y in range(4):
                    for x in range(4):
                        goal = f_t[b, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
                        total = total + (projected[b, c, y, x] - goal) ** 2
        return total / (2 * 3 * 4 * 4)

    check_agrees(simkd_loss, naive, normal(2, 3, 4, 4), normal(2, 3, 8, 8, seed=1))


def test_by_hand():
    """((1 - 0)^2 + (3 - 1)^2) / 2 = 2.5."""
    assert simkd_loss(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[0.0, 1.0]]]])).item() == 2.5


def test_gradcheck_and_precisions():
    f_t = normal(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda f: simkd_loss(f, f_t), normal(2, 3, 4, 4).requires_grad_())
    check_precision(simkd_loss, normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1))
    half = simkd_loss((1e3 * normal(2, 3, 4, 4)).half(), normal(2, 3, 4, 4).half())
    assert half.dtype == torch.float32 and half.isfinite()  # squares of 1e6 are none in float16


def test_the_projector_is_three_convolutions():
    torch.manual_seed(0)
    layers = projector(5, 8, 4).double().eval()
    x, out = normal(2, 5, 3, 3), normal(2, 5, 3, 3)
    for conv, bn in ((0, 1), (3, 4), (6, 7)):
        weight, norm = layers[conv].weight, layers[bn]
        padded = F.pad(out, [weight.shape[-1] // 2] * 4)
        windows = padded.unfold(2, weight.shape[-1], 1).unfold(3, weight.shape[-1], 1)
        out = torch.einsum("bchwyx,ocyx->bohw", windows, weight)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        out = (out * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]).clamp(min=0)
    torch.testing.assert_close(layers(x), out, rtol=1e-9, atol=1e-12)
    assert [layer.weight.shape[0] for layer in (layers[0], layers[3], layers[6])] == [2, 2, 8]
    assert not any(isinstance(layer, nn.Conv2d) and layer.bias is not None for layer in layers)


def built(student, teacher, **own):
    return by_hand.built(SimKD, student, teacher, **own)


STUDENTS = {
    "resnet8": {"fc.weight", "fc.bias"},
    "wrn_16_1": {"fc.weight", "fc.bias", "bn1.weight", "bn1.bias"},
    "MobileNetV2": {"classifier.0.weight", "classifier.0.bias", "conv2.0.weight", "conv2.1.weight", "conv2.1.bias"},
    "ShuffleV2": {"linear.weight", "linear.bias", "conv2.weight", "bn2.weight", "bn2.bias"},
}


@pytest.mark.parametrize("student", STUDENTS)
def test_what_the_last_map_does_not_need_is_untrained_and_not_deployed(student):
    distiller = built(network(student), network("resnet14", seed=1))
    unused = {f"student.{name}" for name in STUDENTS[student]}
    assert set(distiller.untrained) == unused and unused <= set(not_averaged(distiller))
    before = copy.deepcopy(distiller.state_dict())
    optimizer = torch.optim.SGD(learnable_parameters(distiller), lr=0.1, weight_decay=0.1)
    logits, losses = distiller(**batch())
    assert logits.shape == (4, 10) and set(losses) == {"loss_kd"}
    losses["loss_kd"].backward()
    without = {name for name, p in distiller.named_parameters() if p.grad is None}
    assert without == unused | {name for name in without if name.startswith("teacher.")}
    optimizer.step()
    moved = {name for name, value in distiller.state_dict().items() if not value.equal(before[name])}
    assert not any(name.startswith("teacher.") for name in moved) and not unused & moved
    (deployed,) = distiller.deployments().values()
    names = {name.removeprefix("student.") for name, _ in deployed.named_parameters() if name.startswith("student.")}
    assert names == {name for name, _ in distiller.student.named_parameters()} - STUDENTS[student]


def test_the_cost_is_that_of_trunk_projector_and_the_teachers_classifier():
    """resnet32x4 -> resnet8x4 at f 2: 1,233,540 - 25,700 of the student, 214,016 of the projector, 25,700."""
    distiller = built(network("resnet8x4", 100), network("resnet32x4", 100))
    (deployed,) = distiller.deployments().values()
    assert network_cost(deployed, 32).parameters == 1_233_540 - 25_700 + 214_016 + 25_700
    assert distiller.get_extra_parameters() == 214_016
    # 64 cells of 8x8: 256 x 128 + 9 x 128^2 + 128 x 256 each, and the classifier as before.
    more = network_cost(deployed, 32).macs - network_cost(distiller.student, 32).macs
    assert more == 64 * (2 * 256 * 128 + 9 * 128**2)


@pytest.mark.parametrize("factor, between", [(2, 32), (8, 8), (1000, 1)])
def test_the_factor_divides_the_projectors_channels(factor, between):
    assert built(network("resnet8"), network("resnet14"), FACTOR=factor).transfer[0].weight.shape[0] == between


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("resnet8", "wrn_16_2"),
        ("wrn_16_1", "resnet14"),
        ("vgg8", "resnet14"),
        ("resnet8", "vgg8"),
        ("ShuffleV1", "vgg8"),
    ],
)
def test_the_teachers_classifier_gets_what_its_own_pooling_would(student, teacher):
    """A projected map that equals the teacher's last map gives its logits: for WRN, after BatchNorm and ReLU."""
    distiller = built(network(student), network(teacher, seed=1)).eval()
    check_scores(distiller, 32)
    (deployed,) = distiller.deployments().values()
    image = batch()["image"]
    logits, features = distiller.teacher(image)
    torch.testing.assert_close(deployed.classify(features["last_map"]), logits, rtol=1e-4, atol=1e-5)
    map_s, map_t = deployed.project(image).shape, features["last_map"].shape
    own = distiller.student(image)[1]["feats"][-1].shape
    assert map_s == (4, map_t[1], *(min(a, b) for a, b in zip(own[2:], map_t[2:])))
    assert deployed(image).shape == (4, 10)


def test_a_classifier_that_is_a_1x1_convolution():
    """Tiny-ImageNet's MobileNetV2; copies, as an EMA is one, keep its weights."""
    torch.manual_seed(0)
    teacher = tiny_imagenet_model_dict["MobileNetV2"][0](num_classes=10)
    distiller = built(network("resnet8"), teacher).eval()
    (deployed,) = distiller.deployments().values()
    image = batch(2)["image"]
    logits, features = teacher(image)
    torch.testing.assert_close(deployed.classify(features["last_map"]), logits, rtol=1e-4, atol=1e-5)
    assert deployed.state_dict()["classifier.weight"].equal(teacher.conv2.weight)
    twin = copy.deepcopy(deployed)
    assert twin(image).equal(deployed(image)) and twin.classifier is not deployed.classifier


def test_the_deployed_network_follows_the_distiller():
    """Its device and dtype, its modes, and layers that are exchanged in the student."""
    distiller = built(network("resnet8"), network("resnet14")).double()
    (deployed,) = distiller.deployments().values()
    assert {p.dtype for p in deployed.parameters()} == {b.dtype for b in deployed.buffers()} - {torch.int64}
    distiller.eval()
    assert not deployed.student.training and not deployed.student.bn1.training
    distiller.student.bn1 = nn.BatchNorm2d(16).double()
    distiller.train()
    assert deployed.student.bn1 is distiller.student.bn1 and deployed.student.training


def test_it_is_built_again_on_the_same_student():
    student, teacher = network("resnet8"), network("resnet14")
    first, second = built(student, teacher), built(student, teacher)
    assert first.untrained == second.untrained
    assert first.deployments()["simkd"].state_dict().keys() == second.deployments()["simkd"].state_dict().keys()


def test_labels_are_not_read():
    cfg = load_cfg("configs/digits/kd.yaml", ["DISTILLER.TYPE", "SIMKD", "DATASET.MIXUP", "0.8"])
    assert SimKD.label_weights(cfg) == ()
    check_modes(cfg, SimKD, SumUpdate, 1)
    distiller = built(network("resnet8"), network("resnet14"))
    one = distiller(**batch())[1]["loss_kd"]
    assert distiller(**batch() | {"target": torch.tensor([9, 9, 9, 9])})[1]["loss_kd"].item() == one.item()


def test_refusals():
    with pytest.raises(UserError, match=r"SIMKD reads the map that the teacher TwoMaps pools for its classifier, but"):
        built(network("resnet8"), TwoMaps())
    with pytest.raises(ValueError, match="as many images and channels"):
        simkd_loss(normal(2, 3, 4, 4), normal(2, 5, 4, 4))

    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, image):
            x = image.mean((2, 3))
            return self.fc(x), {"feats": [x], "pooled_feat": x}

    with pytest.raises(UserError, match=r"SIMKD compares feature maps .* the student's \(1, 3\)"):
        built(Vectors(), network("resnet14"))
