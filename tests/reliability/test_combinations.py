"""Modes together: each pair of them, with one and two ranks and with a short last batch, stopped and resumed.

A case runs through, and is stopped within an epoch and resumed; both must end alike, bit for bit. The pairs that no
case holds are those that `engine.modes` refuses, which must happen in one line before anything starts.
"""

import random
import signal

import pytest

from mdistiller.engine.modes import MODES

from .combinations import (
    COMPILED,
    FACTORS,
    METHODS,
    OFF,
    SIGNALS,
    compiled_cases,
    described,
    launcher_of,
    plain_cases,
    refused,
    refused_pairs,
    run_of,
    steps_of,
)
from .covering import pairs_of
from .runs import differences
from .small import write_data

PLAIN, COMPILING = plain_cases(), compiled_cases()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of all runs, with the data that they share."""
    found = tmp_path_factory.mktemp("combinations")
    write_data(found / "data")
    return found


def test_every_pair_is_in_a_case_or_refused():
    """Counted naively, without the table's pairs."""
    for (one, a), (other, b) in pairs_of(FACTORS):
        held = any(case[one] == a and case[other] == b for case in PLAIN + COMPILING)
        pair = {one: a, other: b}
        methods = [pair] if "method" in pair else [{"method": method, **pair} for method in METHODS]
        assert held or all(map(refused, methods)), pair
        assert not (held and refused(pair)), pair
    assert not any(map(refused, PLAIN + COMPILING))


def test_every_mode_is_a_level_and_not_the_default():
    levels = [level for own in FACTORS.values() for level in own if level != OFF]
    assert {mode.name for mode in MODES} <= set(levels) and len(levels) == len(set(levels))


def stops_and_resumes(case, number, folder, zygote):
    """Run the case through, and again with a stop; both must leave the same files."""
    launcher = launcher_of(case, zygote)
    whole = run_of(case, folder / f"whole{number}", launcher)
    whole.finish()
    step = random.Random(number).randrange(2, 2 * steps_of(case) - 3)
    sent = SIGNALS[case["stopped by"]]
    stopped = run_of(case, folder / f"stopped{number}", launcher, stop=f"{step} {int(sent)}")
    status = stopped.start().wait()
    said = stopped.output.read_text()
    # A rank whose neighbour was killed may notice that before it is killed itself.
    expected = {143} if sent == signal.SIGTERM else {-9, 1}
    assert status in expected and "Best accuracy" not in said, f"exit {status} after step {step}:\n{said[-3000:]}"
    if sent == signal.SIGTERM:
        assert "stopped by signal 15; the same command with --resume goes on from here" in said
    stopped.environment = {}
    stopped.finish()
    assert differences(whole.log_path, stopped.log_path) == []


@pytest.mark.parametrize("number", range(len(PLAIN)), ids=map(described, PLAIN))
def test_a_combination_stops_and_resumes(number, folder, zygote):
    stops_and_resumes(PLAIN[number], f"{number}", folder, zygote)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMPILING)), ids=map(described, COMPILING))
def test_a_compiled_combination_stops_and_resumes(number, folder, zygote):
    stops_and_resumes(COMPILING[number], f"{number}c", folder, zygote)


def test_refused_pairs_are_refused_in_one_line_before_anything_starts(folder, zygote):
    cases = [dict(pair) for pair in sorted(refused_pairs()) if COMPILED not in pair]
    assert len(cases) >= 16
    runs = []
    for number, pair in enumerate(cases):
        case = {"method": "KD", "student": "small", "data": "small_images", **pair}
        run = run_of(case, folder / f"refused{number}", launcher_of(case, zygote))
        runs.append((pair, run, run.start()))
    for pair, run, process in runs:
        assert process.wait() == 2, pair
        said = run.output.read_text()
        assert said.startswith("error: ") and said.count("\n") == 1 and " does not go with " in said, said
        assert not (run.folder / "output").exists()
