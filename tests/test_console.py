"""A process continues when its terminal or pipe is closed or its disk is full; all of them are real."""

import errno
import os
import pty
import subprocess
import sys

import pytest
from torch import nn

from mdistiller.console import network_name, one_line_errors, tool
from mdistiller.models.native import NativeInput
from mdistiller.models.own_input import OwnInput

from ._processes import in_mount, light, light_command

TALKER = """
import os, time
from pathlib import Path
from tqdm import tqdm
from mdistiller.console import outlive_terminal
done, ready = Path(sys.argv[1]), Path(sys.argv[1] + ".ready")
outlive_terminal()
print("begun", flush=True)
ready.touch()
while Path(sys.argv[1] + ".wait").exists():
    time.sleep(0.01)
with tqdm(total=50, disable=not sys.stderr.isatty(), mininterval=0) as bar:
    for step in range(50):
        print("step", step, flush=step % 2 == 0)
        bar.update()
print("warning: at the end", file=sys.stderr)
done.write_text("whole")
"""


def lose(process, tmp_path, cut):
    """Call `cut` once the process has begun; returns what it wrote to its file, and its exit status."""
    while not (tmp_path / "done.ready").exists():
        assert process.poll() is None
    cut()
    (tmp_path / "done.wait").unlink()
    status = process.wait(timeout=30)
    return (tmp_path / "done").read_text() if (tmp_path / "done").exists() else "", status


@pytest.fixture
def waits(tmp_path):
    (tmp_path / "done.wait").touch()
    return tmp_path / "done"


def test_a_closed_terminal(tmp_path, waits):
    controller, terminal = pty.openpty()
    take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = light(take + TALKER, waits, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    assert lose(process, tmp_path, lambda: os.close(controller)) == ("whole", 0)


def test_the_reader_of_the_output_exits(tmp_path, waits):
    process = light(TALKER, waits, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert lose(process, tmp_path, process.stdout.close) == ("whole", 0)
    with process.stderr:
        assert process.stderr.read().splitlines() == [
            "warning: stdout is lost ([Errno 32] Broken pipe); going on", "warning: at the end",
        ]  # fmt: skip


def test_the_reader_of_the_warnings_exits(tmp_path, waits):
    process = light(TALKER, waits, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert lose(process, tmp_path, process.stderr.close) == ("whole", 0)
    with process.stdout:
        lines = process.stdout.read().splitlines()
    assert lines[:-1] == ["begun", *(f"step {step}" for step in range(50))]
    assert lines[-1] == "warning: stderr is lost ([Errno 32] Broken pipe); going on"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_from_the_start(tmp_path, closed):
    command = ["sh", "-c", f'"$0" "$@" {closed}', *light_command(TALKER, tmp_path / "done")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and (tmp_path / "done").read_text() == "whole"
    assert "Traceback" not in out + err


FULL = """
from mdistiller.console import outlive_terminal
out = open("out.txt", "w")
sys.stdout, terminal = out, sys.stdout
outlive_terminal()
filler = open("filler", "wb", buffering=0)
try:
    while True:
        filler.write(b"0" * 1000)
except OSError:
    pass
for step in range(20_000):
    print("step", step)
sys.stdout.flush()
print("to the end", file=terminal)
"""


def test_output_to_a_file_on_a_full_disk(tmp_path):
    done = in_mount("50k", FULL, tmp_path)
    if done is None:
        pytest.skip("no file system can be mounted here")
    assert (done.returncode, done.stdout) == (0, "to the end\n")
    assert done.stderr == "warning: stdout is lost ([Errno 28] No space left on device); going on\n"


def test_two_calls_have_the_effect_of_one(tmp_path):
    code = TALKER.replace("outlive_terminal()\n", "outlive_terminal()\noutlive_terminal()\n")
    process = light(code, tmp_path / "done", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=30)
    assert out.splitlines() == ["begun", *(f"step {step}" for step in range(50))]


LOGGED = """
import logging
from mdistiller import console
{setup}
console.warn("two\\nlines")
console.note("noted")
console.progress("epoch 1/2: all is well")
"""


@pytest.mark.parametrize(
    "setup, out, err",
    [
        ("console.log_to_terminal()", "epoch 1/2: all is well\n", "warning: two lines\nnote: noted\n"),
        ("console.log_to_terminal(); console.log_to_terminal()", "epoch 1/2: all is well\n",
         "warning: two lines\nnote: noted\n"),
        # A library gives the root logger a handler: nothing is printed twice.
        ("console.log_to_terminal(); logging.basicConfig(level=logging.INFO)", "epoch 1/2: all is well\n",
         "warning: two lines\nnote: noted\n"),
        # Whoever imports the package: as any library.
        ("", "", "two lines\n"),
        ("logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')", "",
         "mdistiller WARNING two lines\nmdistiller INFO noted\nmdistiller.progress INFO epoch 1/2: all is well\n"),
        ("logging.getLogger('mdistiller').addHandler(logging.NullHandler())", "", ""),
        ("logging.getLogger('mdistiller').setLevel(logging.ERROR); console.log_to_terminal()", "", ""),
        ("logging.getLogger('mdistiller.progress').disabled = True; console.log_to_terminal()", "",
         "warning: two lines\nnote: noted\n"),
    ],
)  # fmt: skip
def test_the_log_is_on_a_tools_terminal_and_an_importer_redirects_or_silences_it(setup, out, err):
    process = light(LOGGED.format(setup=setup), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=30) == (out, err)


def test_a_line_for_a_closed_terminal_is_lost_without_an_error():
    code = LOGGED.format(setup="console.log_to_terminal(); sys.stdin.read()") + "print('the end')"
    process = light(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    process.stdin.close()
    with process.stdout:
        assert process.stdout.read() == "epoch 1/2: all is well\nthe end\n"
    assert process.wait(timeout=30) == 0


ACCENTS = """
from mdistiller.console import note, progress, tool
from mdistiller.errors import UserError
@tool()
def main():
    print("wrote", sys.argv[1], "\\u2192 \\u00fc")
    progress("3 \\u00d7 4")
    note("\\u00fc")
    raise UserError("\\u00fc")
main()
"""


@pytest.mark.parametrize(
    "environment, name",
    [
        ({"PYTHONIOENCODING": "ascii"}, "\\xfc"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ü"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ü"),
        ({"PYTHONIOENCODING": "latin-1"}, "ü"),
    ],
    ids=["ascii", "C", "POSIX", "latin-1"],
)
def test_a_terminal_that_lacks_a_character_gets_an_escape(environment, name):
    done = subprocess.run(light_command(ACCENTS, "ü"), capture_output=True, timeout=60, env=os.environ | environment)
    encoding = "latin-1" if environment.get("PYTHONIOENCODING") == "latin-1" else "utf-8"
    other = "ü" if encoding == "latin-1" else "\\xfc"
    times = "\u00d7" if encoding == "latin-1" else "\\xd7"
    assert done.stdout.decode(encoding) == f"wrote {name} \\u2192 {other}\n3 {times} 4\n"
    assert done.stderr.decode(encoding).endswith(f"error: {other}\n") and done.returncode == 2


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.13 GiB "
    "is free. Process 12 has 3.00 GiB in use. Including non-PyTorch memory, this process has 512.00 MiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "40 bytes. Error code 12 (Cannot allocate memory)"
)
NO_MEMORY = {
    "torch's own class": (type("OutOfMemoryError", (RuntimeError,), {})(CUDA), CUDA.partition(". Process")[0]),
    "the CPU": (RuntimeError(CPU), "can't allocate memory: you tried to allocate 40 bytes"),
    "CUDA": (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error: out of memory"),
    "a library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"), "CUBLAS_STATUS_ALLOC"),
    "Python": (MemoryError(), "MemoryError"),
    "the system": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
}


@pytest.mark.parametrize("case", NO_MEMORY)
@pytest.mark.parametrize("caused", [False, True])
def test_memory_that_runs_out_is_one_line_with_the_place_and_the_next_step(case, caused, capsys):
    error, said = NO_MEMORY[case]
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        if caused:
            try:
                raise error
            except Exception as first:
                raise ValueError("the student cannot take an image of 32x32") from first
        raise error
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: out of memory in test_console.py, line ")
    assert said in line and "SOLVER.BATCH_SIZE" in line and "SOLVER.ACCUMULATE" in line and "--jobs" in line
    assert "Process 12" not in line and "Error code" not in line


OTHER = [
    RuntimeError("shape mismatch"), RuntimeError("the bank runs out of memory slots"), OSError(errno.ENOENT, "absent"),
    KeyError("memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", OTHER)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as raised, one_line_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_tool_whose_reader_has_seen_enough_ends_without_a_word(count):
    """`mdistiller models 'timm/*' | head`: of much output, and of little, which Python writes when it exits."""
    source = f"from mdistiller.console import tool\nwith tool():\n    input()\n    [print(n) for n in range({count})]"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", source], **pipes)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()


def test_another_pipe_that_breaks_keeps_its_traceback():
    with pytest.raises(BrokenPipeError), tool():
        raise BrokenPipeError("a worker's")


@pytest.mark.parametrize("attributes", [{}, {"bare": True}, {"network": "n"}, {"name": 3}, {"name": ""}])
def test_a_network_is_called_by_its_class_whatever_its_attributes_are_called(attributes):
    mine = nn.Linear(1, 1)
    vars(mine).update(attributes)
    seen = OwnInput(mine, (0.5,) * 3, (0.5,) * 3, NativeInput(32, (0.4,) * 3, (0.5,) * 3))
    assert network_name(mine) == network_name(seen) == "Linear"


def test_a_network_that_was_built_by_a_name_is_called_by_it():
    mine = nn.Linear(1, 1)
    mine.name = "timm/mine"
    seen = OwnInput(mine, (0.5,) * 3, (0.5,) * 3, NativeInput(32, (0.4,) * 3, (0.5,) * 3))
    assert network_name(mine) == network_name(seen) == "timm/mine"
