"""One training step of every method with networks of other libraries; docs/networks.md has the outcome as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from mdistiller.dataset.batch import VIEWS
from mdistiller.distillers import Distiller, RunFacts, distiller_dict, method_defaults
from mdistiller.distillers.contract import check_distiller, check_losses, gradient_gap
from mdistiller.engine.split_update import TASK_LOSSES
from mdistiller.errors import UserError
from mdistiller.models.parameters import flat_parameters
from mdistiller.models.sources import build_network

NETWORKS = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/vit_b_16",
    "torchvision/convnext_tiny",
    "torchvision/swin_t",
    "timm/resnet18",
    "timm/tf_efficientnet_lite0",
    "timm/vit_tiny_patch16_224",
    "timm/convnext_atto",
    "timm/mobilenetv4_conv_small",
)
PARTNER = "resnet8"  # of this library
SIZE, CLASSES, BATCH, IMAGES = 64, 4, 4, 16
FACTS = RunFacts(IMAGES, CLASSES, ("a", "b", "c", "d"), SIZE, 3, (0.5,) * 3, (0.25,) * 3)
ROLES = ("teacher", "student")
METHODS = tuple(sorted(distiller_dict))


@dataclass(frozen=True)
class Outcome:
    """What became of a method on a pair of networks.

    Attributes:
        refusal: the line that refuses it; empty if it trained.
        gap: what the trainer says of parameters without a gradient; empty if there are none.
        losses: by name.
        reached: whether a distillation loss has a gradient in the student's outputs.
    """

    refusal: str = ""
    gap: str = ""
    losses: Mapping[str, float] | None = None
    reached: bool = False


@lru_cache(maxsize=3)
def network(name: str) -> nn.Module:
    """The network for images of 64x64 and four classes; built once, as the large ones take a second."""
    torch.manual_seed(0)
    return build_network(name, CLASSES, SIZE)


@cache
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        **{name: torch.randn(BATCH, 3, SIZE, SIZE, generator=generator) for name in ("image", *VIEWS)},
        "target": torch.tensor([0, 1, 2, 2]),
        "epoch": 1,
        "index": torch.arange(BATCH),
        "contrastive_index": torch.randint(IMAGES, (BATCH, 9), generator=generator),
    }


def config(groups: str, *settings: Any) -> CN:
    """Every method's defaults, with the `groups` of DCGD and a bank that four images need."""
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.DISTILLER = CN({"PAIRS": []})
    cfg.merge_from_list(["CRD.NCE.K", 8, "DCGD.GROUPS", groups, *settings])
    return cfg


def build(method: str, student: nn.Module, teacher: nn.Module, cfg: CN) -> Distiller:
    """The method as a run builds it, in training mode."""
    for own in (student, teacher):
        own.requires_grad_(True).zero_grad()
    torch.manual_seed(1)
    distiller = distiller_dict[method].from_run(student, teacher, cfg, FACTS)
    check_distiller(distiller)
    return distiller.train()


def trained(method: str, student: nn.Module, teacher: nn.Module, cfg: CN) -> Outcome:
    """The outcome of a step of `method`."""
    try:
        distiller = build(method, student, teacher, cfg)
    except UserError as error:
        return Outcome(refusal=str(error))
    seen: list[Tensor] = []
    hook = student.register_forward_hook(lambda module, inputs, output: seen.extend(_tensors(output)))
    try:
        logits, losses = distiller(**batch())
    finally:
        hook.remove()
    assert logits.shape == (BATCH, CLASSES)
    check_losses(distiller, losses.values())
    own = [f for f in seen if f.requires_grad]
    distilling = [loss for name, loss in losses.items() if name not in TASK_LOSSES] or list(losses.values())
    slopes = torch.autograd.grad(sum(distilling), own, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    sum(losses.values()).backward()  # type: ignore[union-attr]
    learnable = flat_parameters(distiller.get_learnable_parameters())
    assert all(p.grad.isfinite().all() for p in learnable if p.grad is not None)
    return Outcome(
        gap=gradient_gap(distiller, [p for p in learnable if p.grad is None]),
        losses={name: loss.item() for name, loss in losses.items()},
        reached=any(slope is not None and bool(slope.ne(0).any()) for slope in slopes),
    )


def outcome(method: str, name: str, role: str, groups: str) -> Outcome:
    """What becomes of `method` with the network `name` in its `role`, beside `PARTNER`."""
    own, partner = network(name), network(PARTNER)
    student, teacher = (own, partner) if role == "student" else (partner, own)
    return trained(method, student, teacher, config(groups))


def _tensors(output: Any) -> list[Tensor]:
    logits, features = output
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in features.values()]
    return [logits, *(tensor for own in lists for tensor in own)]
