"""2,000 damaged checkpoints: each loads unchanged or is refused in one line; none runs code or harms other files."""

import hashlib
import io
import os
import pickle
import zipfile
from datetime import timedelta

import pytest
import torch
import torch.nn as nn
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mdistiller.engine.files.checkpoint import load_checkpoint, load_state, model_state, save_checkpoint
from mdistiller.engine.files.checksum import seal
from mdistiller.engine.files.run_folder import load_resumable, newest_whole
from mdistiller.errors import UserError

pytestmark = pytest.mark.slow

# The same examples every time; none may take long.
quickly = settings(
    max_examples=1000, derandomize=True, database=None, deadline=timedelta(seconds=20),
    phases=[Phase.generate, Phase.shrink],  # Phase.explain traces every line
)  # fmt: skip


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def whole_state(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3, "model": {f"student.{k}": v for k, v in module.state_dict().items()},
        "optimizer": optimizer.state_dict(), "best_acc": 12.5, "head_best_acc": {"": 12.5},
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder of intact checkpoints of every format; the tests write damaged ones to other files."""
    folder = tmp_path_factory.mktemp("fuzz")
    state = whole_state(net())
    save_checkpoint(state, folder / "best")
    save_checkpoint({"model": net().state_dict()}, folder / "student_best")
    torch.save(state, folder / "plain")
    torch.save(state, folder / "old", _use_new_zipfile_serialization=False)
    (folder / "tensors").write_bytes(save(net().state_dict()))
    return folder


SOURCES = ("best", "student_best", "plain", "old", "tensors")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_executed_and_nothing_harmed(folder):
    def sums():
        return {name: hashlib.sha256((folder / name).read_bytes()).digest() for name in SOURCES}

    before, here = sums(), os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(here)
    assert sums() == before
    assert not (folder / "executed").exists()


# One damage: (kind, position as a share of the file, number of bytes, bytes to write).
DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "zero", "insert", "overwrite", "splice"]),
    st.floats(0, 1, exclude_max=True), st.integers(1, 2000), st.binary(min_size=1, max_size=12),
)  # fmt: skip


def damaged(content, damages, other):
    for kind, share, count, noise in damages:
        at = int(share * len(content))
        new = {
            "flip": content[at : at + 1].translate(bytes(b ^ (1 << count % 8) for b in range(256))) + content[at + 1 :],
            "cut": b"",
            "drop": content[at + count :],
            "zero": bytes(min(count, len(content) - at)) + content[at + count :],
            "insert": noise + content[at:],
            "overwrite": noise + content[at + len(noise) :],
            "splice": other[at:],
        }
        content = content[:at] + new[kind]
    return content


def use(path):
    """Load a file as tools/eval.py and --resume do; return its content."""
    content = load_checkpoint(path)
    state = model_state(content, path)
    load_state(net(), state, path)
    return content


def same(a, b):
    return type(a) is type(b) and pickle.dumps(a) == pickle.dumps(b)


@quickly
@given(st.sampled_from(SOURCES), st.sampled_from(SOURCES), st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_files(folder, source, other, damages):
    whole = (folder / source).read_bytes()
    content = damaged(whole, damages, (folder / other).read_bytes())
    path = folder / ("file.safetensors" if source == "tensors" else "file")
    path.write_bytes(content)
    try:
        found = use(path)
    except UserError as error:
        assert "file" in str(error) and len(str(error)) < 1000
        assert content != whole
        return
    if source in ("best", "student_best") and content not in [(folder / name).read_bytes() for name in SOURCES]:
        raise AssertionError(f"a damaged checkpoint was taken: {list(found)}")


TENSORS = st.sampled_from([torch.zeros(3), torch.tensor(1), torch.eye(2).to_sparse(), torch.eye(2).int()])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8) | TENSORS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
KEYS = st.sampled_from(["model", "state_dict", "epoch", "optimizer", "best_acc", "student.0.weight", "3.bias"])
RANDOM = PLAIN | st.dictionaries(KEYS, PLAIN | st.dictionaries(KEYS, PLAIN, max_size=4), max_size=5)


@quickly
@given(RANDOM)
def test_intact_files_with_other_content(folder, content):
    archive = io.BytesIO()
    torch.save(content, archive)
    (folder / "latest").write_bytes(seal(archive))
    try:
        use(folder / "latest")
    except UserError as error:
        assert "latest" in str(error)
    state, path, damaged_files = newest_whole(folder)
    assert state["epoch"] == 3 if path.name == "best" else not damaged_files
    (folder / "latest").unlink()


# Functions that a hostile pickle may call, and the argument; most calls would create the file `executed`.
CALLS = {
    ("os", "system"): "touch executed", ("posix", "system"): "touch executed", ("builtins", "open"): "executed",
    ("builtins", "exec"): "open('executed', 'x')", ("builtins", "eval"): "open('executed', 'x')",
    ("subprocess", "getoutput"): "touch executed", ("torch", "load"): "best", ("torch.hub", "load"): "x",
    ("pathlib", "Path"): "executed", ("builtins", "getattr"): "x", ("torch.serialization", "add_safe_globals"): "x",
}  # fmt: skip


@pytest.mark.parametrize("form", ["pickle", "old", "zip", "sealed"])
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_that_would_run_code_is_refused(folder, form, call):
    code = f"c{call[0]}\n{call[1]}\n(V{CALLS[call]}\ntR.".encode()
    if form == "pickle":
        content = code
    elif form == "old":  # the call comes before the first dictionary
        content = (folder / "old").read_bytes().replace(b"}", code[:-1] + b"0}", 1)
    else:
        out = io.BytesIO()
        with zipfile.ZipFile(folder / "plain") as archive, zipfile.ZipFile(out, "w") as evil:
            for record in archive.namelist():
                evil.writestr(record, code if record.endswith("data.pkl") else archive.read(record))
        content = out.getvalue()
        if form == "sealed":
            content = bytes(seal(out))
    (folder / "file").write_bytes(content)
    for load in (load_checkpoint, load_resumable):
        with pytest.raises(UserError, match="file is not a readable checkpoint"):
            load(folder / "file")
    assert not (folder / "executed").exists()
