"""Run by test_steps.py, alone or under torchrun: some steps of several configurations.

    python steps_worker.py TEACHER CASES OUT

CASES is JSON: name -> {"overrides": [...], "steps": N} and, if wanted, "bad": [rank, step, what], see `spoil`, and
"still": true for BatchNorms that evaluate. OUT.RANK gets by name what `steps` returns. Compiled steps run without code
generation.
"""

import json
import sys

import torch
import torch.nn as nn

from mdistiller.dataset import get_dataset
from mdistiller.dataset.batch import VIEWS
from mdistiller.distillers import RunFacts
from mdistiller.distributed.ranks import joined_ranks
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.runtime.seeds import seed_everything
from mdistiller.engine.trainer import trainer_dict
from tests._networks import NanGradient


def spoil(trainer, rank, step, what):
    """On this rank, in this step from 1, put NaN into the value or the gradient of a distillation loss."""
    if trainer.ranks.rank != rank:
        return
    forward, calls = trainer.distiller._trained_by(), []

    def forward_of_step(**batch):
        calls.append(1)
        logits, losses = forward(**batch)
        if len(calls) == step:
            name = "loss_kd" if "loss_kd" in losses else "loss_nckd"
            losses[name] = losses[name] * torch.nan if what == "loss" else NanGradient.apply(losses[name])
        return logits, losses

    trainer.distiller._trained_by = lambda: forward_of_step


def steps(teacher, case, folder):
    """In float64: what the steps return (None where skipped), and the distiller's state before each and at the end."""
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        [
            *("LOG.WANDB", "False", "LOG.PREFIX", folder, "EXPERIMENT.DEVICE", "cpu", "EXPERIMENT.SEED", "0"),
            *("DISTILLER.TEACHER", "resnet14", "DISTILLER.TEACHER_CKPT", teacher),
            *("DATASET.TRAIN_FRACTION", "0.1", "CRD.NCE.K", "32"),
            *case["overrides"],
        ],
    )
    seed_everything(cfg.EXPERIMENT.SEED)
    train_loader, val_loader, *_ = get_dataset(cfg)
    distiller = build_distiller(cfg, RunFacts.of(cfg, train_loader)).double()
    trainer = trainer_dict[cfg.SOLVER.TRAINER]("run", distiller, train_loader, val_loader, cfg)
    trainer.distiller.train()
    for layer in trainer.distiller.modules() if case.get("still") else ():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    if "bad" in case:
        spoil(trainer, *case["bad"])
    taken, states, error = [], [], ""
    for number, batch in zip(range(1, case["steps"] + 1), trainer.train_loader):
        states.append({k: v.clone() for k, v in trainer.distiller.state_dict().items()})
        fields = trainer.prepare_batch(batch, 1)
        fields |= {name: fields[name].double() for name in ("image", *VIEWS) if name in fields}
        try:
            result = trainer.step(fields, 1, number)
        except NonFiniteLossError as stop:
            error = str(stop)
            break
        taken.append(None if result is None else result.images)
    states.append({k: v.clone() for k, v in trainer.distiller.state_dict().items()})
    return {"taken": taken, "states": states, "error": error, "in_a_row": getattr(trainer.nan_policy, "in_a_row", 0)}


def compile_without_code(function, mode=None, _compile=torch.compile, **options):
    return _compile(function, backend="aot_eager", **options)


def main():
    torch.compile = compile_without_code
    teacher, cases, out = sys.argv[1:]
    torch.set_num_threads(1)
    with joined_ranks("cpu") as ranks:
        torch.save({name: steps(teacher, case, out) for name, case in json.loads(cases).items()}, f"{out}.{ranks.rank}")


if __name__ == "__main__":
    main()
