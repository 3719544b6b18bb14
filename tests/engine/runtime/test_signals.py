"""Signals as requests to stop, in real processes: also during one long operation, and in forked children."""

import os
import signal
import subprocess
import time

import pytest

from ..._processes import light, light_command

# `busy` keeps the main thread in one operation, without the interpreter's lock, as a backward pass does.
LISTENING = """
import hashlib, os, signal, sys, time
from mdistiller.engine.runtime.signals import StopRequest

def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes

stop = StopRequest()
with stop.listening():
    print("up", flush=True)
    {body}
print(stop.signal, flush=True)
"""


def start(body, **environment):
    """A process that has printed "up" from inside `listening`."""
    process = light(LISTENING.format(body=body), stdout=subprocess.PIPE, env=os.environ | environment)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    process = start("while not stop.signal: time.sleep(0.01)")
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"{int(number)}\n" and process.returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_the_process_at_once_though_the_main_thread_is_in_one_operation(second):
    process = start("busy()")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(second)
    process.communicate(timeout=30)
    assert process.returncode == -second


def test_a_forked_childs_signals_are_not_the_parents():
    """It ignores SIGINT, which Ctrl-C sends to the whole group, and SIGTERM ends it, as it ends any process."""
    body = """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"up")
        time.sleep(60)
        os._exit(0)
    os.read(read, 2)
    os.kill(child, signal.SIGINT)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "alive"
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    """
    process = start(body.strip())
    assert process.communicate(timeout=30)[0] == "0\n" and process.returncode == 0


def test_listening_ends_while_a_forked_child_lives():
    """A loader's persistent workers, which inherit the pipe, outlive the training."""
    body = """
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
os.kill(child, signal.SIGKILL)
    """
    with start(body.strip()) as process:
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_the_same_signal_twice_at_once_is_one_request():
    """`timeout` signals its child and then the group of both."""
    body = """
    sys.modules[StopRequest.__module__].ONE_REQUEST = 20  # the test must not depend on a busy machine
    while not stop.signal: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    """
    process = start(body.strip())
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "15\n" and process.returncode == 0


def test_under_torchrun_a_second_signal_changes_nothing():
    process = start("while not stop.signal: time.sleep(0.01)\n    time.sleep(1)", TORCHELASTIC_RUN_ID="run")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "15\n" and process.returncode == 0


def test_afterwards_everything_is_as_before():
    state = "[signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]"
    code = f"import signal\nbefore = {state}\n" + LISTENING.format(body="pass")
    code += f"assert {state} == before and signal.set_wakeup_fd(-1) == -1\n"
    subprocess.run(light_command(code), stdout=subprocess.DEVNULL, check=True, timeout=60)
