"""Every pinned row: losses, gradients, extra parameters and four training steps agree with the reference.

See golden/README.md for how the values were made. Relative tolerance 1e-6 in float64, 2e-6 for KDSVD's loss: the
reference computes it in float32, so that the value itself is uncertain by about 1e-6.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import Distiller, distiller_dict, method_defaults
from mdistiller.models import cifar_model_dict

from .. import _golden

ROWS = _golden.load("distillers")
NUM_DATA = 256  # CRD's bank
# Our state entries that the reference keeps elsewhere or not at all; they are not filled.
OURS = re.compile(r"contrast\.params|log_scales.*")

images, labels = cache(_golden.images), cache(_golden.labels)


def close(value: float, rel: float = 1e-6) -> object:
    return pytest.approx(value, rel=rel, abs=1e-10)


@cache
def teacher(name: str) -> torch.nn.Module:
    """The pinned teacher in float64; in eval mode it computes each batch of images once for all rows."""
    model = cifar_model_dict[name][0](num_classes=100)
    _golden.fill(model, "teacher.")
    model.double()
    forward: Callable = model.forward
    known: dict = {}

    def remembered(image: torch.Tensor) -> object:
        if model.training:
            return forward(image)
        if image not in known:  # by identity; the key keeps the tensor alive
            known[image] = forward(image)
        return known[image]

    model.forward = remembered
    return model


def config(row: dict) -> CN:
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.merge_from_list([x for option in row["case"].get("opts", {}).items() for x in option])
    return cfg


def build(row: dict) -> Distiller:
    case = row["case"]
    student = cifar_model_dict[case["student"]][0](num_classes=100)
    _golden.fill(student, "student.")
    method = distiller_dict[case["method"]]
    run = {"num_data": NUM_DATA} if "num_data" in method.needs_run else {}
    distiller = method(student, teacher(case["teacher"]), config(row), **run)
    _golden.fill(distiller, "extra.", only=set(row["extra_state"]))
    return distiller.double().train()


def batch(row: dict, step: int) -> dict:
    seed = row["seed"] + 10 * step
    fields = {
        "image": images(seed + 1, row["batch"], 32),
        "target": labels(seed + 2, row["batch"]),
        "epoch": row["case"].get("epoch", 5),
    }
    if row["case"]["method"] == "CRD":
        rs = np.random.RandomState(seed + 3)
        index = rs.permutation(NUM_DATA)[: row["batch"]]
        contrastive = rs.randint(0, NUM_DATA, (row["batch"], row["case"]["opts"]["CRD.NCE.K"] + 1))
        contrastive[:, 0] = index
        fields |= {"index": torch.from_numpy(index), "contrastive_index": torch.from_numpy(contrastive)}
    return fields


def name(row: dict) -> str:
    return "-".join(str(x) for x in row["case"].values() if isinstance(x, str))


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_row(row):
    distiller = build(row)
    state = {k: list(v.shape) for k, v in distiller.state_dict().items() if not k.startswith(("student.", "teacher."))}
    assert {k: v for k, v in state.items() if k in row["extra_state"] or not OURS.fullmatch(k)} == row["extra_state"]
    extra = {k: v for k, v in distiller.named_parameters() if not k.startswith(("student.", "teacher."))}
    assert distiller.get_extra_parameters() == row["extra_parameters"]

    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for step, expected in enumerate(row["trajectory"]):
        logits, losses = distiller(**batch(row, step))
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert total.item() == close(expected), f"step {step}"
        if step == 0:
            rel = 2e-6 if row["case"]["method"] == "KDSVD" else 1e-6
            assert {k: v.item() for k, v in losses.items()} == {k: close(v, rel) for k, v in row["losses"].items()}
            assert logits[0, : len(row["logits_row0"])].tolist() == [close(v) for v in row["logits_row0"]]
            gradients = torch.cat([p.grad.flatten() for p in distiller.student.parameters() if p.grad is not None])
            assert gradients.norm().item() == close(row["student_grad_norm"])
            assert {k: v.grad.norm().item() for k, v in extra.items() if v.grad is not None} == {
                k: close(v) for k, v in row["extra_grad_norm"].items()
            }
        optimizer.step()


def test_every_method_has_a_row_and_its_defaults():
    defaults = _golden.load("configs")["defaults"]
    for section in {row["case"]["method"] for row in ROWS} - {"NONE"}:
        ours = method_defaults[section]
        assert {k: ours[k] for k in defaults[section]} == defaults[section]


def test_constructors_keep_the_original_signature():
    for method, cls in distiller_dict.items():
        arguments = list(inspect.signature(cls).parameters)
        assert arguments[:3] == ["student", "teacher", "cfg"], method
