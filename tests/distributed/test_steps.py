"""Steps of two ranks in several modes: the same parameters on both, a common decision about NaN. Uses torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .._networks import write_untrained

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run(processes, teacher, cases, folder):
    """What each rank's `steps_worker.steps` returned, by case."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    out = folder / f"of_{processes}"
    worker = ["tests/distributed/steps_worker.py", str(teacher), json.dumps(cases), str(out)]
    done = subprocess.run(
        [sys.executable, *ranks, *worker], cwd=REPOSITORY, env=ENVIRONMENT, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [torch.load(f"{out}.{rank}") for rank in range(processes)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("teacher") / "resnet14", "resnet14", seed=1)


def parameters(state):
    """Without the statistics of each rank's own images."""
    return {k: v for k, v in state.items() if "running" not in k and "tracked" not in k}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def case(batch, *overrides, steps=4, **more):
    return {"overrides": ["SOLVER.LR", "0.05", "SOLVER.BATCH_SIZE", str(batch), *overrides], "steps": steps, **more}


# BatchNorm evaluates ("still"), so that one process computes the same. Of 143 images, both batch sizes leave 15: 7 and
# 8 for the ranks, in 3 micro-batches (of the 5) on one and in 4 on the other.
SPLIT = {
    "64 images in 9": case(64, "SOLVER.ACCUMULATE", "9", steps=3, still=True),
    "aligned, 32 images in 5": case(32, "SOLVER.ACCUMULATE", "5", "SOLVER.TRAINER", "aligned", steps=5, still=True),
    "32 images in 5": case(32, "SOLVER.ACCUMULATE", "5", steps=5, still=True),
}
SKIP, STOP = ("SOLVER.NAN_POLICY", "skip"), ("SOLVER.NAN_POLICY", "stop")
DOT, CRD = ("SOLVER.TRAINER", "dot"), ("DISTILLER.TYPE", "CRD")
# [rank, step, what]: on rank 1 alone.
SKIPPED = {
    "skip, loss": case(32, *SKIP, bad=[1, 2, "loss"]),
    "skip, gradient": case(32, *SKIP, bad=[1, 2, "gradient"]),
    "skip, gradient, DOT": case(32, *SKIP, *DOT, bad=[1, 2, "gradient"]),
    "skip, gradient, DeepKD": case(32, *SKIP, "SOLVER.TRAINER", "deepkd", bad=[1, 2, "gradient"]),
    "skip, gradient, aligned": case(32, *SKIP, "SOLVER.TRAINER", "aligned", bad=[1, 2, "gradient"]),
    "skip, loss, CRD": case(32, *SKIP, *CRD, bad=[1, 2, "loss"]),
}
STOPPED = {
    "stop, loss": case(32, *STOP, bad=[1, 3, "loss"]),
    "stop, gradient": case(32, *STOP, bad=[1, 3, "gradient"]),
    "stop, gradient, DOT": case(32, *STOP, *DOT, bad=[1, 3, "gradient"]),
}


# Erasing is the same on ranks and alone; of mixed images, each rank's first one has another partner.
AUGMENTED = ("DATASET.AUGMENT", "randaugment", "DATASET.ERASING", "0.5", "SOLVER.LABEL_SMOOTHING", "0.1")
MIXED = {
    "mixed": case(32, *AUGMENTED, "DATASET.MIXUP", "0.5", "DATASET.CUTMIX", "1.0", steps=5, still=True),
    "erased": case(32, *AUGMENTED, "SOLVER.ACCUMULATE", "2", steps=5, still=True),
}


@pytest.fixture(scope="module")
def ranks(teacher, tmp_path_factory):
    """What both ranks have done in every case."""
    return run(2, teacher, SPLIT | SKIPPED | STOPPED | MIXED, tmp_path_factory.mktemp("ranks"))


def test_ranks_stay_together_in_micro_batches(teacher, ranks, tmp_path):
    """After every step of an epoch, its short last one included, and also where a batch gives fewer than asked for."""
    one, two = ranks
    (alone,) = run(1, teacher, SPLIT, tmp_path)
    for name in SPLIT:
        steps = SPLIT[name]["steps"]
        assert len(one[name]["taken"]) == len(two[name]["taken"]) == steps, name
        for step, (a, b) in enumerate(zip(one[name]["states"], two[name]["states"], strict=True)):
            assert same(parameters(a), parameters(b)), (name, step)
        # Up to the last step, in which the ranks' shares differ in size.
        for step in range(steps):
            for key, value in parameters(one[name]["states"][step]).items():
                torch.testing.assert_close(alone[name]["states"][step][key], value, rtol=1e-9, atol=1e-11)


def test_ranks_stay_together_on_augmented_and_mixed_images(teacher, ranks, tmp_path):
    one, two = ranks
    (alone,) = run(1, teacher, MIXED, tmp_path)
    for name in MIXED:
        assert one[name]["taken"] == two[name]["taken"] == [16, 16, 16, 16, 7]
        assert same(parameters(one[name]["states"][-1]), parameters(two[name]["states"][-1])), name
        assert not same(parameters(one[name]["states"][0]), parameters(one[name]["states"][-1])), name
    for key, value in parameters(one["erased"]["states"][4]).items():
        torch.testing.assert_close(alone["erased"]["states"][4][key], value, rtol=1e-9, atol=1e-11)


def test_nan_on_one_rank_skips_the_step_on_both_without_effect(ranks):
    """Also where the losses are finite and only the gradients are not."""
    for name in SKIPPED:
        for own in (rank[name] for rank in ranks):
            assert own["taken"] == [16, None, 16, 16] and not own["error"] and own["in_a_row"] == 0, name
            assert same(own["states"][1], own["states"][2]), name  # BatchNorm's statistics and CRD's banks too
            assert not same(own["states"][2], own["states"][3]), name
        assert same(parameters(ranks[0][name]["states"][-1]), parameters(ranks[1][name]["states"][-1])), name


def test_nan_on_one_rank_stops_both_at_that_step(ranks):
    """Each rank names what it sees, and lists its own images."""
    for name in STOPPED:
        for rank, own in enumerate(of[name] for of in ranks):
            lost, note = name == "stop, loss" and rank == 1, "non_finite_rank1.json" if rank else "non_finite.json"
            assert own["error"].startswith("epoch 1, iteration 3: loss_ce = "), (name, own["error"])
            assert ("loss_kd = nan" in own["error"]) == lost, (name, own["error"])
            assert ("the gradients' norm is nan" in own["error"]) != lost, (name, own["error"])
            assert f"/{note}, earlier" in own["error"]
            assert len(own["taken"]) == 2 and same(parameters(own["states"][2]), parameters(own["states"][3])), name


METHODS = {
    **dict.fromkeys(("KD", "CRD", "RKD", "SP", "PKT", "DIST", "MLKD"), ()),
    "KD in 3": ("SOLVER.ACCUMULATE", "3"),
    "KD, DOT": DOT,
}


@pytest.mark.slow
def test_compiled_ranks_take_the_plain_steps(teacher, tmp_path):
    """Also where the loss gathers the batch of all ranks, and in the last batch, which is not compiled on any."""
    plain = {m: case(32, "DISTILLER.TYPE", m.split()[0].strip(","), *more, steps=5) for m, more in METHODS.items()}
    compiled = {
        f"{method}, compiled": own | {"overrides": [*own["overrides"], "SOLVER.COMPILE", "True"]}
        for method, own in plain.items()
    }
    one, two = run(2, teacher, plain | compiled, tmp_path)
    for name in compiled:
        method = name.removesuffix(", compiled")
        assert one[name]["taken"] == one[method]["taken"] == [16, 16, 16, 16, 7]
        assert same(parameters(one[name]["states"][-1]), parameters(two[name]["states"][-1])), name
        for key, value in one[method]["states"][-1].items():
            torch.testing.assert_close(one[name]["states"][-1][key], value, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")
