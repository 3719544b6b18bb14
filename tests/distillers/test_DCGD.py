"""DCGD: pinned rows, the formula by hand, and any method as its base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from yacs.config import CfgNode as CN

from mdistiller.distillers import DCGD, DCGD_CE, DCGD_KD, Distiller, RunFacts, distiller_dict, method_defaults
from mdistiller.distillers.KD import kd_loss
from mdistiller.errors import UserError
from mdistiller.models import GroupedStudent, build_model, cifar_model_dict

from .. import _golden

GROUPS = [[1, 3], [0, 2]]
FACTS = RunFacts(num_data=8, num_classes=4, class_names=None, image_size=32, epochs=2, mean=None, std=None)


def config(**options: Any) -> CN:
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.EXPERIMENT = CN({"LOGIT_STAND": False})
    cfg.merge_from_list([x for key, value in options.items() for x in (key.replace("__", "."), value)])
    return cfg


def network(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(cifar_model_dict, name, 4).double()


@pytest.fixture
def groups_file(tmp_path) -> str:
    path = tmp_path / "groups.json"
    path.write_text(str(GROUPS))
    return str(path)


def small(method: str, groups_file: str, **options: Any) -> Distiller:
    """resnet8 grouped in two, taught by wrn_16_1."""
    student = GroupedStudent(network("resnet8"), GROUPS).double()
    cfg = config(DCGD__GROUPS=groups_file, **options)
    return distiller_dict[method].from_run(student, network("wrn_16_1", 1), cfg, FACTS).double().train()


def batch() -> dict[str, Any]:
    return {
        **{name: _golden.images(seed, 3, 32) for seed, name in enumerate(("image", "image_weak", "image_strong"))},
        "target": torch.tensor([0, 3, 1]),
        "index": torch.arange(3),
        "contrastive_index": torch.arange(15).reshape(3, 5) % 8,
        "epoch": 5,
    }


@pytest.mark.parametrize("row", _golden.load("dcgd"), ids=lambda row: row["student"])
@pytest.mark.parametrize("mode", ["loop", "together"])
def test_pinned_row(row, mode):
    """Relative tolerance 1e-6 in float64; both branch modes."""
    student, teacher = (build_model(cifar_model_dict, row[name], 100) for name in ("student", "teacher"))
    assert student.groups == list(row["groups"].values())
    assert sum(p.numel() for p in student.parameters()) == row["n_params"]
    _golden.fill(student, "student.")
    _golden.fill(teacher, "teacher.")
    cfg = config(DCGD__BRANCHES=mode, **{key.replace(".", "__"): value for key, value in row["opts"].items()})
    distiller = distiller_dict["DCGD_DKD"](student, teacher, cfg).double()

    seed = row["seed"]
    image, target = _golden.images(seed + 1, 8, 32), _golden.labels(seed + 2, 8)
    distiller.eval()
    with torch.no_grad():
        logits = distiller(image=image[:2])
    torch.testing.assert_close(logits, torch.tensor(row["test_logits"], dtype=torch.float64), rtol=1e-6, atol=1e-9)

    distiller.train()
    logits, losses = distiller(image=image, target=target, epoch=row["epoch"])
    terms = {k: v.item() for k, v in losses.items()}
    terms["loss_multi_kd"] += terms.pop("loss_multi_ce")  # one term in the original
    assert terms == pytest.approx(row["losses"], rel=1e-6)
    sum(losses.values()).backward()
    used = {name for name, p in student.named_parameters() if p.grad is not None}
    assert used == set(row["params_used"])
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm().item()
    assert norm == pytest.approx(row["student_grad_norm"], rel=1e-6)


def test_losses_agree_with_the_formula(groups_file):
    distiller = small("DCGD_KD", groups_file, DCGD__TEMPERATURE=5.0, DCGD__LOSS__CE_WEIGHT=0.7)
    distiller.method.kd_loss_weight = 2.0
    fields = batch()
    reference = copy.deepcopy(distiller)
    logits, losses = distiller(**fields)
    with torch.no_grad():
        grouped, features = reference.student(fields["image"])
        z_teacher = reference.teacher(fields["image"])[0]
    single, target = features["logits_single"], fields["target"]
    assert torch.equal(logits, single)

    def kl(z: torch.Tensor, t: float) -> float:
        total = 0.0
        for row, row_teacher in zip(z / t, z_teacher / t):
            p, q = row_teacher.softmax(0), row.softmax(0)
            total += sum(float(p[c] * (p[c] / q[c]).log()) for c in range(4))
        return total / len(z) * t * t

    expected = {
        "loss_ce": 0.1 * float(F.cross_entropy(single, target)),
        "loss_kd": 2.0 * kl(single, 4.0),
        "loss_multi_kd": kl(grouped, 5.0),
        "loss_multi_ce": 0.7 * float(F.cross_entropy(grouped, target)),
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-10)


def test_the_stand_alone_form_gives_both_heads_the_same_loss(groups_file):
    """KD at T = 20 with weights 1.0 and 0.3: what configs/cifar100/kd/dcgd_kd_r56_r20.yaml sets."""
    options = {"KD__TEMPERATURE": 20, "KD__LOSS__KD_WEIGHT": 1.0, "KD__LOSS__CE_WEIGHT": 0.3}
    distiller = small("DCGD_KD", groups_file, **options)
    fields = batch()
    z_teacher = distiller.teacher(fields["image"])[0]
    single, losses = distiller(**fields)
    plain = kd_loss(single, z_teacher, 20.0) + 0.3 * F.cross_entropy(single, fields["target"])
    assert (losses["loss_ce"] + losses["loss_kd"]).item() == pytest.approx(plain.item(), rel=1e-12)


def test_cross_entropy_alone(groups_file):
    distiller = small("DCGD_CE", groups_file)
    logits, losses = distiller(**batch())
    assert set(losses) == {"ce", "loss_multi_kd", "loss_multi_ce"}
    assert losses["ce"].item() == F.cross_entropy(logits, batch()["target"]).item()


def bases() -> list[str]:
    return [name for name, cls in distiller_dict.items() if not issubclass(cls, DCGD)]


@pytest.mark.parametrize("base", bases())
def test_any_method_is_a_base_by_configuration_alone(base, groups_file):
    """Its losses and gradients on the plain network are the same as without the branches."""
    options = {"CRD__NCE__K": 4, "CRD__FEAT__STUDENT_DIM": 64, "CRD__FEAT__TEACHER_DIM": 64} if base == "CRD" else {}
    torch.manual_seed(0)
    student, teacher = GroupedStudent(network("resnet8"), GROUPS).double(), network("resnet14", 1)
    cfg = config(DCGD__BASE=base, **options)
    if base == "REVIEWKD":
        cfg.REVIEWKD.SHAPES = cfg.REVIEWKD.OUT_SHAPES = [1, 8, 16, 32]
        cfg.REVIEWKD.IN_CHANNELS = cfg.REVIEWKD.OUT_CHANNELS = [16, 32, 64, 64]
    try:
        torch.manual_seed(1)
        method = distiller_dict[base].from_run(copy.deepcopy(student.base), copy.deepcopy(teacher), cfg, FACTS)
    except ValueError as error:
        pytest.skip(f"{base} does not accept this pair: {error}")
    if method.main_network() is not method.student:
        with pytest.raises(UserError, match="deploys"):
            DCGD.from_run(student, teacher, cfg, FACTS)
        return
    torch.manual_seed(1)
    distiller = DCGD.from_run(student, teacher, cfg, FACTS)
    assert DCGD.facts_needed(cfg) == set(method.needs_run)
    assert distiller.get_extra_parameters() == method.get_extra_parameters()
    assert distiller.needs_batch == method.needs_batch

    method.double().train()
    distiller.double().train()
    assert distiller.teacher.training == method.teacher.training
    torch.manual_seed(2)
    expected_logits, expected = method(**batch())
    torch.manual_seed(2)
    logits, losses = distiller(**batch())
    assert torch.equal(logits, expected_logits)
    assert set(losses) == {*expected, "loss_multi_kd", "loss_multi_ce"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=1e-12)
    for name, buffer in method.named_buffers():  # also what `after_step` changes
        if not name.startswith(("student.", "teacher.")):
            torch.testing.assert_close(distiller.method.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)

    # Each learnable parameter once, and each of the distiller's trainable parameters among them.
    learnable = distiller.get_learnable_parameters()
    assert len(learnable) == len({id(p) for p in learnable})
    method_count = len(method.get_learnable_parameters())
    assert len(learnable) == method_count + len([*student.branches.parameters(), *student.heads.parameters()])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def standardizing() -> list[str]:
    return [name for name in bases() if distiller_dict[name].standardizes_logits]


@pytest.mark.parametrize("base", standardizing())
def test_logit_standardisation_reaches_the_base_method_and_the_branches(base, groups_file):
    """EXPERIMENT.LOGIT_STAND; the losses of the base method alone, at a second temperature for the branches."""
    options = {"DCGD__BASE": base, "DCGD__TEMPERATURE": 5.0}
    standardized = small("DCGD", groups_file, EXPERIMENT__LOGIT_STAND=True, **options)
    raw = small("DCGD", groups_file, **options)
    cfg = config(EXPERIMENT__LOGIT_STAND=True)
    nets = copy.deepcopy(standardized.student.base), copy.deepcopy(standardized.teacher)
    alone = distiller_dict[base].from_run(*nets, cfg, FACTS).double().train()
    reference = copy.deepcopy(standardized)

    _, expected = alone(**batch())
    _, losses = standardized(**batch())
    assert set(losses) == {*expected, "loss_multi_kd", "loss_multi_ce"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=1e-12)
    _, without = raw(**batch())
    assert any(losses[name].item() != pytest.approx(without[name].item(), rel=1e-3) for name in expected)

    seen = batch()["image_weak" if "image_weak" in standardized.needs_batch else "image"]
    with torch.no_grad():
        grouped, taught = reference.student(seen)[0], reference.teacher(seen)[0]
    by_hand = kd_loss(grouped, taught, 5.0, logit_stand=True)
    assert losses["loss_multi_kd"].item() == pytest.approx(by_hand.item(), rel=1e-10)
    assert by_hand.item() != pytest.approx(kd_loss(grouped, taught, 5.0).item(), rel=1e-3)


@pytest.mark.parametrize("base", ["DIST", "NKD", "TTM", "WTTM", "RLD", "NormKD"])
def test_save_load_step_over_the_logit_methods(base, groups_file):
    first, second = (small("DCGD", groups_file, DCGD__BASE=base) for _ in range(2))
    second.load_state_dict(first.state_dict())
    states = []
    for distiller in (first, second):
        optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.1)
        sum(distiller(**batch())[1].values()).backward()
        optimizer.step()
        states.append(distiller.state_dict())
    assert not any(key.startswith("method.") for key in states[0])  # they have no parameters of their own
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_normkd_over_dkd_is_a_base(groups_file):
    distiller = small("DCGD", groups_file, DCGD__BASE="NormKD", NormKD__DKD=True)
    assert distiller.reads_labels and DCGD.label_weights(config(DCGD__BASE="NormKD", NormKD__DKD=True)) is None
    weights = ("NormKD.LOSS.CE_WEIGHT", "DCGD.LOSS.CE_WEIGHT")
    assert DCGD.label_weights(config(DCGD__BASE="NormKD")) == weights


def test_the_branches_see_the_weak_view_of_a_base_method_of_two(groups_file):
    class Views(Distiller):
        needs_batch = ("image_weak", "image_strong")

        def forward_train(self, image_weak, image_strong, target, **kwargs):
            logits, strong = self.student(image_weak)[0], self.student(image_strong)[0]
            taught = self.teacher_forward(image_weak)[0]
            return logits, {"loss_kd": (logits - taught).square().mean() + (strong - taught).square().mean()}

        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)

    distiller_dict["VIEWS"] = Views
    try:
        distiller = small("DCGD", groups_file, DCGD__BASE="VIEWS")
    finally:
        del distiller_dict["VIEWS"]
    reference, calls = copy.deepcopy(distiller), []
    distiller.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    distiller.student.base.layer1.register_forward_hook(lambda *_: calls.append("trunk"))
    fields = batch()
    _, losses = distiller(**fields)
    assert sorted(calls) == ["teacher", "trunk", "trunk"]  # none for the branches
    with torch.no_grad():
        weak = fields["image_weak"]
        grouped, taught = reference.student(weak)[0], reference.teacher(weak)[0]
    assert losses["loss_multi_kd"].item() == pytest.approx(kd_loss(grouped, taught, 20.0).item(), rel=1e-10)


def test_trunk_and_teacher_run_once(groups_file):
    distiller = small("DCGD_KD", groups_file)
    calls: list[str] = []
    distiller.teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    distiller.student.base.layer1.register_forward_hook(lambda *_: calls.append("trunk"))
    distiller(**batch())
    assert sorted(calls) == ["teacher", "trunk"]
    assert {int(v) for k, v in distiller.student.state_dict().items() if k.endswith("num_batches_tracked")} == {1}


def test_the_branches_learn_from_the_teacher_in_eval_mode(groups_file):
    """OFD keeps its teacher in training mode, whose logits depend on the other images of the batch."""
    distiller = small("DCGD", groups_file, DCGD__BASE="OFD")
    assert distiller.teacher.training
    fields, reference = batch(), copy.deepcopy(distiller)
    _, losses = distiller(**fields)
    with torch.no_grad():
        grouped = reference.student(fields["image"])[0]
        z_teacher = reference.teacher.eval()(fields["image"])[0]
    assert losses["loss_multi_kd"].item() == pytest.approx(kd_loss(grouped, z_teacher, 20.0).item(), rel=1e-10)
    assert distiller.teacher.training
    state = reference.teacher.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in distiller.teacher.state_dict().items())


def test_every_head_saves_the_whole_student(groups_file):
    distiller = small("DCGD_CE", groups_file, DCGD__EVAL_HEAD="mean")
    assert list(distiller.deployments()) == ["mean", "grouped", "single"]
    assert all(distiller.network_to_save(name) is distiller.student for name in distiller.deployments())
    assert distiller.main_network() is distiller.student


def test_needs_and_frozen_networks_of_the_base_method_are_those_of_dcgd(groups_file):
    class Assisted(Distiller):
        needs_batch = ("index",)
        untrained = ("scale", "student.fc")

        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.add_frozen("assistant", network("resnet8", 3), ["logits"])
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward_train(self, image, target, **kwargs):
            logits, _ = self.student(image)
            return logits, {"loss_kd": (logits - self.frozen_forward("assistant", image)[0]).square().mean()}

    distiller_dict["ASSISTED"] = Assisted
    try:
        distiller = small("DCGD", groups_file, DCGD__BASE="ASSISTED")
    finally:
        del distiller_dict["ASSISTED"]
    assert distiller.needs_batch == ("index",) and distiller.untrained == ("method.scale", "student.base.fc")
    assert distiller.frozen == {"teacher": None, "method.assistant": ("logits",)}
    assert not distiller.train().method.assistant.training
    calls = []
    network_itself = distiller.method.assistant
    distiller.run_frozen_by("method.assistant", lambda image: calls.append(0) or network_itself(image))
    distiller(**batch())
    assert calls == [0]


def test_a_base_method_that_deploys_another_network_is_refused(groups_file):
    class Projected(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.deployed = torch.nn.Sequential(student)

        def deployments(self):
            return {"student": self.deployed}

    distiller_dict["PROJECTED"] = Projected
    try:
        with pytest.raises(UserError, match=r"DCGD.BASE: Projected deploys a Sequential, not its student"):
            small("DCGD", groups_file, DCGD__BASE="PROJECTED")
    finally:
        del distiller_dict["PROJECTED"]


def test_no_gradient_reaches_the_teacher_and_its_state_stays(groups_file):
    distiller = small("DCGD_DKD", groups_file)
    before = copy.deepcopy(distiller.teacher.state_dict())
    _, losses = distiller(**batch())
    sum(losses.values()).backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in distiller.teacher.state_dict().items())


def test_each_network_is_in_the_state_once(groups_file):
    keys = small("DCGD", groups_file, DCGD__BASE="FITNET").state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"student", "teacher", "method"}
    own = {key.split(".")[1] for key in keys if key.startswith("method.")}
    assert own
    assert own.isdisjoint({"student", "teacher"})


def test_save_load_step_is_bitwise_equal(groups_file):
    first = small("DCGD", groups_file, DCGD__BASE="FITNET")
    second = small("DCGD", groups_file, DCGD__BASE="FITNET")
    with torch.no_grad():
        for p in first.get_learnable_parameters():
            p.add_(0.01)
    second.load_state_dict(first.state_dict())
    for distiller in (first, second):
        optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.1)
        sum(distiller(**batch())[1].values()).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    ("head", "reported"),
    [("grouped", ["grouped", "single"]), ("single", ["single", "grouped"]), ("mean", ["mean", "grouped", "single"])],
)
def test_the_chosen_head_comes_first_and_both_are_reported(head, reported, groups_file):
    distiller = small("DCGD_CE", groups_file, DCGD__EVAL_HEAD=head).eval()
    image = batch()["image"]
    heads = distiller.forward_heads(image)
    assert list(heads) == reported
    assert torch.equal(distiller(image=image), heads[head])
    assert torch.equal(heads["single"], distiller.student.base(image)[0])
    assert torch.equal(heads["grouped"], distiller.student(image)[0])
    if head == "mean":
        assert torch.equal(heads["mean"], (heads["grouped"] + heads["single"]) / 2)


def test_deployments():
    student = build_model(cifar_model_dict, "res56_M_r20", 100)
    distiller = DCGD_CE(student, torch.nn.Identity(), config())
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in distiller.deployments().items()}
    assert sizes == {"grouped": 1_313_304, "single": 278_324}


def test_a_plain_student_is_grouped(groups_file):
    plain = network("resnet8")
    start = copy.deepcopy(plain.state_dict())
    distiller = DCGD_KD(plain, network("wrn_16_1"), config(DCGD__GROUPS=groups_file, DCGD__BRANCHES="together"))
    assert distiller.student.groups == GROUPS
    assert distiller.student.base is plain
    assert distiller.student.branch_mode == "together"
    assert all(torch.equal(v, start[k]) for k, v in plain.state_dict().items())


def test_bad_input_is_refused(groups_file, tmp_path):
    teacher = network("wrn_16_1")

    def build(student: str, **options: Any) -> Distiller:
        return DCGD(network(student) if "_M_" not in student else grouped, teacher, config(**options))

    grouped = GroupedStudent(network("resnet8"), [[0, 1], [2, 3]])
    with pytest.raises(UserError, match="needs groups"):
        build("resnet8")
    with pytest.raises(UserError, match="another data set"):
        build("resnet8", DCGD__GROUPS="res56")
    with pytest.raises(UserError, match="no last stage"):
        build("MobileNetV2", DCGD__GROUPS=groups_file)
    with pytest.raises(UserError, match=r"its groups differ from those of DCGD\.GROUPS"):
        build("_M_", DCGD__GROUPS=groups_file)
    with pytest.raises(UserError, match="single"):
        build("_M_", DCGD__EVAL_HEAD="singel")
    with pytest.raises(UserError, match="together"):
        build("_M_", DCGD__BRANCHES="togther")
    with pytest.raises(UserError, match="DCGD itself"):
        build("_M_", DCGD__BASE="DCGD_KD")
    with pytest.raises(UserError, match="FITNET"):
        build("_M_", DCGD__BASE="FITNE")
