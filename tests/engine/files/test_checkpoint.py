"""Checkpoint files: every accepted format, every refusal, and no half-written file."""

import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.files.checkpoint import (
    SaveError,
    load_checkpoint,
    load_model_weights,
    load_state,
    save_checkpoint,
)
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

REPOSITORY = Path(__file__).resolve().parents[3]


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def forms(state):
    yield "under model", {"model": state}
    yield "under state_dict", {"state_dict": state, "epoch": 3}
    yield "bare", state
    yield "module. in front", {"model": {f"module.{k}": v for k, v in state.items()}}
    whole = {f"student.{k}": v for k, v in state.items()} | {"teacher.fc.weight": torch.zeros(1)}
    yield "a whole distiller", {"epoch": 3, "model": whole}
    yield "a whole distiller in DataParallel", {"epoch": 3, "model": {f"module.{k}": v for k, v in whole.items()}}


@pytest.mark.parametrize("form", [name for name, _ in forms({})])
def test_every_format_in_use_loads(tmp_path, form):
    torch.manual_seed(0)
    source, target = net(), net()
    save_checkpoint(dict(forms(source.state_dict()))[form], tmp_path / "file")
    load_model_weights(target, tmp_path / "file")
    assert same(source, target)


def test_different_names_and_shapes_are_listed_and_nothing_is_loaded(tmp_path):
    target = net()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = net(4).state_dict()
    state["2.weight"] = state.pop("1.weight")
    message = (
        r"file does not fit Sequential: 1 missing \(1.weight\); 1 unknown \(2.weight\); "
        r"5 of another shape \(0.weight \(4, 2\) instead of \(3, 2\), .*, \.\.\.\)"
    )
    with pytest.raises(UserError, match=message):
        load_state(target, state, "file")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def damaged_files(folder):
    whole = folder / "whole"
    save_checkpoint({"model": net().state_dict()}, whole)
    content = whole.read_bytes()
    yield content[: len(content) // 2]
    yield content[:-1]
    yield b""
    yield b"not a checkpoint at all"
    yield content.replace(b"0.weight", b"0.we\xff\xffht")
    yield pickle.dumps({"model": RunsCode()})


def test_a_damaged_or_foreign_file_is_refused_in_one_line_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in damaged_files(tmp_path):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=r"file is not a readable checkpoint|file does not fit") as caught:
            load_model_weights(net(), tmp_path / "file")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_a_different_number_of_classes_is_reported_as_such(tmp_path, whole):
    hundred, ten = (build_model(cifar_model_dict, "resnet8", classes) for classes in (100, 10))
    state = hundred.state_dict()
    save_checkpoint({"model": {f"student.{k}": v for k, v in state.items()} if whole else state}, tmp_path / "file")
    message = (
        r"file has 100 classes, \w+ has 10: "
        r"fc.weight \(100, 64\) instead of \(10, 64\), fc.bias \(100,\) instead of \(10,\)$"
    )
    with pytest.raises(UserError, match=message):
        load_model_weights(ten, tmp_path / "file")


def test_a_checkpoint_of_another_network_is_refused_with_the_entries_that_differ(tmp_path):
    save_checkpoint({"model": build_model(cifar_model_dict, "vgg8", 10).state_dict()}, tmp_path / "file")
    with pytest.raises(UserError, match=r"file does not fit \w+: \d+ missing \(bn1\.bias, .*\d+ unknown \(block0"):
        load_model_weights(build_model(cifar_model_dict, "resnet8", 10), tmp_path / "file")


def test_tensors_that_cannot_be_copied_are_refused_in_one_line(tmp_path):
    state = net().state_dict() | {"0.weight": torch.zeros(3, 2).to_sparse()}
    with pytest.raises(UserError, match=r"file does not fit Sequential: .*0\.weight"):
        load_state(net(), state, "file")


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    save_checkpoint({"epoch": 3}, tmp_path / "file")
    with pytest.raises(UserError, match="holds no network weights"):
        load_model_weights(net(), tmp_path / "file")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*/none"):
        load_checkpoint(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file_and_no_partial_file(tmp_path):
    save_checkpoint({"a": 1}, tmp_path / "file")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"a": lambda: 0}, tmp_path / "file")
    assert load_checkpoint(tmp_path / "file") == {"a": 1}
    assert os.listdir(tmp_path) == ["file"]


def test_plain_torch_reads_what_we_write(tmp_path):
    state = net().state_dict()
    save_checkpoint({"model": state}, tmp_path / "file")
    for mmap in (False, True):
        read = torch.load(tmp_path / "file", weights_only=True, mmap=mmap)["model"]
        assert all(torch.equal(read[k], v) for k, v in state.items())


def test_every_flipped_bit_and_every_lost_byte_is_detected(tmp_path):
    path = tmp_path / "file"
    save_checkpoint({"model": {"w": torch.arange(3.0)}}, path)
    content = path.read_bytes()
    flips = (content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(len(content)))
    cuts = (content[:i] for i in range(len(content)))
    for damaged in (*flips, *cuts, content + b"\0", content + content):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(path)


def test_a_checkpoint_without_our_checksum_loads_and_its_crcs_are_checked(tmp_path):
    path, weight = tmp_path / "published.pth", torch.arange(1000.0)
    torch.save({"model": {"w": weight}}, path)
    assert torch.equal(load_checkpoint(path)["model"]["w"], weight)
    content = bytearray(path.read_bytes())
    content[content.find(weight.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], weight), "torch itself does not notice"
    with pytest.raises(UserError, match=r"the checksum of .*/data/0 does not match"):
        load_checkpoint(path)


def test_files_in_the_format_before_zip_load(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old")["model"]["w"].tolist() == [1, 1]


def test_a_file_gets_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        save_checkpoint({}, tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_save_beyond_the_size_limit_leaves_the_old_file_and_reports_the_bytes_needed(tmp_path):
    save_checkpoint({"a": 1}, tmp_path / "file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        message = r"cannot write .*/file \(File too large\): 4\d,\d{3} bytes needed, [\d,]+ free"
        with pytest.raises(SaveError, match=message):
            save_checkpoint({"a": torch.zeros(10_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path / "file") == {"a": 1}
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_vanished_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint({}, folder / "latest")
    shutil.rmtree(folder)
    with pytest.raises(SaveError, match=r"latest \(No such file or directory\).*run cannot be reached"):
        save_checkpoint({}, folder / "latest")


FULL_DISK = """
import os, subprocess, sys, torch
from mdistiller.engine.files.checkpoint import SaveError, load_checkpoint, save_checkpoint

def failure(name, numbers):
    try:
        save_checkpoint({"a": torch.zeros(numbers)}, name)
    except SaveError as error:
        print(error)

os.chdir(sys.argv[1])
save_checkpoint({"a": 1}, "file")
failure("file", 100_000)
failure("new", 100_000)
save_checkpoint({"a": 2}, "file")
subprocess.run(["mount", "-o", "remount,ro", "."], check=True)
failure("file", 1)
print(load_checkpoint("file"), os.listdir("."))
"""


def test_a_full_and_a_read_only_disk_leave_the_old_file(tmp_path):
    inside = f'mount -t tmpfs -o size=200k tmpfs {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside, FULL_DISK], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    full, new, read_only, left = done.stdout.splitlines()
    for name, line in {"file": full, "new": new}.items():
        assert line.startswith(f"cannot write {name} (No space left on device): 40")
        assert "bytes needed, 2" in line or "bytes needed, 1" in line
    assert "cannot write file (Read-only file system)" in read_only
    assert left == "{'a': 2} ['file']"


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time, torch
from mdistiller.engine.files.checkpoint import load_checkpoint, save_checkpoint

os.chdir(sys.argv[1])
random.seed(0)
seen = set()
for round in range(15):
    child = os.fork()
    if child == 0:
        for count in range(round * 10_000, (round + 1) * 10_000):
            whole = {"epoch": 0, "model": {"w": torch.full((20_000,), float(count))}, "optimizer": {}, "best_acc": 0}
            save_checkpoint(whole, "latest", keep_previous=True)
    while not os.path.exists("latest_previous"):
        time.sleep(0.001)
    time.sleep(random.random() / 20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in ("latest", "latest_previous"):
        numbers = load_checkpoint(name)["model"]["w"].unique()
        assert len(numbers) == 1, numbers
        seen.add(numbers.item())
assert len(seen) > 3, seen
save_checkpoint({}, "latest", keep_previous=True)
print(sorted(os.listdir(".")))
"""


def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['latest', 'latest_previous']\n", "the next save removes the partial file of a killed one"


def test_the_previous_file_is_kept_when_asked_for(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint({"epoch": epoch}, tmp_path / "latest", keep_previous=True)
    assert sorted(os.listdir(tmp_path)) == ["latest", "latest_previous"]
    assert [load_checkpoint(tmp_path / f)["epoch"] for f in ("latest", "latest_previous")] == [3, 2]


def test_without_hard_links_the_previous_file_is_copied(tmp_path, monkeypatch):
    def link(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    test_the_previous_file_is_kept_when_asked_for(tmp_path)


