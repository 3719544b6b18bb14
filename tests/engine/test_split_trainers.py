"""Whole runs of DeepKD over KD and DKD, and of DHKD with aligned gradients: resumed, recorded, logged, deployed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdistiller.distillers import DHKD, DKD, KD, Distiller
from mdistiller.engine.cfg import CFG
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.trainer import Aligned, BaseTrainer, DeepKD
from mdistiller.models.cost import network_cost

from .._networks import Net
from ._recorder import recording  # noqa: F401
from ._runs import STEPS, Interrupted, rows_of, student_of, trainer_of

EMA = ("SOLVER.EMA", "0.9")
RUNS = {
    "DeepKD, KD": (KD, DeepKD, ("SOLVER.DEEPKD.TOPK", "2", *EMA)),
    "DeepKD, DKD": (DKD, DeepKD, ("SOLVER.DEEPKD.RELEASED", "True", "EXPERIMENT.LOGIT_STAND", "True")),
    "DHKD": (DHKD, Aligned, ("SOLVER.NAN_POLICY", "skip", *EMA)),
}


def method_of(method: type[Distiller], *overrides: str) -> Distiller:
    torch.manual_seed(1)
    student, teacher = Net(), Net()
    cfg = CFG.clone()
    cfg.merge_from_list(list(overrides))
    facts = {name: {"image_size": 8}[name] for name in method.needs_run}
    return method(student, teacher, cfg, **facts)


def run_of(folder: Any, run: str, name: str = "run", *more: str) -> BaseTrainer:
    method, cls, overrides = RUNS[run]
    return trainer_of(folder, *overrides, *more, cls=cls, name=name, distiller=method_of(method, *overrides))


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(run, tmp_path):
    whole = run_of(tmp_path, run, "whole")
    whole.train()
    stopped = run_of(tmp_path, run)
    stopped.log = Interrupted(stopped.log, calls=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = run_of(tmp_path, run)
    resumed.train(resume=True)
    one, other = (load_checkpoint(trainer.log_path / "latest") for trainer in (whole, resumed))
    assert all(torch.equal(one["model"][key], value) for key, value in other["model"].items())
    states = [content["optimizer"]["state"] for content in (one, other)]
    for own, again in zip(states[0].values(), states[1].values(), strict=True):
        assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own)


@pytest.mark.parametrize("run", [run for run in RUNS if run != "DHKD"])  # a host that skips steps records none
def test_a_recorded_run_ends_as_the_run_itself(run, tmp_path, recording):  # noqa: F811
    usual = run_of(tmp_path, run, "usual", "SOLVER.CUDA_GRAPH", "never")
    usual.train()
    trainer = run_of(tmp_path, run)
    trainer.train()
    assert recording.recorded == 1 and trainer.take_step.recording.replays == 2 * (STEPS - 1) - 3
    for name, tensor in student_of(usual).items():
        torch.testing.assert_close(student_of(trainer)[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_three_losses_are_logged_and_three_momenta_saved(tmp_path):
    trainer = run_of(tmp_path, "DeepKD, KD")
    trainer.train()
    row = rows_of(trainer)[-1]
    parts = [float(row[f"loss/{name}"]) for name in ("loss_task", "loss_tckd", "loss_nckd")]
    assert sum(parts) == pytest.approx(float(row["train_loss"]), rel=1e-4)
    saved = load_checkpoint(trainer.log_path / "latest")["optimizer"]["state"][0]
    assert saved.keys() == {"momentum_buffer", "momentum_target_buffer", "momentum_others_buffer"}


def test_dhkd_deploys_the_student_alone(tmp_path):
    trainer = run_of(tmp_path, "DHKD")
    trainer.train()
    assert student_of(trainer).keys() == Net().state_dict().keys()
    assert {"head.weight", "head.bias"} <= load_checkpoint(trainer.log_path / "latest")["model"].keys()
    assert network_cost(trainer.distiller.deployments()["student"], 8) == network_cost(Net(), 8)
    assert set(trainer.state.last_acc) == {"student", "ema"}


@pytest.mark.parametrize("run", RUNS)
def test_bf16_trains_close_to_full_precision(run, tmp_path):
    losses = []
    for amp in ("none", "bf16"):
        trainer = run_of(tmp_path, run, amp, "SOLVER.AMP", amp)
        trainer.train()
        losses.append(float(rows_of(trainer)[-1]["train_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
