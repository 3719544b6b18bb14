"""2,000 damaged or random configurations and overrides: each is accepted or refused in one line; none runs code."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mdistiller.engine.cfg import CFG, cfg_text, load_cfg
from mdistiller.engine.run_name import experiment_name
from mdistiller.errors import UserError

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
# The same examples every time; none may take long.
quickly = settings(
    max_examples=700, derandomize=True, database=None, deadline=timedelta(seconds=20),
    phases=[Phase.generate, Phase.shrink],  # Phase.explain traces every line
)  # fmt: skip
TEXTS = [path.read_text() for path in sorted(REPOSITORY.glob("configs/*/**/*.yaml"))]


def keys_of(node, above=""):
    for key, value in node.items():
        yield above + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{above}{key}.")


KEYS = sorted(keys_of(CFG))
EVIL = [
    "!!python/object/apply:os.system ['touch executed']", "!!python/object/new:os.system ['touch executed']",
    "!!python/name:os.system", "!!python/module:os", "&a [*a]", "&a {x: *a}", "<<: {a: 1}", "!!binary '!'", "!!set {a}",
    "? [a]\n: b", "1_000", "0x1F", ".inf", "-.inf", ".nan", "2026-11-23", "12:30:45", "~", "''", "\x00", "\t", "- - -",
    "{{}}", "1e400", "10" * 400, "[" * 500, "{" * 500, "'" * 7, "%YAML 9.9", "!!float x", "!!int x", "!!timestamp x",
]  # fmt: skip
VALUES = st.sampled_from(EVIL) | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@pytest.fixture(scope="module", autouse=True)
def nothing_is_executed(config):
    here = os.getcwd()
    os.chdir(config.parent)
    yield
    os.chdir(here)
    assert not set(os.listdir(config.parent)) - {"config.yaml"}


def load(config, overrides=()):
    """Load a configuration as tools/train.py does; an accepted one can be shown, dumped and named."""
    try:
        cfg = load_cfg(config, list(overrides))
        assert cfg_text(cfg) and cfg.dump()
        name = experiment_name(cfg, list(overrides))
    except UserError as error:
        assert 0 < len(str(error)) < 20_000  # it may quote the value
        return
    project, run = name.split("/")
    assert not {project, run} & {"", ".", ".."} and "\0" not in name
    assert max(len(part.encode(errors="surrogatepass")) for part in (project, run)) <= 255


EDIT = st.tuples(
    st.sampled_from(["delete", "insert", "replace", "double", "cut", "value"]),
    st.integers(0, 10**6), st.integers(1, 40), VALUES,
)  # fmt: skip


def edited(text, edits):
    for kind, at, count, value in edits:
        at = at % (len(text) + 1)
        if kind == "value":  # replaces that of one line
            lines = text.split("\n")
            line = at % len(lines)
            lines[line] = lines[line].partition(":")[0] + ": " + value
            text = "\n".join(lines)
        else:
            middle = {"delete": "", "insert": value + text[at : at + count], "replace": value, "cut": ""}
            middle["double"] = text[at : at + count] * 2
            text = text[:at] + middle[kind] + (text[at + count :] if kind != "cut" else "")
    return text


@quickly
@given(st.sampled_from(TEXTS), st.lists(EDIT, min_size=1, max_size=4))
def test_damaged_files(config, text, edits):
    config.write_bytes(edited(text, edits).encode("utf-8", "surrogatepass"))
    load(config)


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(EVIL)
NAMES = st.sampled_from(KEYS) | st.text(max_size=5)
TREE = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@quickly
@given(st.lists(st.tuples(st.sampled_from(KEYS), TREE), max_size=4))
def test_files_of_known_keys_with_any_value(config, settings):
    tree = {}
    for key, value in settings:
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[last] = value
    config.write_text(repr(tree).replace("None", "null"), encoding="utf-8", errors="replace")  # like YAML's flow style
    load(config)


WORD = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(str.lower) | st.text(alphabet="ABC._01 ", max_size=12)


@quickly
@given(st.lists(WORD | VALUES, max_size=3), st.lists(st.tuples(WORD, VALUES), max_size=3))
def test_overrides(config, words, pairs):
    config.write_text("")
    load(config, [*words, *(word for pair in pairs for word in pair)])


def test_evil_values_for_every_key(config):
    config.write_text("")
    for key in KEYS:
        for value in EVIL:
            load(config, [key, value])


def test_values_that_are_too_large_for_every_key(config):
    config.write_text("")
    for key in KEYS:
        for value in ("9" * 400, "9" * 5000, "-1e400", "nan", "[]", "None", "[[[]]]", "()", "{}", "''"):
            load(config, [key, value])


@pytest.mark.parametrize("key", ["NAME", "SEED"])
def test_a_value_of_nested_aliases_is_not_expanded(config, key):
    value = "&a0 [x, x]"
    for level in range(1, 30):
        value = f"&a{level} [{value}, *a{level - 1}]"  # 2^30 leaves when expanded
    config.write_text(f"EXPERIMENT: {{{key}: {value}}}\n")
    load(config)
