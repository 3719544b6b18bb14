"""The optimizers of both update rules, and what they refuse."""

from __future__ import annotations

import pytest

from mdistiller.engine.split_update import DotUpdate
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UnknownNameError

from ._small import config, network


@pytest.mark.parametrize("rule", [SumUpdate, DotUpdate])
def test_unknown_optimizer_is_refused(rule):
    with pytest.raises(UnknownNameError, match=r"SOLVER.TYPE.*'Lion'; known: (AdamW, )?SGD"):
        rule(network().parameters(), config(TYPE="Lion"))
