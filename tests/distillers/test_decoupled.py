"""The two parts of a distillation loss, as DeepKD trains on them, against plain loops, by hand and at the limits."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import DKD, KD, method_defaults
from mdistiller.distillers._decoupled import decoupled_losses
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, masked, normal
from .tensor_rows import check, labels, rows, student_logits, teacher_logits

TARGET = torch.tensor([0, 1, 2, 3, 1])


def naive_parts(s, t, target, temperature, top=0, by_doubt=False):
    """Plain loops over images and classes, on probabilities."""
    count, classes = s.shape
    tckd, nckd, doubt = [], [], []
    for i, y in enumerate(target.tolist()):
        kept = t[i].argsort(descending=True).tolist()[: top or classes]
        others = [c for c in range(classes) if c != y and c in kept]
        p_s, p_t = ([(z[i, c] / temperature).exp() for c in range(classes)] for z in (s, t))
        b_s, b_t = (p[y] / sum(p) for p in (p_s, p_t))
        tckd.append(b_t * (b_t / b_s).log() + (1 - b_t) * ((1 - b_t) / (1 - b_s)).log())
        q_s, q_t = ([p[c] / sum(p[k] for k in others) for c in others] for p in (p_s, p_t))
        nckd.append(sum((a * (a / b).log() for a, b in zip(q_t, q_s)), torch.zeros((), dtype=s.dtype)))
        doubt.append(1 - b_t.detach())
    square = temperature**2 / count
    weight = sum(doubt) / count if by_doubt else 1.0
    return square * sum(tckd), weight * square * sum(nckd)


@pytest.mark.parametrize("row", rows("DeepKD"))
def test_tensor_rows(row):
    s, opts = student_logits(row["seed"]), row["opts"]
    t, y = teacher_logits(row["seed"]), labels(row["seed"])
    tckd, nckd = decoupled_losses(s, t, y, opts["T"], opts["TOPK"], by_doubt=not opts["DKD"])
    if opts["DKD"]:  # the rows are of epoch 40, behind the warm-up
        tckd, nckd = opts["ALPHA"] * tckd, opts["BETA"] * nckd
    assert (tckd.item(), nckd.item()) == pytest.approx((row["losses"]["tckd"], row["losses"]["nckd"]), rel=1e-6)
    check(row, lambda: tckd + nckd, student=s)


@pytest.mark.parametrize("by_doubt", [False, True])
@pytest.mark.parametrize("top", [0, 1, 2, 4, 5, 7])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_plain_loops(temperature, top, by_doubt):
    s, t = 2 * normal(5, 5), 3 * normal(5, 5, seed=1)
    for part in (0, 1):
        check_agrees(
            lambda s, t, part=part: decoupled_losses(s, t, TARGET, temperature, top, by_doubt)[part],
            lambda s, t, part=part: naive_parts(s, t, TARGET, temperature, top, by_doubt)[part],
            s, t,
        )  # fmt: skip


def test_gradcheck():
    s = normal(5, 5).requires_grad_()
    assert gradcheck(lambda s: decoupled_losses(s, normal(5, 5, seed=1), TARGET, 2.0, 3, True), s)


def test_by_hand():
    """Student (1/2, 1/4, 1/8, 1/8), teacher (1/4, 1/2, 1/8, 1/8), label 0, T 1."""
    probabilities = (0.5, 0.25, 0.125, 0.125), (0.25, 0.5, 0.125, 0.125)
    s, t = (torch.tensor([p], dtype=torch.float64).log() for p in probabilities)
    label, log = torch.tensor([0]), math.log
    tckd = 0.25 * log(0.5) + 0.75 * log(1.5)
    nckd = 2 / 3 * log((2 / 3) / 0.5) + 2 * 1 / 6 * log((1 / 6) / 0.25)
    for by_doubt, weight in ((False, 1), (True, 0.75)):
        found = decoupled_losses(s, t, label, 1.0, by_doubt=by_doubt)
        assert [x.item() for x in found] == pytest.approx([tckd, weight * nckd])
    # Of the two largest, 1 and 0, only class 1 is left: no difference. Of three, classes 1 and 2 or 3.
    assert decoupled_losses(s, t, label, 1.0, top=2)[1].item() == 0
    found = decoupled_losses(s, t, label, 1.0, top=3)[1].item()
    assert found == pytest.approx(0.8 * log(0.8 / (2 / 3)) + 0.2 * log(0.2 / (1 / 3)))


def test_they_are_the_parts_of_dkd_and_of_kd():
    s, t = normal(5, 5), normal(5, 5, seed=1)
    tckd, nckd = decoupled_losses(s, t, TARGET, 4.0)
    assert (2 * tckd + 3 * nckd).item() == pytest.approx(dkd_loss(s, t, TARGET, 2.0, 3.0, 4.0).item())
    one = slice(0, 1)  # of one image, the mean of the doubts is its own
    parts = decoupled_losses(s[one], t[one], TARGET[one], 4.0, by_doubt=True)
    assert sum(parts).item() == pytest.approx(kd_loss(s[one], t[one], 4.0).item())


@pytest.mark.parametrize("top", [0, 1, 3])
def test_precision_and_masked_classes(top):
    for t in (normal(5, 5, seed=1), masked(5, 5, classes=[(0, 1), (1, 1), (2, 0), (2, 1), (2, 3), (2, 4)], seed=1)):
        for part in (0, 1):
            check_precision(
                lambda s, t, part=part: decoupled_losses(s, t, TARGET, 4.0, top, True)[part], normal(5, 5), t
            )


@pytest.mark.parametrize("lead", [200.0, 1e4])
@pytest.mark.parametrize("top", [0, 1, 2, 3])
def test_far_logits(lead, top):
    y = torch.tensor([0, 1])
    ahead = lead * torch.tensor([[1.0, 0, -1, 0], [0, 0, 1, 0]])
    for s, t in ((ahead, -ahead), (-ahead, ahead), (ahead, 0 * ahead), (0 * ahead, ahead), (0 * ahead, 0 * ahead)):
        s = s.clone().requires_grad_()
        total = sum(decoupled_losses(s, t, y, 1.0, top, True))
        (grad,) = torch.autograd.grad(total, s)
        assert total.isfinite() and total >= 0 and grad.isfinite().all()


def test_two_classes_and_a_batch_of_one():
    s, t = torch.tensor([[1.0, -1.0]], requires_grad=True), torch.tensor([[0.5, 2.0]])
    for top in (0, 1, 2):
        tckd, nckd = decoupled_losses(s, t, torch.tensor([0]), 2.0, top, True)
        assert nckd.item() == 0 and tckd.item() == pytest.approx(kd_loss(s, t, 2.0).item())
        assert torch.autograd.grad(tckd + nckd, s)[0].isfinite().all()


def build(method, section, **options):
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    cfg = CN({section: method_defaults[section].clone()})
    cfg.merge_from_list([x for option in options.items() for x in option])
    return method(*nets, cfg).train()


BATCH = {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "target": torch.arange(4)}


def test_dkd_weighs_both_parts_and_warms_both_up():
    method = build(DKD, "DKD", **{"DKD.CE_WEIGHT": 0.5, "DKD.ALPHA": 2.0, "DKD.BETA": 3.0})
    _, usual = method(**BATCH, epoch=5)
    method.decouple(0)
    _, parts = method(**BATCH, epoch=5)
    assert list(parts) == ["loss_task", "loss_tckd", "loss_nckd"]
    assert parts["loss_task"].item() == pytest.approx(usual["loss_ce"].item())
    assert (parts["loss_tckd"] + parts["loss_nckd"]).item() == pytest.approx(usual["loss_kd"].item(), rel=1e-5)
    _, late = method(**BATCH, epoch=torch.tensor(20))  # as a compiled step has it
    assert late["loss_tckd"].item() == pytest.approx(4 * parts["loss_tckd"].item(), rel=1e-5)


def test_kd_does_not_weigh_its_parts():
    method = build(KD, "KD", **{"KD.LOSS.CE_WEIGHT": 0.5, "KD.LOSS.KD_WEIGHT": 0.25})
    method.decouple(3)
    logits, parts = method(**BATCH, epoch=1)
    with torch.no_grad():
        taught, _ = method.teacher(BATCH["image"])
    expected = decoupled_losses(logits, taught, BATCH["target"], 4, 3, by_doubt=True)
    found = [parts[name].item() for name in ("loss_tckd", "loss_nckd")]
    assert found == pytest.approx([x.item() for x in expected], rel=1e-5)
    assert parts["loss_task"].item() == pytest.approx(0.5 * method.cross_entropy(logits, BATCH["target"]).item())


def test_standardised_logits():
    s, t = 2 * normal(5, 5), 3 * normal(5, 5, seed=1)
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True)) for z in (s, t))
    one = decoupled_losses(s, t, TARGET, 2.0, 3, True, logit_stand=True)
    other = decoupled_losses(z_s, z_t, TARGET, 2.0, 3, True)
    assert [x.item() for x in one] == pytest.approx([x.item() for x in other])


def test_a_class_of_ones_own_forward_train_cannot_be_decoupled():
    class Own(KD):
        def forward_train(self, image, target, **kwargs):
            return super().forward_train(image, target, **kwargs)

    class Same(KD):
        pass

    assert KD.decouples and DKD.decouples and Same.decouples and not Own.decouples
