"""The checkpoints of a run: which one to resume from, which to remove."""

import os

import pytest
import torch

from mdistiller.engine.files.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)
from mdistiller.engine.files.run_folder import newest_whole, prune, remove_run
from mdistiller.errors import UserError


def resumable(epoch):
    return {"epoch": epoch, "model": {"w": torch.full((3,), float(epoch))}, "optimizer": {}, "best_acc": 1.0}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_a_damaged_latest_falls_back_to_the_newest_intact_checkpoint_and_says_so(tmp_path):
    for name, epoch in {"latest": 9, "latest_previous": 8, "epoch_3": 3, "best": 5, "epoch_6": 6}.items():
        save_checkpoint(resumable(epoch), tmp_path / name)
    save_checkpoint({"model": {}}, tmp_path / "student_latest")
    found = []
    for lost in ("none", "latest", "latest_previous", "epoch_6", "best"):
        if lost != "none":
            damage(tmp_path / lost)
        state, path, damaged = newest_whole(tmp_path)
        assert state["epoch"] == state["model"]["w"][0] == load_checkpoint(path)["epoch"]
        found.append((path.name, len(damaged)))
    assert found == [("latest", 0), ("latest_previous", 1), ("epoch_6", 2), ("best", 3), ("epoch_3", 4)]
    assert damaged[0].startswith(f"{tmp_path}/latest is not a readable checkpoint")
    damage(tmp_path / "epoch_3")
    with pytest.raises(UserError, match=r"latest is not a readable checkpoint.*epoch_3 is not a readable checkpoint"):
        newest_whole(tmp_path)


@pytest.mark.parametrize("best, expected", [(3, "latest_previous"), (4, "best")])
def test_instead_of_a_damaged_latest_the_furthest_checkpoint_is_taken(tmp_path, best, expected):
    """The one before may lie within an epoch that another one has finished."""
    save_checkpoint(resumable(3) | {"within_epoch": {"step": 7}}, tmp_path / "latest_previous")
    save_checkpoint(resumable(best), tmp_path / "best")
    (tmp_path / "latest").write_bytes(b"")
    assert newest_whole(tmp_path)[1].name == expected


def test_a_missing_latest_falls_back_too_and_for_an_empty_folder_the_missing_file_is_named(tmp_path):
    save_checkpoint(resumable(2), tmp_path / "latest_previous")
    state, path, damaged = newest_whole(tmp_path)
    assert (state["epoch"], path.name, damaged) == (2, "latest_previous", [])
    for folder in (tmp_path / "empty", tmp_path / "none"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(UserError, match=f"no checkpoint at {folder}/latest"):
            newest_whole(folder)


@pytest.mark.parametrize("key, value", [("epoch", "3"), ("model", 3), ("optimizer", None), ("best_acc", "high")])
def test_a_checkpoint_with_an_entry_of_the_wrong_type_is_skipped(tmp_path, key, value):
    save_checkpoint({**resumable(4), key: value}, tmp_path / "latest")
    save_checkpoint(resumable(3), tmp_path / "best")
    state, path, damaged = newest_whole(tmp_path)
    assert (state["epoch"], path.name) == (3, "best")
    assert len(damaged) == 1 and f"its {key} is of type {type(value).__name__}" in damaged[0]


def test_pruning_keeps_the_newest_pairs_and_all_other_files(tmp_path):
    others = {"latest", "latest_previous", "best", "student_latest", "student_best", "student_best_single", "epoch_x"}
    everything = others | {f"{stem}_{n}" for stem in ("epoch", "student") for n in (40, 80, 120, 200)}
    for name in everything:
        (tmp_path / name).touch()
    prune(tmp_path, 0)
    assert set(os.listdir(tmp_path)) == everything
    prune(tmp_path, 2)
    assert set(os.listdir(tmp_path)) == others | {"epoch_120", "epoch_200", "student_120", "student_200"}


def test_removing_a_run_removes_its_checkpoints_only(tmp_path):
    others = {"worklog.txt", "metrics.csv", "config.yaml", "epoch_notes", ".run_lock"}
    checkpoints = {"latest", "latest_previous", "best", "epoch_40", "student_40", "student_best", "student_best_single"}
    for name in others | checkpoints:
        (tmp_path / name).touch()
    remove_run(tmp_path)
    assert set(os.listdir(tmp_path)) == others
    remove_run(tmp_path / "none")
