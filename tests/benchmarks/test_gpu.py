"""`make gpu`: stages that fail, last too long or are interrupted leave the report what there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ..experiments.hand_made import write_run
from ._scripts import FOLDER, script

REPOSITORY = FOLDER.parent


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with script("gpu") as module:
        yield module


@pytest.fixture(scope="module")
def stages() -> Iterator[ModuleType]:
    with script("stages") as module:
        yield module


def shell(words: str, name: str = "machine") -> Any:
    """The command of a stage: a shell's `words`, in which {out} is the stage's own file."""
    return lambda args: ["sh", "-c", words.format(out=args.out / f"{name}.json")]


def arguments(gpu: ModuleType, out: Path, *more: str) -> Namespace:
    args = gpu.parse(["--out", str(out), "--data", str(out), "--device", "cpu", "--quick", *more])
    gpu.clear(args.out, args.only)
    return args


def reported(out: Path) -> tuple[dict[str, Any], str]:
    content = json.loads((out / "report.json").read_text())
    return {s["name"]: s for s in content["stages"]}, (out / "report.md").read_text()


def ended(pid: int) -> bool:
    """Whether a process ends within a second; a zombie has."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_the_limits_are_eight_minutes_together(gpu: ModuleType) -> None:
    assert [stage.name for stage in gpu.STAGES] == [
        "machine", "tests", "step", "profile", "modes", "compiled", "train",
    ]  # fmt: skip
    assert sum(stage.limit + stage.grace for stage in gpu.STAGES) <= 481
    args = arguments(gpu, Path("/tmp"), "--only", "profile")
    for stage in gpu.STAGES:
        program = next(word for word in stage.command(args) if word.endswith(".py") or word == "pytest")
        assert program == "pytest" or Path(program).is_file()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells of all children")
def test_a_stage_at_its_limit_is_ended_with_all_that_it_has_started(
    stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child, one in a session of its own, and one that ignores SIGTERM."""
    monkeypatch.setattr(stages, "GRACE", 0.3)
    inner = "sleep 60 & echo $! >>{0}; setsid sleep 60 & echo $! >>{0}; "
    inner += "sh -c 'trap \"\" TERM; sleep 60' & echo $! >>{0}; echo started; wait"
    command = ["sh", "-c", inner.format(tmp_path / "pids")]
    outcome = stages.run_stage("step", command, 0.7, tmp_path / "step.txt", {}, tmp_path)
    assert (outcome.status, outcome.limit) == ("out of time", 0.7) and 0.7 <= outcome.seconds < 2
    assert (tmp_path / "step.txt").read_text() == "started\n"
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3 and all(map(ended, pids))


@pytest.mark.parametrize(
    ("words", "status", "note"),
    [
        ("echo well", "done", ""),
        ("echo first; echo 'RuntimeError: bad'; echo; exit 3", "failed", "exit status 3: RuntimeError: bad"),
        ("kill -SEGV $$", "failed", "signal 11: it printed nothing"),
    ],
)
def test_how_a_stage_ends(words: str, status: str, note: str, stages: ModuleType, tmp_path: Path) -> None:
    outcome = stages.run_stage("step", ["sh", "-c", words], 20, tmp_path / "step.txt", {}, tmp_path)
    assert (outcome.status, outcome.note) == (status, note)


def test_stages_that_fail_or_last_too_long_leave_the_others(gpu: ModuleType, tmp_path: Path, capsys) -> None:
    table = (
        gpu.Stage("machine", 30, shell("echo '{{\"gpu\": \"A card\", \"cores\": 2}}' >{out}")),
        gpu.Stage("tests", 30, shell("echo broken >&2; exit 1")),
        gpu.Stage("step", 0.3, shell("sleep 60")),
        gpu.Stage("profile", 30, shell("exit 0")),
        gpu.Stage("train", 5, shell("exit 0"), takes_left_over=True),
    )
    args = arguments(gpu, tmp_path / "out", "--only", *(stage.name for stage in table))
    gpu.run_stages(args, gpu.Report(args), table)
    found, page = reported(args.out)
    assert {name: s["status"] for name, s in found.items()} == {
        "machine": "done", "tests": "failed", "step": "out of time", "profile": "done", "train": "done",
    }  # fmt: skip
    assert found["tests"]["note"] == "exit status 1: broken"
    assert 80 < found["train"]["limit"] < 95  # its own, and what the others have left
    assert "- cores: 2" in page and "# A rehearsal without a GPU" in page
    assert "tests: failed" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.startswith("error: torch ") and said.err.count("\n") == 1 and "--device cpu --quick" in said.err


def test_trainings_without_their_files_are_skipped_by_name(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainings

    args = gpu.parse(["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu", "--only", "train"])
    gpu.clear(args.out, args.only)
    gpu.run_stages(args, gpu.Report(args), gpu.STAGES)
    found, _ = reported(args.out)
    assert found["train"]["status"] == "skipped" and f"no CIFAR-100 in {tmp_path}" in found["train"]["note"]
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").touch()
    monkeypatch.setattr(trainings, "TEACHER", "resnet110")  # it is nowhere here
    lacking = trainings.missing(tmp_path, False)
    assert list(lacking) == ["KD", "DKD"] and "download_ckpts/README.md" in lacking["KD"]
    table = (gpu.Stage("train", 5, shell("exit 0"), takes_left_over=True),)
    gpu.run_stages(args, gpu.Report(args), table)
    found, _ = reported(args.out)
    assert found["train"]["status"] == "done" and found["train"]["note"].startswith("KD and DKD skipped: no checkpoint")


def test_a_training_that_was_cut_off_has_its_epochs(gpu: ModuleType, tmp_path: Path) -> None:
    import trainings

    args = arguments(gpu, tmp_path, "--only", "train")
    runs = tmp_path / "runs"
    for name, epochs in {"plain": 240, "KD": 3}.items():
        rows = [
            {"epoch": e, "test_acc": 60 + e / 100, "epoch_seconds": 2.0, "images_per_second": 1e4, "peak_memory_mib": 9}
            for e in range(1, epochs + 1)
        ]
        (runs / name).mkdir(parents=True)
        write_run(runs / name / "run", rows, "SOLVER.EPOCHS", "240", config="configs/cifar100/kd.yaml")
        (runs / f"{name}.txt").write_text("epoch ...\n")
    (runs / "DKD.txt").write_text("Traceback\n\nRuntimeError: CUDA error\n")
    found = trainings.results(runs)
    assert found["plain"]["top1_last"] == 62.4 and found["plain"]["seconds"] == 480 and found["KD"]["epochs"] == 3
    report = gpu.Report(args)
    report.write()
    _, page = reported(tmp_path)
    assert "| plain | 240 of 240 | 62.40 | 62.40 | 69.06 | -6.66 | 480 | 10000 | more than 0.5 below |" in page
    cut_off = "cut off; 240 epochs take 8.0 minutes at this speed"
    assert f"| KD | 3 of 240 | 60.03 | 60.03 | 70.66 |  | 6 | 10000 | {cut_off} |" in page
    assert "| DKD | 0 | | | | | | | RuntimeError: CUDA error |" in page


def measured(milliseconds: float, **more: Any) -> dict[str, Any]:
    spread = dict.fromkeys(("median", "low", "high"), milliseconds)
    counts = {"launches": 9.0, "kernels": 90.0, "synchronisations": 0.0}
    rest = {"images_per_second": spread, "ratio": spread, "peak_mib": 1, "held_mib": 5, "times_floor": 2}
    return {"milliseconds": spread, **counts, **rest, **more}


def test_what_a_machine_can_do(gpu: ModuleType, tmp_path: Path) -> None:
    """1 ms a step is 782 x 240 ms for 240 epochs: 3.1 minutes."""
    from gpu_report import can_do

    modes = {"eager": measured(20.0), "graph": measured(1.0), "bf16, graph": measured(0.5)}
    modes["teacher cache"] = measured(0.25)
    races = [{"method": "KD", "pair": "resnet56-resnet20", "modes": modes, "refused": {}, "failed": {}}]
    facts = {"gpu": "A card", "bfloat16_units": True, "gpu_free_gib": 70.0, "compiler": "gcc"}
    content = {
        "machine": facts, "step": {"batch": 64, "races": races}, "modes": None, "compiled": None, "rehearsal": False,
        "quick": False,
    }  # fmt: skip
    page = "\n".join(can_do(content))
    assert "KD, resnet56-resnet20, batch 64: 0.50 ms a step in the mode 'bf16, graph', 1.6 minutes for 240" in page
    assert "20.00 ms a step eager, 62.6 minutes for 240" in page
    assert "SOLVER.AMP bf16 SOLVER.CUDA_GRAPH always" in page
    assert "It has bfloat16 units: KD takes 0.50 ms a step in bf16, 1.00 without (graph)" in page
    assert "of 1.5 GiB fits: 70.0 are free" in page and "cached, KD takes 0.25 ms a step" in page


def run_gpu(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--quick", "--scale", "10", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **options)


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(tmp_path: Path) -> None:
    """In another folder, as a user may; `machine` and `profile` alone, then the stages that train."""
    done = run_gpu("--out", "out", "--only", "machine", "profile", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, page = reported(tmp_path / "out")
    assert {name: s["status"] for name, s in found.items()} == {"machine": "done", "profile": "done"}
    assert page.startswith("# A rehearsal without a GPU, of tiny sizes")
    assert f"- torch: {torch.__version__}" in page and "aten::" in page and "graph: refused" in page


@pytest.mark.slow
def test_a_rehearsal_of_the_trainings_and_of_the_tests(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--only", "tests", "step", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    found, page = reported(tmp_path)
    assert [s["status"] for s in found.values()] == ["done"] * 3
    content = json.loads((tmp_path / "report.json").read_text())
    assert {name: run["epochs"] for name, run in content["train"].items()} == {"plain": 1, "KD": 1, "DKD": 1}
    assert all("published" not in run for run in content["train"].values())  # it was another data set
    assert len(content["tests"]) == 6 and {test["outcome"] for test in content["tests"]} == {"passed"}
    assert "| KD | eager | " in page and "6 passed" in page


@pytest.mark.slow
def test_a_signal_ends_the_stage_and_leaves_the_report(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import gpu
def shell(words):
    return lambda args: ["sh", "-c", words]
last = gpu.Stage("tests", 60, shell("echo $$ >{tmp_path}/pid; sleep 60"))
gpu.STAGES = (gpu.Stage("machine", 60, shell("exit 0")), last)
gpu.main()
"""
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "machine: done" in process.stdout.readline()
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    found, page = reported(tmp_path / "out")
    assert found["machine"]["status"] == "done" and found["tests"]["status"] == "interrupted"
    assert "stopped by signal 15" in page and ended(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_the_tests_of_a_gpu_pass_on_the_cpu(tmp_path: Path) -> None:
    """Some of each file; what only a GPU has is skipped. Each result is written down as soon as it is known."""
    some = "KD-torch.float32 or (no_sync and CRD-eager) or (modes and cpu and EMA) or (resume and NONE-never) or nan"
    results = tmp_path / "results.jsonl"
    environment = os.environ | {
        "MDISTILLER_TEST_DEVICE": "cpu", "MDISTILLER_TEST_RESULTS": str(results), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda", "-k", f"{some} or graphed"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["outcome"] for line in lines} == {"passed", "skipped"}
    assert {line["why"] for line in lines if line["outcome"] == "skipped"} == {"Skipped: a CUDA graph needs a GPU"}
    assert sum(line["outcome"] == "passed" for line in lines) >= 8
