"""Values from the command line, read over the configuration."""

import math

import pytest
from yacs.config import CfgNode as CN

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
        (["SOLVER.LR", "1", "SOLVER.EPOCHS"], "override 'SOLVER.EPOCHS' has no value; .*"),
    ],
)
def test_a_bad_override_gets_one_line_that_names_it(yaml_file, overrides, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        load_cfg(yaml_file(""), overrides)


def test_override_pairs():
    assert override_pairs(["A.B", "1", "C", "x"]) == [("A.B", "1"), ("C", "x")]
    assert math.isclose(CFG.DATASET.TRAIN_FRACTION, 1.0)


# Defaults of every type that a method may have.
DEFAULTS = {
    "NONE": None, "BOOL": False, "INT": 4, "FLOAT": 0.5, "TEXT": "a", "EMPTY": [], "NO_ITEMS": (), "INTS": [1, 2],
    "FLOATS": (0.5, 1.5), "MIXED": [0.5, 1], "TEXTS": ["a", "b"], "BOOLS": [True], "PAIRS": [[1, 1], [2, 3]],
    "TUPLES": [(1, 1)], "NAMES": [["a"]], "WITH_NONE": [None, 1], "SUB": {"NONE": None},
}  # fmt: skip


@pytest.fixture
def typed(yaml_file):
    """typed(yaml, overrides): the section TYPED of the configuration, which `CFG` has while the test runs."""
    CFG.TYPED = CN(DEFAULTS)
    yield lambda text="", overrides=(): load_cfg(yaml_file(text), list(overrides)).TYPED
    del CFG["TYPED"]


def same(a, b):
    """Equal in value and type, items too."""
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


GIVEN = [
    ("NONE", "4", 4),
    ("NONE", "-0.5", -0.5),
    ("NONE", "1e-4", 0.0001),
    ("NONE", "True", True),
    ("NONE", "false", False),
    ("NONE", "None", None),
    ("NONE", "null", None),
    ("NONE", "[1, 2.5, a]", "[1, 2.5, a]"),
    ("NONE", "[1, 2.5, 'a', None, True]", [1, 2.5, "a", None, True]),
    ("NONE", "[]", []),
    ("NONE", "[[1, 1], [2, 3]]", [[1, 1], [2, 3]]),
    ("NONE", "((1, 1), (2, 3))", [[1, 1], [2, 3]]),
    ("NONE", "layer4", "layer4"),
    ("NONE", "a/b c", "a/b c"),
    ("NONE", "", ""),
    ("NONE", "'4'", 4),
    ("NONE", "{1: 2}", "{1: 2}"),
    ("NONE", "1" + "0" * 30, 1e30),
    ("SUB.NONE", "7", 7),
    ("BOOL", "true", True),
    ("INT", "4.5", 4.5),
    ("FLOAT", "1", 1.0),
    ("TEXT", "None", "None"),
    ("TEXT", "1e-4", "1e-4"),
    ("EMPTY", "[[1, 1], [2, 3]]", [[1, 1], [2, 3]]),
    ("EMPTY", "[(1, 1)]", [[1, 1]]),
    ("EMPTY", "[1, 0.5]", [1, 0.5]),
    ("EMPTY", "['a']", ["a"]),
    ("EMPTY", "()", []),
    ("NO_ITEMS", "[[1]]", ([1],)),
    ("INTS", "[3, 0.5]", [3, 0.5]),
    ("INTS", "['1e-4', 2]", [0.0001, 2]),
    ("FLOATS", "[1, 2]", (1.0, 2.0)),
    ("MIXED", "[2, 0.25]", [2, 0.25]),
    ("TEXTS", "['x', 1]", ["x", "1"]),
    ("TEXTS", "[]", []),
    ("BOOLS", "[False, True]", [False, True]),
    ("PAIRS", "[[5, 6], [7]]", [[5, 6], [7]]),
    ("PAIRS", "[]", []),
    ("TUPLES", "[[5, 6]]", [(5, 6)]),
    ("NAMES", "[['x', 'y'], []]", [["x", "y"], []]),
    ("WITH_NONE", "[None, 2]", [None, 2]),
]


@pytest.mark.parametrize("key, text, value", GIVEN)
def test_every_type_of_default_is_read_in_its_type_and_survives_the_dump(typed, yaml_file, key, text, value):
    def of(section):
        return section.SUB.NONE if key == "SUB.NONE" else section[key]

    assert same(of(typed("", [f"TYPED.{key}", text])), value)
    cfg = load_cfg(yaml_file(""), [f"TYPED.{key}", text])
    again = load_cfg(yaml_file(cfg.dump()))
    assert again == cfg and same(of(again.TYPED), value)


def test_the_defaults_themselves_survive_the_dump(typed, yaml_file):
    cfg = load_cfg(yaml_file(""))
    again = load_cfg(yaml_file(cfg.dump()))
    assert again == cfg and all(same(again.TYPED[key], DEFAULTS[key]) for key in DEFAULTS if key != "SUB")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("1e-4", 0.0001), ("null", None), ("~", None), ("", None), ("None", None), ("true", True),
        ("[1, 2]", [1, 2]), ("[1e-4, [a, 2]]", [0.0001, ["a", 2]]), ("some words", "some words"), ("'2 '", 2),
        (r'"a\nb\uD83D"', "a\nb\ud83d"), ("' x '", " x "), ("'None of them'", "None of them"),
    ],
)  # fmt: skip
def test_a_default_of_none_takes_any_plain_value_of_yaml(typed, yaml_file, text, value):
    assert same(typed(f"TYPED: {{NONE: {text}}}").NONE, value)
    cfg = load_cfg(yaml_file(f"TYPED: {{NONE: {text}}}"))
    assert load_cfg(yaml_file(cfg.dump())) == cfg


def test_none_takes_back_what_the_file_set(typed):
    """The type comes from the default, not from the value that the file has set."""
    assert typed("TYPED: {NONE: 4}", ["TYPED.NONE", "None"]).NONE is None
    assert typed("TYPED: {NONE: 4}", ["TYPED.NONE", "words"]).NONE == "words"
    assert same(typed("TYPED: {PAIRS: []}", ["TYPED.PAIRS", "[[1, 2]]"]).PAIRS, [[1, 2]])
    assert same(typed("TYPED: {INT: 4.5}", ["TYPED.INT", "5"]).INT, 5)
    with pytest.raises(UserError, match=r"TYPED.PAIRS must be a list of lists such as \[\[1, 1\], \[2, 3\]\], not "):
        typed("TYPED: {PAIRS: []}", ["TYPED.PAIRS", "[1, 2]"])


OPEN = "a number, text, True, False, None, or a list or a list of lists of these"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BOOL: null", "BOOL must be True or False, not None"),
        ("INT: null", "INT must be a number such as 4, not None"),
        ("FLOAT: null", "FLOAT must be a number such as 0.5, not None"),
        ("TEXT: null", "TEXT must be text, not None"),
        ("EMPTY: null", r"EMPTY must be a list such as \[\], not None"),
        ("INTS: null", r"INTS must be a list such as \[1, 2\], not None"),
        ("FLOATS: [0.5, null]", r"FLOATS must be a list of numbers such as \[0.5, 1.5\], not \[0.5, None\]"),
        ("INTS: [1, [2]]", r"INTS must be a list of numbers such as \[1, 2\], not \[1, \[2\]\]"),
        ("TEXTS: [a, [b]]", r"TEXTS must be a list of text such as \['a', 'b'\], not \['a', \['b'\]\]"),
        ("TEXTS: [a, null]", r"TEXTS must be a list of text such as \['a', 'b'\], not \['a', None\]"),
        ("TEXTS: a", r"TEXTS must be a list such as \['a', 'b'\], not 'a'"),
        ("BOOLS: [1]", r"BOOLS must be a list of True and False such as \[True\], not \[1\]"),
        ("PAIRS: [[1, a]]", r"PAIRS must be a list of lists such as \[\[1, 1\], \[2, 3\]\], not \[\[1, 'a'\]\]"),
        ("NONE: {a: 1}", f"NONE must be {OPEN}, not {{'a': 1}}"),
        ("NONE: 2026-11-23", rf"NONE must be {OPEN}, not datetime.date\(2026, 11, 23\)"),
        ("NONE: [[[1]]]", rf"NONE must be {OPEN}, not .*"),
        ("NONE: &a [*a]", rf"NONE must be {OPEN}, not .*"),
        ("EMPTY: [[{a: 1}]]", r"EMPTY must be a list of numbers, text or lists of these such as \[\], not .*"),
        ("EMPTY: &a [*a]", r"EMPTY must be a list of .*"),
        ("NONE: 0x" + "f" * 5000, "NONE must be finite, not an int of 20000 bits"),
        ("INT: 0x" + "f" * 5000, "INT must be finite, not an int of 20000 bits"),
        ("TEXT: 0x" + "f" * 5000, "TEXT must be text, not an int of 20000 bits"),
    ],
)
def test_a_wrong_type_gets_one_line_that_names_the_key(typed, text, message):
    with pytest.raises(UserError, match=rf"^TYPED\.{message}$") as caught:
        typed(f"TYPED: {{{text}}}")
    assert "\n" not in str(caught.value)


def test_a_key_that_python_refuses_to_write_is_unknown(yaml_file):
    with pytest.raises(UserError, match=r"^unknown config key 'an int of 20000 bits'; known keys: "):
        load_cfg(yaml_file("? 0x" + "f" * 5000 + "\n: 1"))


def test_text_that_is_almost_a_literal_brings_no_warning_of_pythons(typed, recwarn):
    assert typed("", ["TYPED.NONE", "1or"]).NONE == "1or"
    assert recwarn.list == []
