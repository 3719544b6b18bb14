"""Arguments of command lines that are paths; tests/commands/test_negative_values.py has negative numbers."""

import argparse
from pathlib import Path

import pytest

from mdistiller.arguments import PathArgument
from mdistiller.errors import UserError


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="*", action=PathArgument, type=Path)
    parser.add_argument("-c", "--ckpt", action=PathArgument, default="pretrain")
    return parser.parse_args(arguments)


def test_an_argument_that_is_a_path_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert vars(parsed()) == {"runs": [], "ckpt": "pretrain"}
    assert vars(parsed("~/a", "b", "./~c", "-c", "~/x")) == {
        "runs": [tmp_path / "a", Path("b"), Path("~c")], "ckpt": f"{tmp_path}/x",
    }  # fmt: skip
    assert parsed("--ckpt=~/x").ckpt == f"{tmp_path}/x"
    with pytest.raises(UserError, match="no user nobody_such"):
        parsed("-c", "~nobody_such/x")
