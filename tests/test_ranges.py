"""Ranges: what each kind holds, that every number among the settings has one, and what a user sees."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from yacs.config import CfgNode as CN

from mdistiller.distillers import (
    Vanilla,
    declare_defaults,
    distiller_dict,
    method_defaults,
    method_ranges,
    register,
)
from mdistiller.engine.cfg import CFG, check_cfg, load_cfg
from mdistiller.errors import UserError
from mdistiller.experiments.plan import read_plan
from mdistiller.ranges import NOT_NEGATIVE, ODD, PATH, POSITIVE, TEMPERATURE, WHOLE, interval, list_of, one_of, whole

REPOSITORY = Path(__file__).resolve().parents[1]
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, None, "1", [1], {}, 10**400]

NUMBERS = {
    "positive": (POSITIVE, [1, 0.5, 1e-300, 1e308, 10**300], [0, 0.0, -1, -0.5]),
    "not negative": (NOT_NEGATIVE, [0, 0.0, 1, 1e308], [-1, -1e-300]),
    "half open": (interval(0, 1, "[)"), [0, 0.0, 0.999], [1, 1.0, -1e-9, 1.1]),
    "other half open": (interval(0, 1, "(]"), [1, 1.0, 1e-9], [0, 0.0, -1, 1.1]),
    "open": (interval(-1, 1, "()"), [0, -0.99], [-1, 1, 1.0]),
    "closed": (interval(-1, 2, "[]"), [-1, 2, 0.5], [-1.1, 2.1]),
}
WHOLE_NUMBERS = {
    "whole": (WHOLE, [0, 7, -7], []),
    "from 1": (whole(1), [1, 2**62], [0, -1]),
    "from 0": (whole(0), [0, 1], [-1]),
    "odd": (ODD, [1, 3, 101], [0, 2, -1, -3]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(case):
    allowed, inside, outside = NUMBERS[case]
    assert [v for v in inside if not allowed.holds(v)] == []
    assert [v for v in [*outside, *NO_NUMBERS] if allowed.holds(v)] == []


@pytest.mark.parametrize("case", WHOLE_NUMBERS)
def test_whole_numbers(case):
    allowed, inside, outside = WHOLE_NUMBERS[case]
    assert [v for v in inside if not allowed.holds(v)] == []
    # 10**400 is a whole number; `load_cfg` refuses it, as it refuses every int that no tensor can hold
    no_numbers = [v for v in NO_NUMBERS if v != 10**400]
    assert [v for v in [*outside, *no_numbers, 1.5, 1.0, 3.0, "3"] if allowed.holds(v)] == []


def test_words():
    allowed = one_of("fp16", "fp32")
    assert allowed.words == "one of fp16, fp32"
    assert allowed.holds("fp16") and [v for v in ("fp", "", None, 16, ["fp16"], {}) if allowed.holds(v)] == []


def test_lists():
    size = list_of(whole(1), 0, 2)
    assert size.words == "a list of 0 or 2 values, each a whole number >= 1"
    assert [v for v in ([], (), [32, 16], (1, 1)) if not size.holds(v)] == []
    wrong = ([32], [1, 2, 3], [0, 1], [1.5, 2], [True, 2], [math.nan, 2], 32, None, "ab", {1: 2}, [[1, 2], [3, 4]])
    assert [v for v in wrong if size.holds(v)] == []
    pairs = list_of(list_of(whole(0), 2))
    assert pairs.holds([]) and pairs.holds([[0, 1], (2, 3)]) and not pairs.holds([[0, 1], [2]]) and not pairs.holds([0])


def test_sizes():
    """Beyond them, an int64 or a float32 that a loss computes would overflow."""
    assert POSITIVE.refused(0) == "positive and finite" and POSITIVE.refused(1e9) == ""
    assert POSITIVE.refused(1e30, 1e18) == whole(1).refused(2**62, 1e18) == "at most 1e+18 in size"
    assert POSITIVE.refused(1e30) == whole(1).refused(2**62) == ""
    assert TEMPERATURE.refused(2**32) == "at most 1000000000 in size" and POSITIVE.refused(2**32) == ""
    assert whole(1, most=64).refused(65) == "at most 64 in size" and whole(1, most=64).refused(64) == ""
    assert list_of(WHOLE).refused([0, -(10**19)], 1e18) == "at most 1e+18 in size" != list_of(WHOLE).refused([10**11])
    assert PATH.refused("a\0b") and not PATH.refused("") and not one_of("a").refused("a")


def leaves(node, above=""):
    for key, value in node.items():
        yield from leaves(value, f"{above}{key}.") if isinstance(value, CN) else [(above + key, value)]


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_numeric(value):
    return is_number(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(is_number, value)))


@pytest.mark.parametrize("name", sorted(distiller_dict))
def test_every_number_among_a_methods_hyper_parameters_has_a_range_that_holds_its_default(name):
    section = distiller_dict[name].config_section
    for key, default in leaves(method_defaults[section]) if section in method_defaults else ():
        if is_numeric(default):
            allowed = method_ranges[section].get(key)
            assert allowed is not None, f"{section}.{key} has no range"
            assert allowed.holds(default), f"{section}.{key} {default} is not {allowed.words}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True])
def test_no_setting_of_a_run_accepts_what_is_no_number(bad):
    """Of the engine and of every method: whatever has a number, or a list of numbers, as its default."""
    numeric = [(key, default) for key, default in leaves(CFG) if is_numeric(default)]
    assert {"SOLVER.LR", "SOLVER.LR_DECAY_STAGES", "KD.TEMPERATURE", "VID.INPUT_SIZE"} <= {key for key, _ in numeric}
    for key, default in numeric:
        cfg = CFG.clone()
        *sections, last = key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[last] = bad if is_number(default) else [bad, *default[1:]]
        with pytest.raises(UserError, match=f"^{key} must be "):
            check_cfg(cfg)


REFUSED = {
    "KD.TEMPERATURE": ("0", "positive and finite, not 0"),
    "KD.LOSS.KD_WEIGHT": ("-0.1", ">= 0 and finite, not -0.1"),
    "DKD.T": ("-4", "positive and finite, not -4.0"),
    "DKD.WARMUP": ("0.5", "a whole number >= 0, not 0.5"),
    "AT.P": ("0", "positive and finite, not 0"),
    "RKD.PDIST.EPSILON": ("0", "positive and finite, not 0.0"),
    "RKD.ANGLE_WEIGHT": ("1e999", ">= 0 and finite, not inf"),
    "KDSVD.K": ("0", "a whole number >= 1, not 0"),
    "REVIEWKD.WARMUP_EPOCHS": ("-1", "a whole number >= 0, not -1"),
    "REVIEWKD.SHAPES": ("[1, 8, 16, 0]", r"a list of values, each a whole number >= 1, not \[1, 8, 16, 0\]"),
    "REVIEWKD.MAX_MID_CHANNEL": ("0", "a whole number >= 1, not 0"),
    "FITNET.INIT_EPOCHS": ("1.5", "a whole number >= 0, not 1.5"),
    "FITNET.HINT_LAYER": ("1.5", "a whole number, not 1.5"),
    "FITNET.INPUT_SIZE": ("[32]", r"a list of 0 or 2 values, each a whole number >= 1, not \[32\]"),
    "VID.EPS": ("0", "positive and finite, not 0.0"),
    "OFD.CONNECTOR.KERNEL_SIZE": ("2", "an odd whole number >= 1, not 2"),
    "CRD.NCE.K": ("0", "a whole number >= 1, not 0"),
    "CRD.NCE.MOMENTUM": ("1", r"in \[0, 1\), not 1.0"),
    "CRD.FEAT.DIM": ("0", "a whole number >= 1, not 0"),
    "CRD.FEAT.STUDENT_DIM": ("1000000000", "at most 65536 in size, not 1000000000"),
    "CRD.NCE.TEMPERATURE": ("1e30", r"at most 1000000000 in size, not 1e\+30"),
    "RKD.DISTANCE_WEIGHT": ("1e19", r"at most 1e\+18 in size, not 1e\+19"),
    "EXPERIMENT.SEED": (str(2**70), r"a whole number from 0 to 2\*\*63 - 1, not .*"),
    "DCGD.TEMPERATURE": ("0", "positive and finite, not 0.0"),
    "SOLVER.LR_DECAY_STAGES": ("[3, -1]", r"a list of values, each >= 0 and finite, not \[3, -1\]"),
    "SOLVER.BETAS": ("[0.9]", r"two numbers in \[0, 1\), not \[0.9\]"),
    "SOLVER.EPOCHS": (str(10**30), r"a whole number >= 1, not 1e\+30"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_out_of_range_gets_the_same_line_from_yaml_and_from_the_command_line(key, tmp_path):
    text, message = REFUSED[key]
    empty, file = tmp_path / "empty.yaml", tmp_path / "file.yaml"
    empty.write_text("")
    *sections, last = key.split(".")
    file.write_text("".join(f"{section}: {{" for section in sections) + f"{last}: {text}" + "}" * len(sections))
    for path, overrides in ((empty, [key, text]), (file, [])):
        with pytest.raises(UserError, match=f"^{key} must be {message}$"):
            load_cfg(path, overrides)


def test_a_value_out_of_range_in_a_plan_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "title: T\nseeds: [0]\nmethods: {KD: {config: configs/digits/kd.yaml, overrides: {KD.TEMPERATURE: 0}}}\n"
    )
    with pytest.raises(UserError, match=r"KD\.TEMPERATURE must be positive and finite, not 0"):
        read_plan(tmp_path / "p.yaml").jobs("", "KD")


def test_a_real_process_exits_with_2_and_one_line():
    command = ["tools/train.py", "--cfg", "configs/digits/vanilla.yaml", "REVIEWKD.WARMUP_EPOCHS", "-1"]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: REVIEWKD.WARMUP_EPOCHS must be a whole number >= 0, not -1\n"


@pytest.mark.parametrize("key, message", [
    ("T", "MINE has a range for 'T', but no such hyper-parameter"),
    ("LOSS", "MINE has a range for 'LOSS', but no such hyper-parameter"),
    ("A.B", "MINE has a range for 'A.B', but no such hyper-parameter"),
    ("LOSS.W", "the default of MINE.LOSS.W must be positive and finite, not -1.0"),
])  # fmt: skip
def test_a_range_that_does_not_fit_the_defaults_is_the_programmers_error(key, message):
    defaults = CN({"A": 1, "LOSS": CN({"W": -1.0})})
    with pytest.raises(ValueError, match=f"^{message}$"):
        declare_defaults("MINE", defaults, {key: POSITIVE})
    with pytest.raises(ValueError, match=f"^{message}$"):
        register("MINE", defaults, ranges={key: POSITIVE})(Vanilla)
    assert "MINE" not in method_defaults and "MINE" not in method_ranges and "MINE" not in distiller_dict


def test_ranges_need_defaults():
    with pytest.raises(ValueError, match="'MINE' has ranges but no defaults; give them to declare_defaults"):
        register("MINE", section="KD", ranges={"TEMPERATURE": POSITIVE})(Vanilla)
    assert "MINE" not in distiller_dict


def test_a_method_may_be_registered_after_the_tree_was_built():
    declare_defaults("LATE", CN({"T": 1.0}), {"T": POSITIVE})
    try:
        check_cfg(CFG)
        cfg = CFG.clone()
        cfg.LATE = CN({"T": 0.0})
        with pytest.raises(UserError, match=r"LATE\.T must be positive and finite, not 0\.0"):
            check_cfg(cfg)
    finally:
        del method_defaults["LATE"], method_ranges["LATE"]
