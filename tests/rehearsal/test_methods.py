"""Every method takes its steps on the fake GPU without a wait; a method is tested here as soon as it is registered."""

import pytest

from mdistiller.distillers import distiller_dict, method_defaults, method_ranges
from mdistiller.distillers.DCGD import DCGD
from mdistiller.engine.cfg import CFG

from ..test_docs_methods import FILES
from ._fake_gpu import FakeGPU
from ._runs import step_waits, trainer_for
from .places import STEP

METHODS = [
    pytest.param(name, teacher, id=f"{name} of {teacher}", marks=() if teacher == "resnet14" else pytest.mark.slow)
    for teacher in ("resnet14", "resnet8x4")
    for name in sorted(distiller_dict)
]


@pytest.mark.parametrize("name, teacher", METHODS)
def test_no_step_waits(name, teacher, tmp_path):
    grouped = issubclass(distiller_dict[name], DCGD)  # its student is a ResNet, a WRN or a VGG
    student = "resnet8" if teacher == "resnet14" else "wrn_16_1" if grouped else "ShuffleV1"
    with FakeGPU() as gpu:
        waits = step_waits(gpu, trainer_for(tmp_path, name, teacher, student))
    assert {wait.place for wait in waits} == set(STEP.get(name, ())), "\n".join(map(str, waits))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("CTKD", ("CTKD.BASE", "DKD")),
        ("WKD", ("WKD.LOSS.WKD_LOGIT_WEIGHT", 200.0, "WKD.LOSS.WKD_FEAT_WEIGHT", 0.08)),
        ("CRD", ("CRD.MODE", "relax")),
        ("KDSVD", ("KDSVD.AXIS", "channels")),
        ("REVIEWKD", ("REVIEWKD.STU_PREACT", True)),
        ("DCGD", ("DCGD.BASE", "CRD")),
        ("DCGD", ("DCGD.BASE", "OFD", "DCGD.EVAL_HEAD", "mean")),
        ("DCGD_KD", ("DCGD.BRANCHES", "loop")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
@pytest.mark.slow
def test_no_step_waits_in_the_other_forms_of_a_method(name, settings, tmp_path):
    with FakeGPU() as gpu:
        waits = step_waits(gpu, trainer_for(tmp_path, name, "resnet14", "resnet8", *settings))
    assert {wait.place for wait in waits} == set(STEP.get(name, ())), "\n".join(map(str, waits))


@pytest.mark.parametrize(
    "name", ["FT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("AB", "FITNET", "FSP"))]
)
def test_no_step_of_a_stage_before_training_waits(name, tmp_path):
    with FakeGPU() as gpu:
        trainer = trainer_for(tmp_path, name, "resnet14", "resnet8", f"{name}.INIT_EPOCHS", 1)
        waits = step_waits(gpu, trainer, epoch=0)
    assert trainer.distiller.stage_on is not None and waits == [], "\n".join(map(str, waits))


@pytest.fixture
def method_of_the_page():
    """method_of_the_page(name): registers a method of docs/methods.md for this test."""
    before = [(registry, dict(registry)) for registry in (distiller_dict, method_defaults, method_ranges, CFG)]

    def register(name):
        where = {"__name__": f"mdistiller.distillers.{name}", "__package__": "mdistiller.distillers"}
        exec(compile(FILES[name], f"{name}.py", "exec"), where)
        CFG[name] = method_defaults[name].clone()

    yield register
    for registry, entries in before:
        for name in registry.keys() - entries.keys():
            del registry[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "TemporalEnsemble" else pytest.mark.slow) for name in FILES]
)
def test_no_step_of_a_method_of_the_page_waits(name, method_of_the_page, tmp_path):
    method_of_the_page(name)
    with FakeGPU() as gpu:
        waits = step_waits(gpu, trainer_for(tmp_path, name, "resnet14", "resnet8"))
    assert waits == [], "\n".join(map(str, waits))
