"""NVIDIA's MPS, with which the processes on one GPU compute at the same time; without it they take turns.

A process that finds a control daemon's pipes, in CUDA_MPS_PIPE_DIRECTORY or in /tmp/nvidia-mps, is its client; one that
finds none runs as it would without MPS. So a daemon that runs is used by doing nothing. Otherwise each GPU gets a
daemon of its own while the runs last. It sees that GPU alone, as number 0, so that it takes no memory on others, and a
MIG instance, of which a process sees only one, needs nothing else.

A client may use the whole GPU: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is not set here. A share of the multiprocessors would
change the shapes of the kernels' launches, and so the order of sums.

None of this has been run on a GPU yet.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from ..console import note, one_line, warn

PROGRAM = "nvidia-cuda-mps-control"
_PLACE = "/tmp/nvidia-mps"  # where a daemon is that was started without CUDA_MPS_PIPE_DIRECTORY
_PATIENCE = 20.0  # seconds for which the program and the end of a daemon are waited for
_READY = 5.0  # seconds in which a daemon that was started must answer
_FIRST_CLIENT = 60.0  # seconds; the daemon starts its server for it

# What a client does first. Without a driver nothing here is on a GPU, with MPS or without.
_CLIENT = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    sys.exit(0)
context = ctypes.c_void_p()
code = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
sys.exit(f"a process under it gets CUDA's error {code}" if code else 0)
"""


class NoMPSError(Exception):
    """MPS cannot be used here; the message says why, and what would help."""


@contextmanager
def gpu_environments(gpus: Sequence[str], processes: int) -> Iterator[list[dict[str, str]]]:
    """The environment variables of the processes on each of `gpus`, while the context is open.

    If there are more `processes` than GPUs, MPS is used where it can be, and one line says whether it is. A daemon that
    was started for them is ended with the context; end the processes before.

    Args:
        gpus: their names, as in CUDA_VISIBLE_DEVICES.
    """
    plain = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    if not 0 < len(gpus) < processes or torch.version.hip:  # AMD's GPUs serve several processes at once without it
        yield plain
        return
    with ExitStack() as stack:
        try:
            running = daemon_runs()
            variables = plain if running else stack.enter_context(_daemons(gpus))
        except NoMPSError as error:
            warn(f"the runs on one GPU take turns, because NVIDIA's MPS is not used: {error}")
            variables = plain
        else:
            how = "was running already" if running else "was started for them"
            note(f"{processes} runs at a time share {len(gpus)} GPU(s) through NVIDIA's MPS, which {how}")
        yield variables


def daemon_runs() -> bool:
    """Whether a control daemon serves the processes that inherit this one's environment."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _PLACE)
    if not (pipes / "control").exists():  # left behind, perhaps
        return False
    program = shutil.which(PROGRAM)
    # That of another user may not answer, and that of a container's host has no process here.
    return _daemon_process(pipes) is not None or (program is not None and _answers(program, pipes))


def _daemon_process(pipes: Path) -> int | None:
    """The number of the daemon's process; None if it does not run, or not in sight."""
    with suppress(OSError, ValueError):
        pid = int((pipes / f"{PROGRAM}.pid").read_text(encoding="utf-8"))
        if PROGRAM.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():  # numbers are used again
            return pid
    return None


def _answers(program: str, pipes: Path) -> bool:
    environment = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}
    try:
        return _told(program, environment, "get_default_active_thread_percentage") == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _told(program: str, environment: dict[str, str], command: str) -> int:
    """Give the daemon a command; returns the program's exit status. Its session is its own, out of Ctrl-C's reach."""
    return subprocess.run(
        [program], input=f"{command}\n".encode(), env=environment, timeout=_PATIENCE, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ).returncode  # fmt: skip


@contextmanager
def _daemons(gpus: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """Run a daemon for each GPU while the context is open; yields the environment variables of its clients.

    Raises:
        NoMPSError: there is no MPS here, or a daemon does not work.
    """
    if sys.platform != "linux":
        raise NoMPSError("there is none but on Linux")
    program = shutil.which(PROGRAM)
    if program is None:
        raise NoMPSError(f"{PROGRAM} is not on PATH; install it (it comes with NVIDIA's driver), or start the daemon")
    with ExitStack() as daemons:
        yield [daemons.enter_context(_daemon(program, gpu)) for gpu in gpus]


@contextmanager
def _daemon(program: str, gpu: str) -> Iterator[dict[str, str]]:
    """Run a control daemon for one GPU while the context is open; yields the environment variables of its clients.

    Raises:
        NoMPSError: it does not start, or its first client gets no GPU.
    """
    try:
        # Not in TMPDIR, which may be long: the names of sockets have at most 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="mdistiller_mps_", dir="/tmp"))
        pipes, logs = folder / "pipe", folder / "log"
        pipes.mkdir()
        logs.mkdir()
    except OSError as error:
        raise NoMPSError(f"no folder can be made in /tmp ({error.strerror})") from None
    own = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
    try:
        _start(program, os.environ | own | {"CUDA_VISIBLE_DEVICES": gpu}, folder / "output")
        clients = own | {"CUDA_VISIBLE_DEVICES": "0" if gpu.isdecimal() else gpu}  # a UUID stays the GPU's name
        _check_client(os.environ | clients)
        yield clients
    finally:
        _end(program, os.environ | own, folder)


def _start(program: str, environment: dict[str, str], output: Path) -> None:
    """Start a daemon, and wait until it is there.

    Raises:
        NoMPSError: it does not start; says what it printed.
    """
    # A file, because the daemon may keep what it is given, and then nobody would see the end of a pipe. A session of
    # its own keeps Ctrl-C from it.
    try:
        with output.open("wb") as file:
            status = subprocess.run(
                [program, "-d"], env=environment, timeout=_PATIENCE, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            ).returncode  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoMPSError(f"`{PROGRAM} -d` does not start ({one_line(error, 150)})") from None
    until = time.monotonic() + _READY
    while not status and not _answers(program, Path(environment["CUDA_MPS_PIPE_DIRECTORY"])):
        if time.monotonic() > until:
            status = 1
        time.sleep(0.1)
    if status:
        said = one_line(output.read_text(encoding="utf-8", errors="replace"), 150) or "it says nothing"
        raise NoMPSError(f"`{PROGRAM} -d` starts no daemon that answers ({said})")


def _check_client(environment: dict[str, str]) -> None:
    """Let a first process use the GPU: where it cannot, a run would be on the CPU, and not say so.

    Raises:
        NoMPSError: it cannot.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT], env=environment, timeout=_FIRST_CLIENT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        late = f"a process under it gets no GPU within {_FIRST_CLIENT:.0f} s; another user's may have it"
        raise NoMPSError(late) from None
    if done.returncode:
        why = one_line(done.stderr, 150) or f"a process under it ends with status {done.returncode}"
        raise NoMPSError(f"{why}; see `nvidia-smi -q -d COMPUTE` for the GPU's compute mode")


def _end(program: str, environment: dict[str, str], folder: Path) -> None:
    """End the daemon whose pipes are in `folder`, and remove the folder."""
    pipes = folder / "pipe"
    with _deferred_signals():
        until = time.monotonic() + _PATIENCE
        with suppress(OSError, subprocess.TimeoutExpired):
            _told(program, environment, "quit")
        while _daemon_process(pipes) is not None and time.monotonic() < until:
            time.sleep(0.05)
        if _daemon_process(pipes) is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:  # a process that is not ours, perhaps
            warn(f"MPS still runs; end it by `echo quit | CUDA_MPS_PIPE_DIRECTORY={pipes} {PROGRAM}`")


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Receive SIGINT and SIGTERM at the end of the context. Blocking them would not do: another thread gets them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            signal.raise_signal(asked[0])
