"""Systems that lack what Linux has: imitated in processes of their own, from which it was taken away."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mdistiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.run_name import experiment_name

from ._processes import REPOSITORY, light
from ._windows import MODULES, OF_OS, OF_SIGNAL

PACKAGE = Path(mdistiller.__file__).parent
LOST = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests._windows import lose_what_windows_lacks
import pathlib, psutil, tempfile
lose_what_windows_lacks()
from mdistiller import system
"""
CONFIG = """
EXPERIMENT: {PROJECT: p, TAG: t}
DATASET: {TYPE: digits, TRAIN_FRACTION: 0.1}
DISTILLER: {TYPE: NONE, STUDENT: resnet8}
SOLVER: {BATCH_SIZE: 64, EPOCHS: %d, LR: 0.05, LR_DECAY_STAGES: [8]}
LOG: {WANDB: false}
"""


def python(code: str, *arguments: object) -> str:
    process = light(LOST + code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    return said.strip()


def test_a_run_trains_and_is_resumed_without_what_windows_lacks(tmp_path):
    command = [sys.executable, "-m", "tests._windows", str(REPOSITORY / "tools/train.py"), "--cfg"]
    for epochs in (1, 2):
        config = tmp_path / f"{epochs}.yaml"
        config.write_text(CONFIG % epochs, encoding="utf-8")
        options = [str(config), "LOG.PREFIX", str(tmp_path / "output"), "SOLVER.LR", "0.1"]
        done = subprocess.run(
            [*command, *options, *(["--resume"] if epochs == 2 else [])],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "output/p/tSOLVER.LR=0.1"
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3
    assert (folder / "curves.png").is_file()


def test_a_folder_is_locked_for_one_process_at_a_time(tmp_path):
    code = """
from mdistiller.engine.files.run_lock import run_lock
try:
    with run_lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, flush=True)
"""
    first = light(LOST + code, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline().strip() == "held"
        assert f"is in use by process {first.pid} " in python(code, tmp_path)
        assert python(code, tmp_path / "other") == "held"
    finally:
        first.communicate("", timeout=30)
    assert python(code, tmp_path) == "held"


@pytest.mark.parametrize("size", [0, 5, 2**20 + 3])
def test_a_file_is_lengthened_with_zeros_and_keeps_what_it_has(tmp_path, size):
    (tmp_path / "file").write_bytes(b"abc")
    python("with open(sys.argv[1], 'a+b') as file: system.allocate(file, int(sys.argv[2]))", tmp_path / "file", size)
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(max(0, size - 3))


def test_what_a_process_is_is_told_without_the_modules_of_unix():
    code = """
import os
print(system.peak_memory() > 1, system.usable_cpus() > 0, system.process_start(os.getpid()) is not None)
print(2**20 < system.free_memory() < 2**50)
system.ignore_hangup()
system.in_forked_child(print)
with system.held_signals([15]):
    system.release_signals([15])
"""
    assert python(code) == "True True True\nTrue"


def test_a_colon_is_replaced_where_a_folder_cannot_have_one_and_only_there(tmp_path):
    pairs = ["SOLVER.LR", "0.1", "LOG.PREFIX", str(tmp_path / "not/yet"), "EXPERIMENT.NAME", "a:b"]
    cfg = load_cfg("configs/digits/vanilla.yaml", pairs)
    assert experiment_name(cfg, pairs) == "digits/a:bSOLVER.LR:0.1"
    assert list(tmp_path.iterdir()) == []
    assert python("print(system.takes_colons(sys.argv[1]))", tmp_path) == "False"


def test_a_name_may_have_a_colon_where_nothing_may_be_written():
    assert mdistiller.system.takes_colons("/proc/self") is True


def uses(path: Path):
    """The names of what Windows lacks in a file: (line, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in (*MODULES, "os", "signal"):
            lost = MODULES + OF_OS + OF_SIGNAL
            yield from ((node.lineno, name.name) for name in node.names if {name.name, node.module} & set(lost))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lost = {"os": OF_OS, "signal": OF_SIGNAL}.get(node.value.id, ())
            yield from [(node.lineno, f"{node.value.id}.{node.attr}")] if node.attr in lost else []


# Behind a check of its own.
GUARDED = {
    "dataset/workers.py": {"signal.sigtimedwait", "signal.pthread_sigmask"},
    "dataset/worker_failures.py": {"signal.SIGCHLD"},  # where a handler of it is
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_module_uses_what_windows_lacks(path):
    own = str(path.relative_to(PACKAGE))
    found = [(line, name) for line, name in uses(path) if name not in GUARDED.get(own, ())]
    assert own == "system.py" or not found, f"{own}: {found}; mdistiller/system.py has what stands in for it"
