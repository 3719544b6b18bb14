"""Every registered method in each mode alone: it stops and resumes, or `engine.modes` refuses it by name."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from mdistiller.distillers import distiller_dict
from mdistiller.distributed.ranks import Ranks
from mdistiller.engine.modes import MODES
from mdistiller.errors import UserError

from . import alone
from .combinations import refused
from .train_small import traced

BY_NAME = {mode.name: mode for mode in MODES}
# The modes in which methods differ most.
CLOSE = (
    "bf16", "fp16", "micro-batches", "DOT", "EMA", "steps skipped at NaN", "teacher cache", "chosen pairs of maps",
)  # fmt: skip
# They differ in their loss alone from KD and DKD, SDD_KD, MLKD, AB: nothing else of them has a state.
ALIKE = (
    "ABKD", "DIST", "LDRLD", "NKD", "NormKD", "RLD", "TTM", "WTTM", "SDD_DKD", "SDD_NKD", "CRLD", "FSP",
)  # fmt: skip
FROM_FILES = {"DATASET.TYPE": "small_files"}
# What a method needs for a mode beside the mode's own settings.
NEEDS = {
    ("KDSVD", "chosen pairs of maps"): {"DISTILLER.PAIRS": [[1, 1], [2, 2]]},
    ("WKD", "chosen pairs of maps"): {"WKD.LOSS.WKD_FEAT_WEIGHT": 0.08},
    ("FSP", "chosen pairs of maps"): {"DISTILLER.PAIRS": [[1, 1], [2, 2]]},
}


def goes_through(method, mode, folder):
    """What went wrong, in words; nothing if the run stops and resumes, or is refused as the table says."""
    case, settings = {"method": method, mode.name: mode.name}, {**mode.settings, **NEEDS.get((method, mode.name), {})}
    if mode.name in ("loader workers", "broken images skipped"):
        settings |= FROM_FILES
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = alone.stop_and_resume(f"{method} {mode.name}", method, settings, folder, Ranks())
    except UserError as error:
        return "" if refused(case) and " does not go with " in str(error) else f"{mode.name}: {error}"
    return f"{mode.name}: {found[:3]}" if found or refused(case) else ""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in distiller_dict]
)
def test_every_method_stops_and_resumes_in_a_mode_alone(method, folder, registered):
    assert [wrong for name in CLOSE if (wrong := goes_through(method, BY_NAME[name], folder))] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", distiller_dict)
def test_every_method_stops_and_resumes_in_the_other_modes(method, folder, registered):
    names = [name for name in BY_NAME if name not in (*CLOSE, "compiled", "several ranks")]
    assert [wrong for name in names if (wrong := goes_through(method, BY_NAME[name], folder))] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, after a graph break
@pytest.mark.parametrize("method", distiller_dict)
def test_every_method_stops_and_resumes_compiled(method, folder, registered, monkeypatch):
    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    assert goes_through(method, BY_NAME["compiled"], folder) == ""


@pytest.mark.slow
def test_every_method_stops_and_resumes_over_two_ranks(folder, zygote, tmp_path):
    """With BatchNorm over each rank's images, and over all."""
    output = tmp_path / "output.txt"
    status = zygote.launch_pair([str(folder)], tmp_path, output, {}, tool=Path(alone.__file__)).wait()
    assert status == 0, output.read_text()[-3000:]
