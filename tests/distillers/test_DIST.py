"""DIST against its equations, over rows and over columns."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import DIST, method_defaults
from mdistiller.distillers.DIST import dist_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .extremes import check_extremes, log_softmax
from .tensor_rows import check, rows, student_logits, teacher_logits


def correlation(a, b):
    """Of two lists of tensors ()."""
    a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
    squares = [sum(x * x for x in v) for v in (a, b)]
    norms = [s.sqrt() if s > 0 else 0 * s for s in squares]
    return sum(x * y for x, y in zip(a, b)) / (norms[0] * norms[1] + 1e-8)


def naive_dist_loss(logits_student, logits_teacher, tau, beta=1.0, gamma=1.0):
    p_s, p_t = (
        [[log_p.exp() for log_p in log_softmax([z / tau for z in row])] for row in logits]
        for logits in (logits_student, logits_teacher)
    )
    inter = [correlation(a, b) for a, b in zip(p_s, p_t)]
    intra = [correlation(a, b) for a, b in zip(zip(*p_s), zip(*p_t))]
    return tau**2 * (beta * (1 - sum(inter) / len(inter)) + gamma * (1 - sum(intra) / len(intra)))


OPTIONS = [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5), (2, 1, 0), (0.7, 0, 1)]


@pytest.mark.parametrize("batch, classes", [(1, 2), (2, 3), (5, 20)])
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_the_naive_form(batch, classes, options):
    logits = normal(batch, classes), 3 * normal(batch, classes, seed=1)
    check_agrees(lambda s, t: dist_loss(s, t, *options), lambda s, t: naive_dist_loss(s, t, *options), *logits)


def test_by_hand():
    # Student (5, 3, 2) / 10 and (2, 3, 5) / 10; teacher (6, 3, 1) / 10 and (3, 6, 1) / 10.
    p_s = torch.tensor([[5.0, 3, 2], [2, 3, 5]], dtype=torch.float64) / 10
    p_t = torch.tensor([[6.0, 3, 1], [3, 6, 1]], dtype=torch.float64) / 10
    # Rows less 10/3, times 3: (5, -1, -4) with (8, -1, -7), and (-4, -1, 5) with (-1, 8, -7).
    of_rows = (40 + 1 + 28) / math.sqrt(42 * 114), (4 - 8 - 35) / math.sqrt(42 * 114)
    # Columns: both fall; the student's is constant; the teacher's is constant.
    of_columns = 1, 0, 0
    inter, intra = 1 - sum(of_rows) / 2, 1 - sum(of_columns) / 3
    assert dist_loss(p_s.log(), p_t.log(), 1, 1, 0).item() == pytest.approx(inter, rel=1e-6)
    assert dist_loss(p_s.log(), p_t.log(), 1, 0, 1).item() == pytest.approx(intra, rel=1e-6)
    both = dist_loss(2 * p_s.log(), 2 * p_t.log(), 2, 3, 5).item()
    assert both == pytest.approx(4 * (3 * inter + 5 * intra), rel=1e-6)
    # Correlations do not change with a factor and a constant.
    assert dist_loss(((p_t + 1) / 4).log(), p_t.log(), 1, 1, 0).item() == pytest.approx(0, abs=1e-6)


def test_one_image_has_no_relation_between_images():
    s, t = normal(1, 5).requires_grad_(), normal(1, 5, seed=1)
    loss = dist_loss(s, t, 1.0, 0.0, 1.0)
    loss.backward()
    assert loss.item() == 1 and s.grad.eq(0).all()


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_extremes(options):
    check_extremes(lambda s, t, y: dist_loss(s, t, *options), lambda s, t, y: naive_dist_loss(s, t, *options))


def test_float32_of_almost_certain_predictions():
    """The columns of float32 differences would be lost: p is 1 - 1e-9."""
    s, t = (20 * torch.eye(6, dtype=torch.float32) + normal(6, 6, seed=i).float() for i in range(2))
    assert dist_loss(s, t, 1.0).item() == pytest.approx(naive_dist_loss(s.double(), t.double(), 1.0).item(), rel=1e-6)


def test_gradients_and_precision():
    s, t = normal(4, 5), normal(4, 5, seed=1)
    check_precision(lambda s, t: dist_loss(s, t, 4.0), s, t)
    assert gradcheck(lambda s, t: dist_loss(s, t, 4.0), (s.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize("row", rows("DIST"))
def test_pinned_rows(row):
    student, options = student_logits(row["seed"]), [row["opts"][key] for key in ("TAU", "BETA", "GAMMA")]
    check(row, lambda: dist_loss(student, teacher_logits(row["seed"]), *options), student=student)


def test_it_compares_the_whole_batch(monkeypatch):
    """`tests/distributed/test_steps.py` trains it on two ranks."""
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    method = DIST(*nets, CN({"DIST": method_defaults["DIST"].clone()})).eval()
    assert method.compares_images
    image, target, gathered = torch.randn(3, 3, 32, 32), torch.tensor([3, 4, 5]), []
    monkeypatch.setitem(DIST.logit_loss.__globals__, "gather_batch", lambda x: gathered.append(x) or x)
    logits, losses = method.forward_train(image=image, target=target)
    taught = method.teacher_forward(image)[0]
    assert len(gathered) == 2 and gathered[0] is logits and torch.equal(gathered[1], taught)
    assert losses["loss_kd"].item() == pytest.approx(2 * dist_loss(logits, taught, 4.0).item())


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        dist_loss(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="positive, it is 0"):
        dist_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
