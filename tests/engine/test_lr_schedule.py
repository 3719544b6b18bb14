"""Learning rates against values computed by hand from the formulas."""

import math

import pytest
import torch

from mdistiller.engine.cfg import CFG
from mdistiller.engine.lr_schedule import adjust_learning_rate, learning_rate
from mdistiller.engine.split_update import DotUpdate
from mdistiller.engine.update import SumUpdate


def config(**solver):
    cfg = CFG.clone()
    cfg.SOLVER.update({"LR": 0.8, "EPOCHS": 10, "LR_DECAY_STAGES": [4, 8], "LR_DECAY_RATE": 0.5} | solver)
    return cfg


def test_the_step_schedule_decays_after_its_stages_and_not_within_an_epoch():
    cfg = config()
    assert [learning_rate(e, cfg, s, 2) for e in (1, 4, 5, 8, 9) for s in (0, 1)] == [0.8] * 4 + [0.4] * 4 + [0.2] * 2


def test_cosine_goes_from_lr_to_lr_min():
    cfg = config(LR_SCHEDULE="cosine", LR_MIN=0.2)
    assert learning_rate(1, cfg) == 0.8
    assert learning_rate(6, cfg) == pytest.approx(0.5)  # halfway: the mean of LR and LR_MIN
    assert learning_rate(3, cfg, 1, 2) == pytest.approx(0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(10, cfg, 99, 100) == pytest.approx(0.2, abs=2e-6)


def test_warm_up_rises_step_by_step_to_the_schedule():
    cfg = config(WARMUP_EPOCHS=2)
    rates = [learning_rate(e, cfg, s, 2) for e in (1, 2, 3) for s in (0, 1)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_cosine_begins_after_the_warm_up():
    cfg = config(LR_SCHEDULE="cosine", WARMUP_EPOCHS=2)
    assert learning_rate(2, cfg, 3, 4) == pytest.approx(0.8)
    assert learning_rate(7, cfg) == pytest.approx(0.4)


@pytest.mark.parametrize("key, value", [("LR_SCHEDULE", "linear"), ("WARMUP_EPOCHS", -1), ("LR_MIN", -0.1)])
def test_bad_settings_are_refused_by_name(key, value, tmp_path):
    from mdistiller.engine.cfg import load_cfg
    from mdistiller.errors import UserError

    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(UserError, match=rf"SOLVER\.{key} must be .*{value}"):
        load_cfg(empty, [f"SOLVER.{key}", str(value)])


@pytest.mark.parametrize("schedule", [{}, {"LR_SCHEDULE": "cosine", "LR_MIN": 0.02}])
@pytest.mark.parametrize("rule", [SumUpdate, DotUpdate])
def test_a_group_at_a_tenth_of_lr_stays_at_a_tenth(rule, schedule):
    """Through the warm-up, the decay and the cosine; the other groups' learning rate is the schedule's, exactly."""
    cfg = config(WARMUP_EPOCHS=2, **schedule)
    tenth, plain, undecayed = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    learnable = [{"params": [tenth], "lr": 0.08}, plain, {"params": [undecayed], "weight_decay": 0.0}]
    optimizer = rule(learnable, cfg).optimizer
    seen = set()
    for epoch in range(1, 11):
        for step in range(3):
            lr = adjust_learning_rate(epoch, cfg, optimizer, step, 3)
            assert lr == learning_rate(epoch, cfg, step, 3)
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            assert rates[id(plain)] == rates[id(undecayed)] == lr
            assert rates[id(tenth)] == pytest.approx(lr / 10, rel=1e-12)
            seen.add(lr)
    assert len(seen) >= 7
