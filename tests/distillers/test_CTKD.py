"""CTKD: the temperature, the factor of its gradient by epoch, and what is logged, decayed and refused."""

import math

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import CTKD, Distiller, method_defaults
from mdistiller.distillers._base import cosine_fall
from mdistiller.distillers.CTKD import curriculum_temperature
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_precision, masked, normal


def naive_factor(epoch, least=-1.0, most=0.0, loops=10):
    return least + (most - least) * (1 + math.cos(math.pi * min(epoch, loops) / loops)) / 2


def build(*settings, seed=0, logit_stand=False):
    torch.manual_seed(seed)
    networks = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    cfg = CN({name: method_defaults[name].clone() for name in ("KD", "DKD", "CTKD")})
    cfg.EXPERIMENT = CN({"LOGIT_STAND": logit_stand})
    cfg.merge_from_list(list(settings))
    return CTKD(*networks, cfg).train()


def batch(epoch=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(4, 3, 32, 32, generator=generator),
        "target": torch.tensor([3, 4, 0, 9]),
        "epoch": epoch,
    }


@pytest.mark.parametrize("row", [row for m in ("CTKD", "CTKD+LS", "CTKD+DKD") for row in tensor_rows.rows(m)])
def test_rows(row):
    opts, seed = row["opts"], row["seed"]
    s, t = tensor_rows.student_logits(seed), tensor_rows.teacher_logits(seed)
    theta = torch.tensor([opts["theta"]], dtype=torch.float64, requires_grad=True)
    factor = -1 + cosine_fall(opts["epoch"], 0, opts["LOOPS"])
    assert factor == pytest.approx(row["lam"], rel=1e-12)
    temperature = curriculum_temperature(theta, factor, opts["T_START"], opts["T_RANGE"])
    losses = {
        "CTKD": lambda: kd_loss(s, t, temperature),
        "CTKD+LS": lambda: kd_loss(s, t, temperature, logit_stand=True),
        "CTKD+DKD": lambda: dkd_loss(s, t, tensor_rows.labels(seed), 1, 2, temperature),
    }
    tensor_rows.check(row, losses[row["method"]], student=s, theta=theta)


def test_by_hand():
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # sigmoid 1/2, of derivative 1/4
    temperature = curriculum_temperature(theta, -0.5, 1.0, 20.0)
    assert temperature.tolist() == [11.0]
    (3 * temperature).sum().backward()
    assert theta.grad.tolist() == [-0.5 * 3 * 20 / 4]
    assert cosine_fall(5, 0, 10) == 0.5 and cosine_fall(0, 0, 10) == 1 and cosine_fall(40, 0, 10) == 0
    assert cosine_fall(2, 2, 4) == 1 and cosine_fall(3, 2, 4) == pytest.approx(0.5) and cosine_fall(1, 2, 2) == 1


@pytest.mark.parametrize("base", ["KD", "DKD"])
@pytest.mark.parametrize("epoch", [1, 3, 10, 40])
def test_the_gradient_of_theta_is_the_loss_s_by_finite_differences_times_the_factor(base, epoch):
    method = build("CTKD.BASE", base).double()
    fields = batch(epoch) | {"image": batch()["image"].double()}
    loss = method(**fields)[1]["loss_kd"]
    (gradient,) = torch.autograd.grad(loss, method.global_T)
    sides = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            method.global_T += shift
            sides.append(method(**fields)[1]["loss_kd"].item())
            method.global_T -= shift
    slope = (sides[0] - sides[1]) / 2e-5
    assert gradient.item() == pytest.approx(naive_factor(epoch) * slope, rel=1e-4) and gradient.item() != 0


def test_a_tensor_epoch_gives_the_same_as_a_number():
    method = build()
    for epoch in (1, 4, 10, 200):
        gradients = []
        for given in (epoch, torch.tensor(epoch)):
            loss = method(**batch(given))[1]["loss_kd"]
            gradients.append((loss.item(), torch.autograd.grad(loss, method.global_T)[0].item()))
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


@pytest.mark.parametrize("base, weights", [("KD", ("CTKD.LOSS.CE_WEIGHT",)), ("DKD", None)])
def test_it_is_the_base_method_at_the_learnt_temperature(base, weights):
    method = build("CTKD.BASE", base, "CTKD.LOSS.KD_WEIGHT", 0.7, "DKD.BETA", 2.0)
    fields = batch()
    _, losses = method(**fields)
    with torch.no_grad():
        student, teacher = method.student(fields["image"])[0], method.teacher(fields["image"])[0]
    temperature = 1 + 20 * torch.tensor(1.0).sigmoid().item()
    ce = torch.nn.functional.cross_entropy(student, fields["target"]).item()
    expected = {
        "KD": (0.1 * ce, 0.7 * kd_loss(student, teacher, temperature).item()),
        "DKD": (ce, 5 / 20 * dkd_loss(student, teacher, fields["target"], 1, 2, temperature).item()),
    }
    assert (losses["loss_ce"].item(), losses["loss_kd"].item()) == pytest.approx(expected[base], rel=1e-5)
    cfg = CN({"CTKD": CN({"BASE": base})})
    assert CTKD.label_weights(cfg) == weights and method.reads_labels == (base == "DKD")
    assert CTKD.config_sections(cfg) == {"CTKD"} | ({"DKD"} if base == "DKD" else set())


def test_logits_are_standardised_first():
    plain, stand = (build(logit_stand=flag)(**batch())[1]["loss_kd"].item() for flag in (False, True))
    assert plain != pytest.approx(stand, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.0005])
def test_theta_decays_only_if_asked(decay):
    method = build("CTKD.WEIGHT_DECAY", decay)
    (student, own) = method.get_learnable_parameters()
    assert own == {"params": [method.global_T], "weight_decay": decay} and "weight_decay" not in student
    assert method.state_dict()["global_T"].shape == (1,) and method.get_extra_parameters() == 1
    optimizer = torch.optim.SGD([student, own], lr=0.1, weight_decay=0.0005)
    method.global_T.grad = torch.zeros(1)
    optimizer.step()
    assert method.global_T.item() == pytest.approx(1 - 0.1 * decay, rel=1e-6)


def test_theta_climbs_the_loss_and_its_temperature_is_a_metric():
    method = build("CTKD.LOOPS", 1).double()
    fields = batch() | {"image": batch()["image"].double()}
    assert method.metrics()["temperature"].item() == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-6)
    optimizer = torch.optim.SGD(method.get_learnable_parameters()[1:], lr=1.0)
    losses = []
    for _ in range(5):
        loss = method(**fields)[1]["loss_kd"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert method.metrics()["temperature"].requires_grad is False
    assert Distiller.metrics(method) == {}


@pytest.mark.parametrize("lead", [0.0, 200.0, 1e4])
@pytest.mark.parametrize("classes", [2, 5])
def test_finite_gradients_of_student_and_theta(lead, classes):
    s = torch.zeros(1, classes)
    s[:, 0] = lead
    s.requires_grad_()
    t = s.detach().flip(1)
    t[:, 1] -= 1
    one_masked = t.clone()
    one_masked[0, -1] = -math.inf
    teachers = [t, one_masked] if classes > 2 else [t]
    for teacher in teachers:
        for loss in (kd_loss, lambda *args: dkd_loss(*args[:2], torch.tensor([0]), 1, 2, args[2])):
            theta = torch.ones(1, requires_grad=True)
            value = loss(s, teacher, curriculum_temperature(theta, -1.0, 1.0, 20.0))
            gradients = torch.autograd.grad(value, (s, theta))
            assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_precision():
    def loss(s, t):
        theta = torch.ones(1, dtype=torch.float64 if s.dtype == torch.float64 else torch.float32)
        return kd_loss(s, t, curriculum_temperature(theta, -1, 1, 20))

    check_precision(loss, normal(3, 5), masked(3, 5, classes=[(0, 1)], seed=1))


def test_an_unknown_base_is_refused():
    with pytest.raises(UserError, match=r"CTKD.BASE.*KKD"):
        build("CTKD.BASE", "KKD")
