"""A backward pass in Python: torch's engine asks the driver for its streams, and a fake GPU has none.

It calls the nodes of the graph as the engine does, so that each derivative runs its operations; hooks do not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


@torch.no_grad()
def run_backward(loss: Tensor) -> None:
    """Add the gradients of `loss` () to the `.grad` of the leaves."""
    root: Any = loss.grad_fn
    if root is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    arriving: dict[Any, dict[int, Tensor]] = {root: {loss.output_nr: torch.ones_like(loss)}}
    waiting = _uses(root)
    ready = [root]
    while ready:
        node = ready.pop()
        grads = _passed(node, arriving.pop(node, {}))
        for (following, number), grad in zip(node.next_functions, grads):
            if following is None:
                continue
            if grad is not None:
                own = arriving.setdefault(following, {})
                own[number] = own[number] + grad if number in own else grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _uses(root: Any) -> dict[Any, int]:
    """How often each node of the graph is led to."""
    uses: dict[Any, int] = {}
    nodes = [root]
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if following is not None:
                if following not in uses:
                    nodes.append(following)
                uses[following] = uses.get(following, 0) + 1
    return uses


def _passed(node: Any, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """What a node makes of the gradients that have arrived, one for each of its `next_functions`."""
    if not arrived:  # its output was not used
        return (None,) * len(node.next_functions)
    if node.name().endswith("AccumulateGrad"):
        (grad,) = (_fitted(grad, node.variable) for grad in arrived.values())
        node.variable.grad = grad if node.variable.grad is None else node.variable.grad + grad
        return ()
    outputs = list(enumerate(node._input_metadata))
    if isinstance(node, BackwardCFunction):  # of a torch.autograd.Function, which gets zeros for an unused output
        result = node.apply(*(_fitted(arrived[i], like) if i in arrived else _zeros(like) for i, like in outputs))
    else:
        result = node(*(_fitted(arrived[i], like) if i in arrived else None for i, like in outputs))
    return result if isinstance(result, tuple) else (result,)


def _zeros(like: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _fitted(grad: Tensor, like: Any) -> Tensor:
    """The gradient in the shape and dtype of what it belongs to, as the engine brings it there."""
    if grad.device != like.device:
        raise AssertionError(f"a gradient is on {grad.device}, what it belongs to on {like.device}")
    return grad.sum_to_size(like.shape).to(like.dtype)
