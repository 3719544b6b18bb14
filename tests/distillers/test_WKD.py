"""WKD against its definition: Sinkhorn on one image in NumPy, Gaussians part by part; which parts run, and when."""

import json
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import WKD, method_defaults
from mdistiller.distillers.WKD import classifier_distances, gaussian_loss, sharpened, target_loss, transport_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_agrees, check_precision, masked, normal

CLASSES = 10


def naive_transport(s, t, label, distances, temperature, smoothing, iterations):
    """One image, in NumPy, with the label's row and column deleted."""
    others = [c for c in range(len(s)) if c != label]
    p_s, p_t = (np.exp(z[others] / temperature - max(z[others] / temperature)) for z in (s, t))
    p_s, p_t = p_s / p_s.sum(), p_t / p_t.sum()
    cost = np.maximum(distances[np.ix_(others, others)], 0) + 1e-8
    kernel = np.exp(-cost / smoothing)
    u = np.ones(len(others)) / len(others)
    for _ in range(iterations):
        v = p_t / (kernel.T @ u + 1e-8)
        u = p_s / (kernel @ v + 1e-8)
    return float((u[:, None] * kernel * v[None] * cost).sum())


def naive_transport_loss(logits_student, logits_teacher, target, distances, *rest):
    images = zip(logits_student.detach().numpy(), logits_teacher.numpy(), target.tolist())
    return float(np.mean([naive_transport(s, t, label, distances.numpy(), *rest) for s, t, label in images]))


def naive_gaussian_loss(feat_student, feat_teacher, ratio, grid, eps=1e-5):
    batch, channels, height, width = feat_student.shape
    total = feat_student.new_zeros(())
    for i in range(batch):
        for c in range(channels):
            for row in range(grid):
                for column in range(grid):
                    part = [
                        (y, x)
                        for y in range(height)
                        for x in range(width)
                        if y * grid // height == row and x * grid // width == column
                    ]
                    moments = []
                    for feat in (feat_student, feat_teacher):
                        values = torch.stack([feat[i, c, y, x] for y, x in part])
                        var = values.var() if len(part) > 1 else values.new_zeros(())
                        moments.append((values.mean(), (var + eps).sqrt()))
                    (m_s, d_s), (m_t, d_t) = moments
                    total = total + ratio * (m_s - m_t) ** 2 + (d_s - d_t) ** 2
    return total / (batch * grid**2)


def distances(classes, seed=6, sharpen=1.0):
    return sharpened(classifier_distances(normal(classes, 16, seed=seed)), sharpen)


@pytest.mark.parametrize("row", tensor_rows.rows("WKD_L"))
def test_rows_of_predictions(row):
    opts, seed = row["opts"], row["seed"]
    s, t, y = tensor_rows.student_logits(seed), tensor_rows.teacher_logits(seed), tensor_rows.labels(seed)
    cost = sharpened(classifier_distances(tensor_rows.normal(seed + 6, (100, 64)).detach()), opts["SHARPEN"])
    rest = y, cost, opts["T"], opts["LAMBDA"], opts["ITER"]
    loss = lambda: target_loss(s, t, y) + opts["WEIGHT"] * transport_loss(s, t, *rest)  # noqa: E731
    tensor_rows.check(row, loss, student=s)


@pytest.mark.parametrize("row", tensor_rows.rows("WKD_F"))
def test_rows_of_maps(row):
    opts, seed, shape = row["opts"], row["seed"], (8, 32, 8, 8)
    s, t = tensor_rows.normal(seed + 4, shape), tensor_rows.normal(seed + 5, shape).detach()
    rest = opts["MEAN_COV_RATIO"], opts["SPATIAL_GRID"], opts["EPS"]
    tensor_rows.check(row, lambda: gaussian_loss(s, t, *rest), student=s)


@pytest.mark.parametrize(
    "batch, classes, temperature, smoothing, iterations",
    [(1, 2, 4.0, 0.05, 10), (3, 3, 1.0, 0.05, 10), (4, 10, 8.0, 0.05, 3), (2, 30, 2.0, 0.5, 1), (2, 9, 1.0, 1e-3, 10)],
)
def test_transport_agrees_with_the_naive_form(batch, classes, temperature, smoothing, iterations):
    s, t = 2 * normal(batch, classes), 3 * normal(batch, classes, seed=1)
    rest = torch.arange(batch) * 7 % classes, distances(classes), temperature, smoothing, iterations
    assert transport_loss(s, t, *rest).item() == pytest.approx(naive_transport_loss(s, t, *rest), rel=1e-10)


def test_costs_may_differ_by_direction():
    """D_ij is the cost from the student's class i to the teacher's class j."""
    s, t, y = normal(2, 5), normal(2, 5, seed=1), torch.tensor([4, 4])
    cost = normal(5, 5, seed=2).abs()
    rest = 1.0, 0.5, 4
    assert transport_loss(s, t, y, cost, *rest).item() == pytest.approx(
        naive_transport_loss(s, t, y, cost, *rest), rel=1e-10
    )
    assert transport_loss(s, t, y, cost.T, *rest).item() != pytest.approx(
        transport_loss(s, t, y, cost, *rest).item(), rel=1e-2
    )


def test_transport_by_hand():
    # The label is 2. The student is sure of class 0, the teacher of class 1, at distance 1: all mass moves.
    s, t = torch.tensor([[1e4, 0.0, 0.0]]).double(), torch.tensor([[0.0, 1e4, 0.0]]).double()
    cost = torch.ones(3, 3).double() - torch.eye(3).double()
    y = torch.tensor([2])
    kernel = math.exp(-1 / 1.0)
    v = 1 / (kernel / 2 + kernel**0 * 0 + 1 / 2 + 1e-8)  # K' u at the teacher's class: (K_01 + K_11) / 2
    u = 1 / (kernel * v + 1e-8)
    expected = u * kernel * v
    assert transport_loss(s, t, y, cost, 1.0, 1.0, 1).item() == pytest.approx(expected, rel=1e-6)
    assert transport_loss(s, t, y, cost, 1.0, 1.0, 10).item() == pytest.approx(1.0, rel=1e-6)
    assert transport_loss(s, s, y, cost, 1.0, 0.05, 10).item() == pytest.approx(1e-8, rel=1e-3)


def test_target_by_hand():
    s, t = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert target_loss(s, t, torch.tensor([0])).item() == pytest.approx(0.5 * math.log(4), rel=1e-12)
    never = torch.tensor([[-math.inf, 0.0]])
    assert target_loss(never, never, torch.tensor([0])).item() == 0


def test_gradients_and_precision_of_predictions():
    s, t, y = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_(), torch.tensor([4, 0, 2])

    def loss(s, t):
        return target_loss(s, t, y) + 20 * transport_loss(s, t, y, distances(5).to(s.dtype), 2.0, 0.2, 10)

    assert gradcheck(loss, (s, t))
    check_precision(
        lambda s, t: loss(*(z.float() if z.dtype == torch.bfloat16 else z for z in (s, t))), s.detach(), t.detach()
    )


@pytest.mark.parametrize("classes", [2, 3, 50])
@pytest.mark.parametrize("lead", [0.0, 200.0, 1e4])
def test_finite_for_a_large_logit(lead, classes):
    s = torch.zeros(1, classes)
    s[:, 0] = lead
    for label in (0, 1):
        for student, teacher in ((s, s.flip(1)), (s.flip(1), s), (s, 0 * s), (0 * s, s)):
            student, y = student.clone().requires_grad_(), torch.tensor([label])
            loss = target_loss(student, teacher, y) + 200 * transport_loss(
                student, teacher, y, distances(classes).float(), 1.0, 0.05, 10
            )
            loss.backward()
            assert loss.isfinite() and student.grad.isfinite().all()


def test_masked_classes():
    s, y = normal(3, 5), torch.tensor([0, 1, 2])
    t = masked(3, 5, classes=[(0, 1), (0, 3), (1, 1), (2, 0), (2, 1), (2, 3), (2, 4)], seed=1)
    rest = distances(5), 2.0, 0.05, 10
    own = [transport_loss(s[i : i + 1], t[i : i + 1], y[i : i + 1], *rest).item() for i in range(3)]
    assert own[0] == pytest.approx(naive_transport_loss(s[:1], t[:1], y[:1], *rest), rel=1e-10)
    assert own[2] == 0  # the teacher leaves no other class
    s.requires_grad_()
    loss = target_loss(s, t, y) + transport_loss(s, t, y, *rest)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize(
    "shape, grid", [((1, 1, 1, 1), 1), ((2, 3, 4, 4), 1), ((2, 3, 4, 4), 2), ((1, 2, 5, 3), 2), ((1, 2, 2, 2), 2)]
)
def test_gaussians_agree_with_the_naive_form(shape, grid):
    rest = 4.0, grid
    check_agrees(
        lambda s, t: gaussian_loss(s, t, *rest), lambda s, t: naive_gaussian_loss(s, t, *rest),
        normal(*shape), 3 * normal(*shape, seed=1),
    )  # fmt: skip


def test_gaussians_by_hand():
    s = torch.tensor([[[[0.0, 2.0]]]]).double()  # mean 1, variance 2
    t = torch.tensor([[[[1.0, 5.0]]]]).double()  # mean 3, variance 8
    assert gaussian_loss(s, t, 4.0, 1, 0.0).item() == pytest.approx(4 * 4 + 2, rel=1e-12)
    assert gaussian_loss(s, t, 1.0, 4, 0.0).item() == pytest.approx((1 + 9) / 2, rel=1e-12)  # two parts of one position
    assert gaussian_loss(s, s, 4.0).item() == 0


def test_gradients_and_precision_of_maps():
    s, t = normal(2, 2, 3, 3).requires_grad_(), normal(2, 2, 3, 3, seed=1).requires_grad_()
    for grid in (1, 2):
        assert gradcheck(lambda s, t, grid=grid: gaussian_loss(s, t, 4.0, grid), (s, t))
        check_precision(lambda s, t, grid=grid: gaussian_loss(s, t, 4.0, grid), s.detach(), t.detach())
    flat = torch.zeros(1, 2, 3, 3, requires_grad=True)  # a constant map has a gradient too
    loss = gaussian_loss(flat, torch.full((1, 2, 3, 3), 1e4), 4.0)
    loss.backward()
    assert loss.isfinite() and flat.grad.isfinite().all()


def build(*settings, epochs=240, student="resnet8", teacher="resnet14", seed=0):
    torch.manual_seed(seed)
    networks = [cifar_model_dict[name][0](num_classes=CLASSES) for name in (student, teacher)]
    cfg = CN({"WKD": method_defaults["WKD"].clone(), "DISTILLER": CN({"PAIRS": []})})
    cfg.merge_from_list(list(settings))
    return WKD(*networks, cfg, image_size=32, epochs=epochs).train()


def batch(epoch=5):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(4, 3, 32, 32, generator=generator),
        "target": torch.tensor([3, 4, 0, 9]),
        "epoch": epoch,
    }


LOGIT, FEAT = ("WKD.LOSS.WKD_LOGIT_WEIGHT", 200.0), ("WKD.LOSS.WKD_FEAT_WEIGHT", 0.08)


@pytest.mark.parametrize("settings, outputs", [
    (LOGIT, ("logits",)), (FEAT, ("feats[-1]",)), ((*LOGIT, *FEAT), ("logits", "feats[-1]")),
])  # fmt: skip
def test_only_the_weighted_parts_run(settings, outputs):
    method = build(*settings)
    assert method.frozen["teacher"] == outputs
    own = {key for key in method.state_dict() if not key.startswith(("student.", "teacher."))}
    assert ("conv_reg.conv.weight" in own) == (settings != LOGIT) and (method.get_extra_parameters() > 0) == bool(own)
    _, losses = method(**batch())
    with torch.no_grad():
        (z_s, f_s), (z_t, f_t) = method.student(batch()["image"]), method.teacher(batch()["image"])
        expected, y = 0.0, batch()["target"]
        if "logits" in outputs:
            rest = sharpened(classifier_distances(method.teacher.fc.weight), 1.0), 8.0, 0.05, 10
            expected += target_loss(z_s, z_t, y).item() + 200 * transport_loss(z_s, z_t, y, *rest).item()
        if "feats[-1]" in outputs:
            expected += 0.08 * gaussian_loss(method.conv_reg(f_s["feats"][-1]), f_t["feats"][-1], 4.0).item()
    assert losses["loss_kd"].item() == pytest.approx(expected, rel=1e-4)
    assert method.label_weights(CN({"WKD": method.own})) == (None if settings != FEAT else ("WKD.LOSS.CE_WEIGHT",))


@pytest.mark.parametrize(
    "epoch, factor", [(1, 1), (150, 1), (195, 0.5), (240, 0), (165, (1 + math.cos(math.pi / 6)) / 2)]
)
def test_both_weights_fall_by_a_cosine_and_the_target_term_stays(epoch, factor):
    for settings in (LOGIT, FEAT):
        method = build(*settings).double()
        fields = batch() | {"image": batch()["image"].double()}
        with torch.no_grad():
            z_s, z_t = method.student(fields["image"])[0], method.teacher(fields["image"])[0]
        rest = target_loss(z_s, z_t, fields["target"]).item() if settings is LOGIT else 0.0
        full, own, traced = (
            method(**fields | {"epoch": e})[1]["loss_kd"].item() for e in (1, epoch, torch.tensor(epoch))
        )
        assert own == pytest.approx(rest + factor * (full - rest), rel=1e-9, abs=1e-12)
        assert traced == pytest.approx(own, rel=1e-5, abs=1e-6)


def test_a_run_that_ends_before_the_fall_keeps_its_weights():
    assert build(*FEAT, epochs=100)(**batch(100))[1]["loss_kd"].item() == build(*FEAT)(**batch(1))[1]["loss_kd"].item()


def test_the_distances_are_those_of_the_teacher_as_it_is_now():
    method = build(*LOGIT)
    before = method.distances()
    method.teacher.load_state_dict(build(*LOGIT, seed=5).teacher.state_dict())
    assert not method.distances().equal(before)
    assert not any("_classifier" in key for key in method.state_dict())


@pytest.mark.parametrize("name", ["costs.npy", "costs.json", "bare.json"])
def test_distances_from_a_file(tmp_path, name):
    costs = np.abs(np.random.RandomState(0).standard_normal((CLASSES, CLASSES)))
    if name == "costs.npy":
        np.save(tmp_path / name, costs)
    else:
        content = {"distances": costs.tolist()} if name == "costs.json" else costs.tolist()
        (tmp_path / name).write_text(json.dumps(content))
    method = build(*LOGIT, "WKD.COST_MATRIX", str(tmp_path / name), "WKD.COST_MATRIX_SHARPEN", 2.0)
    np.testing.assert_allclose(method.distances().numpy(), 1 - np.exp(-2 * costs), rtol=1e-5, atol=1e-6)
    assert method.state_dict().keys() == build(*LOGIT).state_dict().keys()
    assert method(**batch())[1]["loss_kd"].item() != build(*LOGIT)(**batch())[1]["loss_kd"].item()


def test_refused_files(tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((3, 4)))
    np.save(tmp_path / "nan.npy", np.full((3, 3), np.nan))
    np.save(tmp_path / "few.npy", np.ones((3, 3)))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "ragged.json").write_text("[[0, 1], [1]]")
    for name, why in {
        "cka": 'must be "fc", or a file', "none.npy": "no file", "wide.npy": r"\(C, C\).*\(3, 4\)", "nan.npy": "NaN",
        "torn.npy": "no .npy file", "ragged.json": "something else",
    }.items():  # fmt: skip
        source = name if name == "cka" else str(tmp_path / name)
        with pytest.raises(UserError, match=f"WKD.COST_MATRIX.*{why}") as error:
            build(*LOGIT, "WKD.COST_MATRIX", source)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="distances of 3 classes, the networks have 10"):
        build(*LOGIT, "WKD.COST_MATRIX", str(tmp_path / "few.npy"))(**batch())


def test_chosen_maps():
    method = build(*FEAT, "DISTILLER.PAIRS", [[1, 2]])
    assert (method.layer_s, method.layer_t) == (1, 2) and method.frozen["teacher"] == ("feats[2]",)
    assert method(**batch())[1]["loss_kd"].isfinite()
    with pytest.raises(UserError, match=r"DISTILLER\.PAIRS is for WKD-F"):
        build(*LOGIT, "DISTILLER.PAIRS", [[1, 2]])
    with pytest.raises(UserError, match=r"WKD\.HINT_LAYER is 9"):
        build(*FEAT, "WKD.HINT_LAYER", 9)


def test_without_weights_only_the_target_term_remains(caplog):
    method = build()
    assert "WKD.LOSS.WKD_LOGIT_WEIGHT, such as to 200" in caplog.text
    with torch.no_grad():
        z_s, z_t = method.student(batch()["image"])[0], method.teacher(batch()["image"])[0]
    expected = target_loss(z_s, z_t, batch()["target"]).item()
    assert method(**batch())[1]["loss_kd"].item() == pytest.approx(expected, rel=1e-5)


def test_refused_logits():
    with pytest.raises(ValueError, match="two classes or more, the logits have 1"):
        transport_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0]), torch.zeros(1, 1), 1.0, 0.05, 10)
    with pytest.raises(ValueError, match="differ in shape"):
        gaussian_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4), 4.0)
