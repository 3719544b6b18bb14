"""The record of a run's environment: the commit of the package's own repository, the GPU that is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mdistiller.engine.cfg import CFG
from mdistiller.engine.runtime.environment import commit_of, describe_run, record_run


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of package/code.py, and beside it an environment that it ignores."""
    for name in ("package/code.py", "venv/site-packages/package/code.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    (tmp_path / ".gitignore").write_text("venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_is_that_of_the_repository_that_tracks_the_source(repository):
    commit = git(repository, "rev-parse", "HEAD")
    code = repository / "package" / "code.py"
    assert commit_of(code) == commit
    code.write_text("2\n")
    assert commit_of(code) == f"{commit}-dirty"


def test_a_repository_around_an_installed_package_is_not_its_own(repository):
    assert commit_of(repository / "venv" / "site-packages" / "package" / "code.py") is None
    new = repository / "package" / "new.py"
    new.touch()
    assert commit_of(new) is None  # nobody can check that out


def test_without_repository_or_git_there_is_no_commit(tmp_path, repository, monkeypatch):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "code.py").touch()
    assert commit_of(outside / "code.py") is None
    monkeypatch.setenv("PATH", str(outside))
    assert commit_of(repository / "package" / "code.py") is None


def test_a_git_hook_s_variables_do_not_name_the_repository(repository, tmp_path_factory, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit_of(repository / "package" / "code.py") == commit


def test_the_gpu_is_the_one_that_computes(monkeypatch):
    names = {"cuda": "first", "cuda:0": "first", "cuda:1": "second"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[str(device or "cuda")])
    assert [describe_run(device)["gpu"] for device in ("cpu", "cuda", "cuda:1")] == [None, "first", "second"]


def test_the_record_has_the_facts_of_the_run(tmp_path):
    record_run(tmp_path, CFG, device="cpu", processes=3)
    record = json.loads((tmp_path / "environment.json").read_text())
    assert (record["device"], record["processes"], record["seed"]) == ("cpu", 3, CFG.EXPERIMENT.SEED)
    assert record["command"] == " ".join(sys.argv) and record["gpu"] is None
    assert (tmp_path / "config.yaml").read_text() == CFG.dump()
