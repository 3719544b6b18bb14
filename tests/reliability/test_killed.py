"""tools/train.py, killed by SIGKILL at random moments and resumed, ends bit for bit like an uninterrupted run."""

import os
import random
import signal
from collections import Counter

import pytest

from .runs import METHODS, Run, differences, killed_run, timed

pytestmark = pytest.mark.slow

KILLS = 10  # per method; tests/soak.py makes 200


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, zygote, method):
    whole = Run(tmp_path / "whole", METHODS[method], zygote.launch)
    seconds = timed(whole)
    moments, stages, chain = random.Random(method), Counter(), 0
    # On a busy machine, the random kills may miss a stage; then a few more are made.
    while stages.total() < KILLS or (missed(stages) and stages.total() < 4 * KILLS):
        killed = Run(tmp_path / f"killed{chain}", METHODS[method], zygote.launch)
        stages += killed_run(killed, moments, max(KILLS - stages.total(), 3), seconds / 6)
        assert differences(whole.log_path, killed.log_path) == []
        chain += 1
    assert not missed(stages), stages


def missed(stages):
    return {"steps", "saving", "validation"} - stages.keys()


def test_two_ranks_killed_or_stopped_together_end_like_uninterrupted_ones(tmp_path, zygote):
    whole, stopped = (Run(tmp_path / name, METHODS["KD"], zygote.launch_pair) for name in ("whole", "stopped"))
    seconds = timed(whole)
    assert stopped.kill_once(seconds / 2)
    latest = stopped.log_path / "latest"
    before = latest.stat().st_ino
    pair = stopped.start()
    while latest.stat().st_ino == before:
        assert pair.poll() is None
    os.kill(pair.ranks[1].pid, signal.SIGTERM)  # one gets the signal, both stop
    assert [rank.wait() for rank in pair.ranks] == [143, 143]
    stopped.finish()
    assert differences(whole.log_path, stopped.log_path) == []
