"""Plans: what is read from them, which runs they define, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from mdistiller.errors import UserError
from mdistiller.experiments.plan import read_plan

REPOSITORY = Path(__file__).resolve().parents[2]
PLANS = sorted(p.name for p in (REPOSITORY / "plans").glob("*.yaml"))

TINY = """
title: Tiny
seeds: [0, 3]
overrides: {SOLVER.EPOCHS: 5}
pairs:
  a -> b: {overrides: {DISTILLER.STUDENT: resnet14, SOLVER.LR: 0.2}, teacher: 72.34, source: s}
  c -> d: {overrides: {DISTILLER.STUDENT: resnet20}}
methods:
  student: {config: configs/digits/vanilla.yaml, published: {a -> b: 69}, source: s}
  KD:
    config: {a -> b: configs/digits/kd.yaml}
    overrides: {SOLVER.EPOCHS: 7, SOLVER.LR: 0.3, KD.TEMPERATURE: 2}
    by_pair: {a -> b: {KD.TEMPERATURE: 3}}
sources: {s: "somebody 2020"}
"""


@pytest.fixture
def plan(tmp_path):
    def read(text=TINY, name="tiny"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return read_plan(path)

    return read


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_ours_names_its_command_and_its_configs_resolve(name):
    path = REPOSITORY / "plans" / name
    assert path.read_text().startswith(f"# python tools/table.py plans/{name}\n")
    plan = replace(read_plan(path), seeds=[0])
    jobs = [job for pair in plan.pairs for method in plan.methods for job in plan.jobs(pair, method)]
    assert len({job.folder for job in jobs}) == len(jobs) >= 6
    for pair in plan.pairs:
        for job in [job for job in jobs if pair and f", {pair}, " in job.label]:
            teacher, student = pair.split(" -> ")
            if "DCGD" not in job.label:
                assert [job.cfg.DISTILLER[name] for name in ("TEACHER", "STUDENT")] == [teacher, student], job.label
    assert all(any(mark in text for mark in ("arXiv", "README")) for text in plan.sources.values())


def test_published_values_are_those_of_the_papers():
    same, cross = (read_plan(REPOSITORY / f"plans/cifar100_{style}_style.yaml") for style in ("same", "cross"))
    assert same.methods["KD"].published["resnet56 -> resnet20"] == 70.66
    assert same.methods["DKD"].published["resnet32x4 -> resnet8x4"] == 76.32
    assert cross.methods["CRD"].published["ResNet50 -> MobileNetV2"] == 69.11
    assert read_plan(REPOSITORY / "plans/tiny_imagenet_dot.yaml").methods["KD+DOT"].published == {
        "ResNet18 -> MobileNetV2": 64.01, "ResNet18 -> ShuffleV2": 65.75,
    }  # fmt: skip


def test_the_runs_of_a_plan_and_which_override_wins(plan):
    first, second = plan().jobs("a -> b", "KD", ["EXPERIMENT.TAG", "x", "LOG.PREFIX", "there"])
    assert (first.label, second.label) == ("KD, a -> b, seed 0", "KD, a -> b, seed 3")
    cfg = second.cfg
    assert (cfg.DISTILLER.STUDENT, cfg.SOLVER.LR, cfg.SOLVER.EPOCHS) == ("resnet14", 0.3, 5)
    assert (cfg.KD.TEMPERATURE, cfg.EXPERIMENT.SEED, cfg.EXPERIMENT.TAG) == (3, 3, "x")
    assert second.folder.parent == Path("there/plan_tiny")
    assert second.folder.name == (
        "KD,a-b,DISTILLER.STUDENT:resnet14,SOLVER.LR:0.3,SOLVER.EPOCHS:5,KD.TEMPERATURE:3,EXPERIMENT.SEED:3"
    )
    assert plan().jobs("c -> d", "KD") == [], "no config for this pair"
    assert plan().over == ["KD", "student"] and plan().pairs["a -> b"].teacher == 72.34


def test_without_pairs_the_published_value_is_one_number(plan):
    text = "title: T\nseeds: [1]\nmethods: {m: {config: configs/digits/kd.yaml, published: 70.5, source: s}}\n"
    read = plan(text + "sources: {s: x}\n")
    assert read.methods["m"].published == {"": 70.5}
    assert [job.label for job in read.jobs("", "m")] == ["m, seed 1"]


WRONG = {
    "no YAML": ("title: [", "is not valid YAML"),
    "a list": ("- 1", r"must be a section with keys from title, about, .*, not \[1\]"),
    "nothing": ("", "must be a section"),
    "unknown key": (TINY + "sedes: [1]", "unknown key 'sedes'; did you mean seeds"),
    "no seeds": (TINY.replace("seeds: [0, 3]", ""), "seeds is missing"),
    "a seed as text": (TINY.replace("[0, 3]", "[0, x]"), r"must be different whole numbers >= 0, not \[0, 'x'\]"),
    "one seed twice": (TINY.replace("[0, 3]", "[3, 3]"), "seeds must be different"),
    "unknown pair": (TINY.replace("by_pair: {a -> b", "by_pair: {a -> x"), "method 'KD': unknown pair 'a -> x'"),
    "no such config": (TINY.replace("vanilla.yaml", "vanila.yaml"), "no config configs/digits/vanila.yaml"),
    "no source": (TINY.replace("69}, source: s}", "69}}"), r"method 'student': published needs a source, .* \(s\)"),
    "no teacher's source": (TINY.replace("72.34, source: s", "72.34"), "pair 'a -> b': teacher needs a source"),
    "unknown source": (TINY.replace("69}, source: s}", "69}, source: t}"), "unknown source 't'"),
    "published text": (TINY.replace("69}", "high}"), "published value of 'a -> b' must be a number, not 'high'"),
    "wrong type": (TINY.replace("title: Tiny", "title: 5"), "title must be of type str, not 5"),
    "a method twice": (
        TINY + "methods: {KD: {config: configs/digits/kd.yaml}}\n", r"methods stands there twice, in lines \d+ and",
    ),
    "over an unknown method": (TINY + "over: [DKD]", "over: unknown method 'DKD'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_gets_a_one_line_error(case, plan):
    text, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        plan(text)
    assert "tiny.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_override_is_refused_when_its_jobs_are_made(plan):
    with pytest.raises(UserError, match=r"unknown config key 'SOLVER.EPOCH'; did you mean SOLVER.EPOCHS"):
        plan(TINY.replace("overrides: {SOLVER.EPOCHS: 5}", "overrides: {SOLVER.EPOCH: 5}")).jobs("a -> b", "KD")


def test_a_missing_plan_gets_a_one_line_error():
    with pytest.raises(UserError, match=r"cannot read plan none.yaml: No such file"):
        read_plan("none.yaml")
