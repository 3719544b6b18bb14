"""The benchmark of the losses compares equals, and every loss has its target."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def losses():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import losses

        yield losses
        for name in ("losses", "naive_losses", "loss_share"):
            del sys.modules[name]


def test_both_forms_of_each_loss_agree(losses):
    targets = {}
    for case in losses.cases(batch=4, negatives=64, num_data=500):
        losses.check_agreement(case)
        targets[case.name] = case.target
    assert targets == {"NST": 30, "CRD": 10, "OFD": 4, "KDSVD": 2.5, "RKD": 3, "AT": 1.1, "ReviewKD": 1.1}


def test_crd_needs_a_twentieth_of_the_memory(losses):
    """With K 4096 and N 12,500, a quarter of the benchmark's; the ratio is the same."""
    case = losses.crd(64, 4096, 12_500)
    assert losses.peak_mebibytes(case.naive, case.leaves) > 20 * losses.peak_mebibytes(case.ours, case.leaves)


def test_rkd_in_float32_is_more_accurate_than_the_naive_form(losses):
    errors = losses.rkd_errors()
    assert errors["ours_gradient"] < errors["naive_gradient"] / 3


@pytest.mark.parametrize("method", ["KD", "MLKD", "SIMKD", "WKD"])
def test_the_share_of_a_loss_is_measured_between_networks_whose_outputs_are_kept(losses, method):
    """Only SIMKD has layers of its own, whose time is told."""
    result = losses.share(method, repeats=1, batch=4)
    assert result["step_ms"] > 0 and result["loss_ms"] > 0
    assert (result["layers_share"] > 0.001) == (method == "SIMKD")


def test_every_method_with_a_teacher_has_a_share(losses):
    assert {"KD", "CRLD", "NORM", "CTKD", "FITNET"} <= set(losses.methods())
    assert not {"NONE", "DCGD_KD"} & set(losses.methods())
    row = {"step_ms": 100.0, "loss_ms": 30.0, "layers_ms": 5.0, "share": 0.3, "layers_share": 0.05}
    assert losses.share_table({"A": row}).endswith("above a tenth")
