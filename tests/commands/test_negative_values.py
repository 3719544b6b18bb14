"""Negative numbers as values of overrides, in every place; the launcher's --local-rank."""

import pytest

from mdistiller.commands import main as mdistiller
from mdistiller.commands import table, train

NEGATIVE = ["-7.5e-2", "-1e-3", "-.5", "-0.5", "-1", "-inf", "-1E+3", "-1.e2", "[-1, 2]", "[-1e-3]"]


@pytest.mark.parametrize("value", NEGATIVE)
@pytest.mark.parametrize("parse, own", [(train.parse_args, ["--cfg", "c.yaml"]), (table.parse_args, ["plan.yaml"])])
def test_a_negative_value_at_any_place(parse, own, value):
    key, other = ["SOLVER.DOT.DELTA", value], ["SOLVER.LR", "1e-3"]
    for words in ([*key, *other], [*other, *key], [*other, "--", *key]):
        for arguments in ([*own, *words], [*own[:1], *own[1:], *words]):
            opts = parse(arguments, None).opts
            assert opts == [word for word in words if word != "--"]


def test_options_stay_options(capsys):
    args = train.parse_args(["SOLVER.DOT.DELTA", "-7.5e-2", "--resume", "--cfg", "c.yaml", "SOLVER.LR", "1"], None)
    assert args.resume and args.cfg == "c.yaml" and args.opts == ["SOLVER.DOT.DELTA", "-7.5e-2", "SOLVER.LR", "1"]
    with pytest.raises(SystemExit):
        train.parse_args(["--cfg", "c.yaml", "--resumee"], None)
    assert "unrecognized arguments: --resumee" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--local-rank=0", "--local_rank=1"])
def test_the_launchers_rank(option, monkeypatch):
    assert train.parse_args([option, "--cfg", "c.yaml"], None).opts == []
    seen = []
    monkeypatch.setattr(train, "main", lambda arguments, prog: seen.append((arguments, prog)))
    mdistiller.main([option, "train", "--cfg", "c.yaml"])
    assert seen == [([option, "--cfg", "c.yaml"], "mdistiller train")]
