"""A fault in a user's own method keeps its traceback in every command, wherever it is; only a UserError is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.commands import eval as eval_command
from mdistiller.commands import table, train
from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.errors import UserError

from .conftest import keep_streams, tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
# ValueError and OSError are what a disk or a wrong value raises as well.
FAULTS = {
    "ValueError": ValueError("not enough values to unpack"),
    "OSError": FileNotFoundError(2, "No such file or directory", "my_statistics.npy"),
    "KeyError": KeyError("feats"),
}


class Mine(Distiller):
    """Cross-entropy; it raises `fault` in the method that `where` names."""

    needs_teacher = False
    where = ""
    fault: Exception

    def __init__(self, student, teacher, cfg):
        super().__init__(student, nn.Identity())
        self._reach("__init__")

    def _reach(self, method):
        if method == self.where:
            raise self.fault

    def get_learnable_parameters(self):
        self._reach("get_learnable_parameters")
        return super().get_learnable_parameters()

    def get_extra_parameters(self):
        self._reach("get_extra_parameters")
        return 0

    def deployments(self):
        self._reach("deployments")
        return super().deployments()

    def forward_heads(self, image):
        self._reach("forward_heads")
        return super().forward_heads(image)

    def load_state_dict(self, *args, **kwargs):
        self._reach("load_state_dict")
        return super().load_state_dict(*args, **kwargs)

    def forward_train(self, image, target, **kwargs):
        self._reach("forward_train")
        logits, _ = self.student(image)
        return logits, {"ce": F.cross_entropy(logits, target)}


@pytest.fixture(autouse=True)
def method(monkeypatch):
    """The method Mine, registered; nothing in it fails yet."""
    monkeypatch.setitem(distiller_dict, "Mine", Mine)
    monkeypatch.setattr(Mine, "where", "")
    return lambda where, fault: (
        monkeypatch.setattr(Mine, "where", where), monkeypatch.setattr(Mine, "fault", fault, raising=False),
    )  # fmt: skip


CONFIG = tiny_config("Mine")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return "mine.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of Mine."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        keep_streams(patch)
        patch.setitem(distiller_dict, "Mine", Mine)
        train.main(["--cfg", str(folder / "mine.yaml"), "LOG.PREFIX", str(folder / "output")])
    (run,) = (folder / "output/p").iterdir()
    return run


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "where", ["__init__", "get_learnable_parameters", "deployments", "forward_heads", "forward_train"]
)
def test_training(config, method, where, fault):
    method(where, FAULTS[fault])
    with pytest.raises(type(FAULTS[fault])) as caught:
        train.main(["--cfg", config])
    assert caught.value is FAULTS[fault]
    assert caught.traceback[-1].name == "_reach"  # it ends in the user's own file


def test_resuming(config, method):
    train.main(["--cfg", config])
    method("load_state_dict", FAULTS["ValueError"])
    with pytest.raises(ValueError, match="not enough values to unpack") as caught:
        train.main(["--cfg", config, "--resume"])
    assert caught.traceback[-1].name == "_reach"


def test_scoring(trained, method):
    for where in ("__init__", "deployments", "forward_heads"):
        method(where, FAULTS["ValueError"])
        with pytest.raises(ValueError, match="not enough values to unpack") as caught:
            eval_command.main(["-c", str(trained / "student_best")])
        assert caught.traceback[-1].name == "_reach"


def test_a_table(trained, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    plan = {"title": "t", "seeds": [0], "methods": {"Mine": {"config": "mine.yaml"}}, "over": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    place = ["EXPERIMENT.PROJECT", "plan_plan", "EXPERIMENT.NAME", "Mine,", "EXPERIMENT.SEED", "0"]
    train.main(["--cfg", "mine.yaml", *place])
    method("get_extra_parameters", FAULTS["ValueError"])
    with pytest.raises(ValueError, match="not enough values to unpack"):
        table.main(["plan.json", "--no-run", "-o", "out"])


def test_what_a_user_gets_wrong_is_one_line_in_the_same_places(config, method, capsys):
    for where in ("__init__", "forward_train"):
        method(where, UserError("MINE.ALPHA must be positive; set it to 1"))
        with pytest.raises(SystemExit) as stopped:
            train.main(["--cfg", config])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "error: MINE.ALPHA must be positive; set it to 1\n"


def test_the_terminal_shows_the_traceback(config, tmp_path):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from mdistiller.distillers import Vanilla, distiller_dict
        class Mine(Vanilla):
            def forward_train(self, image, target, **kwargs):
                one, two = [1]
        distiller_dict["Mine"] = Mine
        from mdistiller.commands.train import main
        main(["--cfg", "mine.yaml"])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "in forward_train" in done.stderr
    assert done.stderr.endswith("ValueError: not enough values to unpack (expected 2, got 1)\n")
