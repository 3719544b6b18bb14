"""Every pinned row of the newer methods: losses, gradients, state names and four training steps.

See golden/new_methods.md. Relative tolerance 1e-6 in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.models import cifar_model_dict

from .. import _golden
from .test_golden import close, name, teacher

ROWS = _golden.load("new_methods")
FACTS = {"image_size": 32, "epochs": 240, "num_classes": 100, "num_data": 50000}

images, labels = cache(_golden.images), cache(_golden.labels)


def config(row: dict[str, Any]) -> CN:
    cfg = CFG.clone()
    cfg.SOLVER.BATCH_SIZE = row["batch"]
    cfg.merge_from_list([x for option in row["case"].get("opts", {}).items() for x in option])
    return cfg


def build(row: dict[str, Any]) -> Distiller:
    case = row["case"]
    student = cifar_model_dict[case["student"]][0](num_classes=100)
    _golden.fill(student, "student.")
    method = distiller_dict[case["method"]]
    facts = {fact: FACTS[fact] for fact in method.needs_run}
    distiller = method(student, teacher(case["teacher"]), config(row), **facts)
    _golden.fill(distiller, "extra.", only=set(row["extra_state"]))
    return distiller.double().train()


def batch(row: dict[str, Any], step: int) -> dict[str, Any]:
    seed, count = row["seed"] + 10 * step, row["batch"]
    views = {"image": images(seed + 1, count, 32)}
    if row.get("views") == 2:
        views = {"image_weak": images(seed + 1, count, 32), "image_strong": images(seed + 4, count, 32)}
    return {**views, "target": labels(seed + 2, count), "epoch": row["case"].get("epoch", 5)}


@contextmanager
def in_double() -> Iterator[None]:
    """A layer that a method makes at its first step is of float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_row(row):
    distiller = build(row)
    state = {k: list(v.shape) for k, v in distiller.state_dict().items() if not k.startswith(("student.", "teacher."))}
    assert state == row["extra_state"]
    extra = {k: v for k, v in distiller.named_parameters() if not k.startswith(("student.", "teacher."))}
    assert distiller.get_extra_parameters() == row["extra_parameters"]

    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for step, expected in enumerate(row["trajectory"]):
        with in_double():
            logits, losses = distiller(**batch(row, step))
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            assert {k: v.item() for k, v in losses.items()} == {k: close(v) for k, v in row["losses"].items()}
            assert logits[0, : len(row["logits_row0"])].tolist() == [close(v) for v in row["logits_row0"]]
            gradients = torch.cat([p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None])
            assert gradients.norm().item() == close(row["student_grad_norm"])
            assert {k: v.grad.norm().item() for k, v in extra.items() if v.grad is not None} == {
                k: close(v) for k, v in row["extra_grad_norm"].items()
            }
        assert total.item() == close(expected), f"step {step}"
        optimizer.step()
