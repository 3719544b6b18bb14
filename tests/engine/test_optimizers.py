"""The optimizers of both update rules, and what they refuse."""

from __future__ import annotations

import pytest
from yacs.config import CfgNode as CN

from mdistiller.engine.update import DotUpdate, SumUpdate
from mdistiller.errors import UnknownNameError, UserError

from ._small import config, network


@pytest.mark.parametrize("rule", [SumUpdate, DotUpdate])
def test_unknown_optimizer_is_refused(rule):
    with pytest.raises(UnknownNameError, match=r"SOLVER.TYPE.*'Lion'; known: (AdamW, )?SGD"):
        rule(network().parameters(), config(TYPE="Lion"))


@pytest.mark.parametrize("delta", [0.1, 0.95, -0.2])
def test_dot_momenta_must_stay_below_one(delta):
    with pytest.raises(UserError, match="take a smaller DELTA"):
        DotUpdate(network().parameters(), config(DOT=CN({"DELTA": delta})))
