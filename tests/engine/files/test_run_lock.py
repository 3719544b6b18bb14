"""Two runs in one folder, with real processes and signals."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess

import pytest

from mdistiller.engine.files.run_lock import NAME, RunInUseError, run_lock
from mdistiller.errors import UserError

from ..._processes import light

HOLDER = """
import os
from mdistiller.engine.files.run_lock import run_lock
folder, fork = sys.argv[1:]
try:
    with run_lock(folder):
        if fork == "fork" and os.fork() == 0:
            sys.stdin.read()  # a worker process that outlives its parent
            os._exit(0)
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(folder=tmp_path, fork=""):
        process = light(HOLDER, folder, fork, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_the_host_process_and_start_of_the_first(tmp_path, holder):
    first, said = holder()
    assert said == "held"
    second, refusal = holder()
    since = json.loads((tmp_path / NAME).read_text())["since"]
    assert f"{tmp_path} is in use by process {first.pid} on host {socket.gethostname()}, started {since}" in refusal
    assert second.wait(10) == 0
    with pytest.raises(RunInUseError, match=f"process {first.pid} on host"), run_lock(tmp_path):
        pass
    assert holder(tmp_path / "other")[1] == "held"


def test_a_run_that_ends_releases_the_folder_and_removes_the_lock_file(tmp_path, holder):
    first, _ = holder()
    first.communicate("", timeout=10)
    assert os.listdir(tmp_path) == []
    assert holder()[1] == "held"


@pytest.mark.parametrize("fork", ["", "fork"])
def test_a_killed_run_releases_the_folder_at_once_even_if_its_workers_live_on(tmp_path, holder, fork):
    first, said = holder(fork=fork)
    assert said == "held"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / NAME).exists()
    assert holder()[1] == "held"


def test_one_process_cannot_lock_a_folder_twice(tmp_path, holder):
    with run_lock(tmp_path / "run"):
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} on host"), run_lock(tmp_path / "link"):
            pass
        assert "in use by process" in holder(tmp_path / "run")[1], "the refusal did not give up the lock"
    with run_lock(tmp_path / "run"):
        pass


def test_an_error_inside_releases_the_folder(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


def facts(folder, **changed):
    with run_lock(folder):
        return json.dumps({**json.loads((folder / NAME).read_text()), **changed})


@pytest.mark.parametrize(
    "changed, alive",
    [
        ({}, True),
        ({"process_start": "1"}, False),
        ({"pid": 2**22 + 1}, False),
        ({"host": "another"}, True),
    ],
)
def test_without_locks_in_the_file_system_the_content_of_the_lock_file_decides(tmp_path, monkeypatch, changed, alive):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / NAME).write_text(facts(tmp_path / "facts", **changed))
    monkeypatch.setattr(fcntl, "flock", flock)
    if alive:
        with pytest.raises(RunInUseError, match=r"process \d+ on host"), run_lock(tmp_path):
            pass
    else:
        with run_lock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_half_written_lock_file_is_ignored(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = r"cannot write to .*file/run \(Not a directory\)"
    with pytest.raises(UserError, match=message), run_lock(tmp_path / "file" / "run"):
        pass
