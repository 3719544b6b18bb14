"""Damaged and hostile files given to the real tools: one line, exit status 2, no code executed, no file harmed."""

import os
import shutil

import pytest
import torch

from mdistiller.engine.files.checkpoint import save_checkpoint

from ..reliability.runs import METHODS, REPOSITORY, SETTINGS, Run, Zygote

pytestmark = pytest.mark.slow

NONE = METHODS["KD"] | {"SOLVER.EMA": "0", "SOLVER.EPOCHS": "1", "LOG.SAVE_CHECKPOINT_ITERS": "0"}


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, zygote):
    run = Run(tmp_path_factory.mktemp("finished"), NONE, zygote.launch)
    run.finish()
    return run


class WritesAFile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def hostile(path):
    torch.save({"model": WritesAFile(), "epoch": 1, "optimizer": {}, "best_acc": 1.0}, path)


DAMAGE = {
    "bit-flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "hostile": hostile,
    "other content": lambda path: save_checkpoint({"model": 3}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def run_tool(zygote, folder, name, *arguments):
    """(exit status, what it printed) of a tool run in `folder`."""
    output = folder / "said.txt"
    output.unlink(missing_ok=True)
    words = [str(argument) for argument in arguments]
    status = zygote.start(REPOSITORY / "tools" / name, words, folder, output, {}).wait()
    return status, output.read_text()


@pytest.mark.parametrize("damage", DAMAGE)
def test_eval_refuses_a_damaged_checkpoint(tmp_path, zygote, finished, damage):
    shutil.copy(finished.log_path / "student_best", tmp_path)
    DAMAGE[damage](tmp_path / "student_best")
    status, said = run_tool(zygote, tmp_path, "eval.py", "-m", "resnet8", "-d", "digits", "-c", "student_best")
    assert status == 2 and len(said.splitlines()) == 1 and said.startswith("error: ") and "student_best" in said
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_resuming_falls_back_to_an_intact_checkpoint_with_a_warning(tmp_path, zygote, finished, damage):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = Run(tmp_path / "run", NONE, zygote.launch)
    DAMAGE[damage](run.log_path / "latest")
    settings = [word for pair in (SETTINGS | NONE).items() for word in pair]
    status, said = run_tool(zygote, run.folder, "train.py", "--cfg", "empty.yaml", "--resume", *settings)
    best = (run.log_path / "best").relative_to(run.folder)
    assert status == 0, said
    (warning,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert "latest" in warning and warning.endswith(f"; resuming from {best}")
    assert not list(run.folder.rglob("executed"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_resuming_without_an_intact_checkpoint_is_refused_and_harms_nothing(tmp_path, zygote, finished, damage):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = Run(tmp_path / "run", NONE, zygote.launch)
    for name in ("latest", "latest_previous", "best"):
        DAMAGE[damage](run.log_path / name)
    before = {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()}
    settings = [word for pair in (SETTINGS | NONE).items() for word in pair]
    status, said = run_tool(zygote, run.folder, "train.py", "--cfg", "empty.yaml", "--resume", *settings)
    assert status == 2 and len(said.splitlines()) == 1 and said.startswith("error: ") and "latest" in said
    assert {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()} == before
    assert not list(run.folder.rglob("executed"))


MALFORMED = {
    "best_acc": torch.zeros(2), "head_best_acc": 3, "head_last_acc": [1], "optimizer": {"state": 3},
    "within_epoch": {"step": 1}, "within_epoch ": 7,
}  # fmt: skip


@pytest.mark.parametrize("key", MALFORMED)
def test_resuming_from_an_intact_but_malformed_checkpoint_is_refused_and_harms_nothing(tmp_path, zygote, finished, key):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = Run(tmp_path / "run", NONE, zygote.launch)
    state = torch.load(run.log_path / "latest", weights_only=True) | {key.strip(): MALFORMED[key]}
    save_checkpoint(state, run.log_path / "latest")
    before = {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()}
    settings = [word for pair in (SETTINGS | NONE).items() for word in pair]
    status, said = run_tool(zygote, run.folder, "train.py", "--cfg", "empty.yaml", "--resume", *settings)
    assert status == 2 and len(said.splitlines()) == 1 and said.startswith("error: ") and "latest" in said
    assert {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()} == before


BAD_CONFIGS = {
    "runs code": "SOLVER: !!python/object/apply:os.system ['touch executed']",
    "breaks the parser": "SOLVER: {LR: !!timestamp x}",
    "never closes": "{" * 300,
    "is no text": "\0",
    "is a list": "- a",
    "is beyond all floats": f"SOLVER: {{LR: {'9' * 400}}}",
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_train_refuses_a_configuration(tmp_path, zygote, kind):
    (tmp_path / "bad.yaml").write_text(BAD_CONFIGS[kind])
    status, said = run_tool(zygote, tmp_path, "train.py", "--cfg", "bad.yaml", "LOG.WANDB", "False")
    assert status == 2 and len(said.splitlines()) == 1 and said.startswith("error: ")
    assert sorted(os.listdir(tmp_path)) == ["bad.yaml", "said.txt"]
