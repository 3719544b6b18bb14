"""Without detectron2: the commands say how to install it. Runs with detectron2 installed or not."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

DETECTION = Path(__file__).resolve().parents[2] / "detection"


@pytest.mark.parametrize("tool", ["train_net", "merge_weights", "export_student"])
def test_no_detectron2(tool, monkeypatch, capsys):
    loaded = [name for name in sys.modules if name.split(".")[0] in ("detection", "detectron2")]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", [tool])
    importlib.invalidate_caches()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(DETECTION / f"{tool}.py"), run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: detectron2 is not installed: run `make detection`, or see docs/detection.md, Installation\n"
