"""Where the project's own files are found."""

import os
import pwd
from pathlib import Path

import pytest

from mdistiller import paths
from mdistiller.errors import UserError


def test_a_file_is_searched_for_in_the_current_folder_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/digits/kd.yaml"
    assert paths.find_file(name) == paths.SHIPPED / name
    (tmp_path / "configs/digits").mkdir(parents=True)
    (tmp_path / name).touch()
    assert paths.find_file(name).resolve() == tmp_path / name
    assert paths.find_file("configs/none.yaml") is None and paths.find_file("configs") is None
    assert paths.find_file("x" * 5000) is None and paths.find_file("a\0b") is None


def test_the_home_folder_is_put_in_place_of_a_leading_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    user = pwd.getpwuid(os.getuid())
    for path, full in {
        "~": tmp_path, "~/a b": f"{tmp_path}/a b", f"~{user.pw_name}/a": f"{user.pw_dir}/a",
        "": "", "a/~": "a/~", "./~": "./~", "$HOME/a": "$HOME/a", "/~/a": "/~/a",
    }.items():  # fmt: skip
        assert paths.expanded(path) == str(full)
        assert paths.expanded(paths.expanded(path)) == str(full)
    (tmp_path / "a.yaml").touch()
    assert paths.find_file("~/a.yaml") == tmp_path / "a.yaml"


@pytest.mark.parametrize("path", ["~nobody_such/x", "~nobody_such", "~a\0b", "~\udcff"])
def test_a_user_that_is_not_there_is_named_unless_a_file_is_called_so(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot expand ~.* of the path ~.*: there is no user .*, or write ./~"):
        paths.expanded(path)
    if "nobody" in path:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
        assert paths.expanded(path) == path


def test_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="cannot expand ~ of the path ~/x: this user has no home folder; set HOME"):
        paths.expanded("~/x")
