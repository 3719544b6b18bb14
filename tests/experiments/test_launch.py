"""Running jobs in real processes: GPUs, failures, interruption, Ray."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mdistiller.errors import UserError
from mdistiller.experiments import launch
from mdistiller.experiments.jobs import make_job
from mdistiller.experiments.launch import run_here, threads_of, visible_gpus
from mdistiller.experiments.processes import Processes, Task

CONFIG = Path("configs/digits/kd.yaml")


def job_of(tmp_path, name="a", **overrides):
    place = {"LOG.PREFIX": tmp_path, "EXPERIMENT.NAME": name, "EXPERIMENT.PROJECT": "p"}
    return make_job(name, CONFIG, {**place, **{k.replace("__", "."): v for k, v in overrides.items()}})


def python(code, log):
    return Task([sys.executable, "-c", code], ".", {"COLOUR": "red"}, log)


def test_the_error_is_the_last_output_line_of_this_attempt(tmp_path):
    log = tmp_path / "new" / "train.log"
    assert Processes().run(python("import sys; print('one'); sys.exit('two\\n\\n')", log)) == "two"
    assert Processes().run(python("import os; os._exit(3)", log)) == "exit status 3", "not the last attempt's line"
    assert Processes().run(python("import os; print(os.environ['COLOUR'])", log)) == ""
    assert log.read_text().split() == ["one", "two", "red"] or log.read_text().split() == ["two", "one", "red"]


def test_a_run_that_a_signal_ended_is_said_to_be_not_its_last_line(tmp_path):
    log = tmp_path / "train.log"
    code = "import os, signal; print('epoch 3/6', flush=True); os.kill(os.getpid(), signal.{})"
    assert Processes().run(python(code.format("SIGSEGV"), log)) == "ended by SIGSEGV"
    killed = "ended by SIGKILL, as the system does when memory runs out; try fewer runs at a time (--jobs)"
    assert Processes().run(python(code.format("SIGKILL"), log)) == killed


@pytest.fixture
def quick(monkeypatch):
    """Every job runs this Python code in place of `mdistiller train`."""

    def use(code):
        monkeypatch.setattr(launch, "task", lambda job: python(code, job.folder / "train.log"))

    return use


def test_gpus_are_assigned_in_turn_and_a_failure_stops_no_other_job(tmp_path, quick, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    quick("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3)")
    jobs = [job_of(tmp_path, name) for name in "abcd"]
    outcomes = {job.label: error for job, error in run_here(jobs, 2, ["3", "5"])}
    assert outcomes == dict.fromkeys("abcd", "")
    devices = [(job.folder / "train.log").read_text().strip() for job in jobs]
    assert sorted(devices) == ["3", "3", "5", "5"]
    quick("raise SystemExit('broken')")
    assert [error for _, error in run_here(jobs[:2], 1, [])] == ["broken", "broken"]


def test_the_gpus_are_those_that_cuda_would_find(monkeypatch):
    for named, found in {"1, GPU-ab": ["1", "GPU-ab"], "2,-1,3": ["2"], "-1": [], "": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert visible_gpus() == found


def test_a_deterministic_run_keeps_the_threads_that_it_has_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "usable_cpus", lambda: 12)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    other, same = job_of(tmp_path), job_of(tmp_path, EXPERIMENT__DETERMINISTIC="True")
    assert threads_of(other, 4) == {"OMP_NUM_THREADS": "3"} and threads_of(other, 24) == {"OMP_NUM_THREADS": "1"}
    assert threads_of(same, 4) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert threads_of(other, 1) == threads_of(same, 1) == {}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert threads_of(same, 4) == {"OMP_WAIT_POLICY": "ACTIVE"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_of(other, 4) == threads_of(same, 4) == {}


def test_an_interrupt_ends_the_running_processes(tmp_path, quick):
    quick("import time; print('up', flush=True); time.sleep(600)")
    jobs = [job_of(tmp_path, name) for name in "abc"]
    log = jobs[0].folder / "train.log"

    def interrupt():
        while not (log.exists() and "up" in log.read_text()):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_here(jobs, 1, []))
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()  # this line is reached in less than the 600 seconds of a job
    logs = [job.folder / "train.log" for job in jobs[1:]]
    assert not any(log.exists() and log.read_text() for log in logs), "no other job was started"


RAY = """
from pathlib import Path
from mdistiller.experiments import launch
from mdistiller.experiments.jobs import make_job
from mdistiller.experiments.processes import Task
import sys

def task(job):
    code = "raise SystemExit('broken')" if job.label == "b" else "print('well')"
    return Task([sys.executable, "-c", code], ".", {}, (job.folder / "train.log").absolute())

launch.task = task
jobs = [make_job(n, Path("configs/digits/kd.yaml"), {"LOG.PREFIX": sys.argv[1], "EXPERIMENT.NAME": n}) for n in "abc"]
print(sorted((job.label, error) for job, error in launch.run_on_ray(jobs, "local")))
"""


@pytest.mark.slow
def test_a_local_ray_runs_the_same_jobs(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    done = subprocess.run([sys.executable, "-c", RAY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[('a', ''), ('b', 'broken'), ('c', '')]", done.stderr
    assert (tmp_path / "digits/a/train.log").read_text() == "well\n"


def test_a_missing_ray_gets_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray needs Ray: pip install -e '.\[ray\]'"):
        next(launch.run_on_ray([job_of(tmp_path)], "auto"))
