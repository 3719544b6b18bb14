"""Every registered method on the device against the CPU: the losses and the gradients of one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdistiller.distillers import Distiller, distiller_dict

from ..distillers.test_registry import batch, build


def step(distiller: Distiller, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, Any]]:
    """The losses of a batch, and the gradients of their sum, as float64 on the CPU."""
    distiller.to(device=device, dtype=dtype)
    fields = {k: _to(v, device, dtype) for k, v in batch().items()}
    logits, losses = distiller(**fields)
    assert logits.device.type == device.type and all(loss.device.type == device.type for loss in losses.values())
    sum(losses.values()).backward()
    grads = {k: p.grad.double().cpu() for k, p in distiller.named_parameters() if p.requires_grad}
    return {k: v.item() for k, v in losses.items()}, grads


# Methods whose loss is float32 in a float64 run too, as in the original.
IN_FLOAT32 = {"KDSVD"}


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A field of a batch on `device`; images and views in `dtype`."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", sorted(distiller_dict))
def test_losses_and_gradients_are_those_of_the_cpu(method: str, dtype: torch.dtype, device: torch.device) -> None:
    """In float64 up to rounding; in float32 (without TF32) the gradients' difference is small against their length."""
    within = 1e-7 if dtype == torch.float64 and method not in IN_FLOAT32 else 2e-3
    here, there = (step(build(method), where, dtype) for where in (torch.device("cpu"), device))
    assert there[0] == pytest.approx(here[0], rel=within, abs=within * 1e-3)
    assert there[1].keys() == here[1].keys()
    length = torch.stack([grad.norm() for grad in here[1].values()]).norm()
    apart = {name: float((there[1][name] - grad).norm() / length) for name, grad in here[1].items()}
    worst = max(apart, key=lambda name: apart[name])
    assert apart[worst] < within, f"{worst} differs by {apart[worst]:.1e} of the gradients' length"
