"""Several processes on one batch: same gradients, one writer, a common stop. Uses torchrun with gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdistiller.dataset import get_val_loader
from mdistiller.engine.files.checkpoint import load_checkpoint, load_model_weights
from mdistiller.engine.scores import evaluate
from mdistiller.models import build_model, cifar_model_dict

from .._networks import write_untrained

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(processes, *arguments):
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *ranks, *map(str, arguments)]


def finish(started, seconds=900):
    output, _ = started.communicate(timeout=seconds)
    return started.returncode, output


def start(processes, *arguments):
    return subprocess.Popen(
        command(processes, *arguments), cwd=REPOSITORY, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("teacher") / "resnet14", "resnet14", seed=1)


def test_two_ranks_have_the_gradients_of_one_process_under_every_method(teacher, tmp_path):
    """In float64 with BatchNorm over all ranks; tolerance 1e-9 of the largest gradient, where 1e-5 is required."""
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]))
    for processes, name in ((0, "one"), (2, "two")):
        status, output = finish(
            start(processes, "tests/distributed/ranks_worker.py", teacher, groups, tmp_path / name)
        )
        assert status == 0, output
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert one.keys() == first.keys() and len(one) >= 19 and "DCGD/base/together" in one
    for method, grads in one.items():
        scale = max(g.abs().max() for n, g in grads.items() if n != "train_loss" and not n.startswith("buffer "))
        assert scale > 0
        for name, grad in grads.items():
            torch.testing.assert_close(
                first[method][name], grad, rtol=1e-9, atol=1e-9 * scale.item(),
                msg=lambda m, at=(method, name): f"{at}: {m}",
            )  # fmt: skip
            assert torch.equal(first[method][name], second[method][name]), (method, name)


def training(teacher, prefix, *more):
    return [
        "tools/train.py", "--cfg", "configs/digits/kd.yaml", "LOG.WANDB", "False", "LOG.PREFIX", prefix,
        "EXPERIMENT.NAME", "run", "DISTILLER.TEACHER", "resnet14", "DISTILLER.TEACHER_CKPT", teacher,
        "DATASET.TRAIN_FRACTION", "0.1", "EXPERIMENT.DEVICE", "cpu", *more,
    ]  # fmt: skip


def folder_of(prefix):
    (folder,) = (prefix / "digits").iterdir()
    return folder


def scored(path):
    """The score of a saved student, computed by this process alone."""
    student = build_model(cifar_model_dict, "resnet8", 10).eval()
    load_model_weights(student, path)
    return evaluate(get_val_loader("digits"), lambda image: {"": student(image)[0]}, torch.device("cpu"))[""]


def test_a_run_of_two_ranks_writes_once_and_continues_in_one_process(teacher, tmp_path):
    settings = ["SOLVER.EPOCHS", "1", "SOLVER.EMA", "0.9", "SOLVER.LR", "0.1"]
    status, output = finish(start(2, *training(teacher, tmp_path, *settings)))
    assert status == 0, output
    assert output.count("epoch 1/1") == 1
    folder = folder_of(tmp_path)
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    row = dict(zip(rows[0].split(","), rows[1].split(",")))
    # Every validation image counts once: one process computes the same accuracy for the saved student, and for its EMA,
    # whose BatchNorm statistics are other ones on each rank.
    for file, head in (("student_latest", "student"), ("student_latest_ema", "ema")):
        score = scored(folder / file)
        assert float(row[f"test_acc_head_{head}"]) == pytest.approx(score.top1, abs=1e-4)
    assert float(row["test_loss"]) == pytest.approx(scored(folder / "student_latest").loss, rel=1e-4)
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2

    status, output = finish(start(0, *training(teacher, tmp_path, *settings), "--resume"))
    assert status == 0 and "trained already" in output, output


def wait_for(text, started):
    """Read a process's output up to a line that contains `text`."""
    for line in started.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}")


def workers(started):
    """The ranks' process ids: the children of torchrun."""
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def test_sigterm_stops_all_ranks_together_and_the_run_can_be_resumed(teacher, tmp_path):
    started = start(2, *training(teacher, tmp_path, "SOLVER.EPOCHS", "500"))
    wait_for("epoch 1/500", started)
    started.send_signal(signal.SIGTERM)
    status, output = finish(started, seconds=60)
    assert status != 0 and output.count("with --resume goes on from here") == 1, output
    state = load_checkpoint(folder_of(tmp_path) / "latest")
    # Saved within an epoch, or at its end if the signal arrived there.
    within = state.get("within_epoch")
    assert within is None or (within["step"] >= 1 and len(within["random"]) == 2)
    again = start(2, *training(teacher, tmp_path, "SOLVER.EPOCHS", "500"), "--resume")
    wait_for(f"epoch {state['epoch'] + 1}/500", again)
    again.send_signal(signal.SIGTERM)
    assert finish(again, seconds=60)[0] != 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
def test_if_a_rank_dies_the_others_end_within_a_minute(teacher, tmp_path):
    started = start(2, *training(teacher, tmp_path, "SOLVER.EPOCHS", "500"))
    wait_for("epoch 1/500", started)
    ranks = workers(started)
    os.kill(ranks[1], signal.SIGKILL)
    status, output = finish(started, seconds=60)
    assert status == 1
    assert "Signal 9 (SIGKILL)" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_batch_that_cannot_be_shared_is_refused(teacher, tmp_path):
    status, output = finish(start(2, *training(teacher, tmp_path, "SOLVER.BATCH_SIZE", "63")))
    assert status != 0 and "SOLVER.BATCH_SIZE 63 does not go with 2 processes" in output
    assert not (tmp_path / "digits").exists()

