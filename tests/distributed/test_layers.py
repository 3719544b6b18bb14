"""SEMCKD, SIMKD and NORM over two ranks: the steps of one process, short last batch included. Uses torchrun."""

import pytest
import torch

from .test_steps import case, parameters, run, same, teacher  # noqa: F401

METHODS = {
    name: case(32, "DISTILLER.TYPE", name, *more, steps=5, still=still)
    for name, still, more in (
        ("SEMCKD", True, ("SOLVER.LR", "0.001", "SEMCKD.LOSS.FEAT_WEIGHT", "1.0")),
        ("SIMKD", True, ("DISTILLER.STUDENT", "wrn_16_1")),
        ("NORM", True, ("NORM.N", "2")),
    )
} | {
    # BatchNorms over both ranks give one process's steps in training mode, also those that the student's trunk shares.
    "synchronised": case(32, "DISTILLER.TYPE", "SIMKD", "SOLVER.SYNC_BN", "True", steps=2),
    "synchronised, WRN": case(
        32, "DISTILLER.TYPE", "NORM", "NORM.N", "2", "DISTILLER.STUDENT", "wrn_16_1", "SOLVER.SYNC_BN", "True", steps=2
    ),
}


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process(teacher, tmp_path):  # noqa: F811
    one, two = run(2, teacher, METHODS, tmp_path)
    (alone,) = run(1, teacher, METHODS, tmp_path)
    for name, what in METHODS.items():
        states = [of[name]["states"] for of in (one, two, alone)]
        for step in range(what["steps"]):  # up to the last step, in which the ranks' shares differ in size
            a, b, expected = map(parameters, (own[step] for own in states))
            assert same(a, b), (name, step)
            for key, value in a.items():
                torch.testing.assert_close(expected[key], value, rtol=1e-8, atol=1e-10, msg=f"{name}: {key}")
        assert same(*map(parameters, (states[0][-1], states[1][-1]))), name
        assert not same(states[0][0], states[0][-1]) and len(one[name]["taken"]) == what["steps"]
