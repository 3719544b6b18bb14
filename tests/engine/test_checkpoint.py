"""Checkpoint files: every accepted form, every refusal, and no half-written file."""

import os
import pickle

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.checkpoint import load_checkpoint, load_model_weights, load_state, save_checkpoint
from mdistiller.errors import UserError


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
def test_every_form_in_use_loads(tmp_path, form):
    torch.manual_seed(0)
    source, target = net(), net()
    save_checkpoint(dict(forms(source.state_dict()))[form], tmp_path / "file")
    load_model_weights(target, tmp_path / "file")
    assert same(source, target)


def test_names_and_shapes_that_differ_are_named_and_nothing_is_loaded(tmp_path):
    target = net()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = net(4).state_dict()
    state["2.weight"] = state.pop("1.weight")
    message = (
        r"file does not fit Sequential: 1 missing \(1.weight\); 1 unknown \(2.weight\); "
        r"5 of another shape \(0.weight \(4, 2\) for \(3, 2\), .*, \.\.\.\)"
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


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    save_checkpoint({"epoch": 3}, tmp_path / "file")
    with pytest.raises(UserError, match="holds no network weights"):
        load_model_weights(net(), tmp_path / "file")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*/none"):
        load_checkpoint(tmp_path / "none")


def test_a_save_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    save_checkpoint({"a": 1}, tmp_path / "file")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint({"a": lambda: 0}, tmp_path / "file")
    assert load_checkpoint(tmp_path / "file") == {"a": 1}
    assert os.listdir(tmp_path) == ["file"]
