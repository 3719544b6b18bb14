"""The clock of an epoch."""

import time

import pytest

from mdistiller.engine.epoch_state import Clock


def test_a_restored_clock_continues():
    first = Clock()
    for _ in first.around(iter([1, 2])):
        time.sleep(0.01)
    state = first.state_dict()
    assert state["training"] >= 0.02 > state["data"] >= 0
    second = Clock(**state)
    second.stop_training()
    metrics = second.metrics(steps=2, images=4)
    assert metrics["epoch_seconds"] >= state["training"] and metrics["data_time"] == pytest.approx(state["data"] / 2)
    assert metrics["images_per_second"] == pytest.approx(4 / second.training)
