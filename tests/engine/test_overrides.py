"""Values from the command line, read over the configuration."""

import math

import pytest

from mdistiller.engine.cfg import CFG, load_cfg
from mdistiller.engine.overrides import override_pairs
from mdistiller.errors import UserError


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.LR", "1", 1.0),  # an int where a float is expected
        ("KD.TEMPERATURE", "4.5", 4.5),  # a float where the default happens to be an int
        ("SOLVER.WEIGHT_DECAY", "1e-4", 1e-4),
        ("SOLVER.LR_DECAY_STAGES", "[1, 2]", [1, 2]),
        ("SOLVER.LR_DECAY_STAGES", "(1, 2)", [1, 2]),
        ("SOLVER.LR_DECAY_STAGES", "[]", []),
        ("LOG.WANDB", "False", False),
        ("LOG.WANDB", "false", False),
        ("EXPERIMENT.NAME", "123", "123"),
        ("DISTILLER.TEACHER_CKPT", "a/b c", "a/b c"),
    ],
)
def test_an_override_is_read_in_the_type_of_its_default(yaml_file, key, text, value):
    cfg = load_cfg(yaml_file(""), [key, text])
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value and type(cfg) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.LEARNING", "1"], r"unknown config key 'SOLVER.LEARNING'; .*"),
        (["SOLVR.LR", "1"], r"unknown config key 'SOLVR'; did you mean SOLVER\?"),
        (["KD.TEMPERATUR", "1"], r"unknown config key 'KD.TEMPERATUR'; did you mean KD.TEMPERATURE\?"),
        (["SOLVER", "1"], "SOLVER is a section with keys TRAINER, .*"),
        (["SOLVER.LR.X", "1"], "SOLVER.LR must be a number such as 0.05, not {'X': '1'}"),
        (["SOLVER.LR", "fast"], "SOLVER.LR must be a number such as 0.05, not 'fast'"),
        (["SOLVER.LR", "True"], "SOLVER.LR must be a number such as 0.05, not True"),
        (["SOLVER.LR", "-0.1"], "SOLVER.LR must be positive and finite, not -0.1"),
        (["SOLVER.LR", "1e999"], "SOLVER.LR must be positive and finite, not inf"),
        (["SOLVER.BATCH_SIZE", "0"], "SOLVER.BATCH_SIZE must be a whole number >= 1, not 0"),
        (["SOLVER.BATCH_SIZE", "6.5"], "SOLVER.BATCH_SIZE must be a whole number >= 1, not 6.5"),
        (["SOLVER.LR_DECAY_STAGES", "3"], r"SOLVER.LR_DECAY_STAGES must be a list such as \[150, 180, 210\], not 3"),
        (["SOLVER.LR_DECAY_STAGES", "['a']"], "SOLVER.LR_DECAY_STAGES must be a list of numbers .*"),
        (["LOG.WANDB", "1"], "LOG.WANDB must be True or False, not 1"),
        (["DATASET.VAL_FRACTION", "1"], r"DATASET.VAL_FRACTION must be in \[0, 1\), not 1.0"),
        (["EXPERIMENT.SEED", "-1"], "EXPERIMENT.SEED must be a whole number from 0 .*, not -1"),
        (["SOLVER.LR"], "override 'SOLVER.LR' has no value; .*"),
    ],
)
def test_a_bad_override_gets_one_line_that_names_it(yaml_file, overrides, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        load_cfg(yaml_file(""), overrides)


def test_override_pairs():
    assert override_pairs(["A.B", "1", "C", "x"]) == [("A.B", "1"), ("C", "x")]
    assert math.isclose(CFG.DATASET.TRAIN_FRACTION, 1.0)
