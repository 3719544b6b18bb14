"""DeepKD's optimizer: a momentum each for the gradients of the task, of the target and of the other classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .split_gradients import TASK, SplitOptimizer, decayed, move

TARGET, OTHERS = "momentum_target_buffer", "momentum_others_buffer"


class DeepKDOptimizer(SplitOptimizer):
    """SGD with three momenta: of the task's gradient, of the target part's and of the non-target part's.

        v_task   <- momentum * v_task + g_task,                            p <- p - lr * v_task
        v_others <- momentum_others * v_others + g_others,                 p <- p - lr * v_others
        v_target <- momentum_target * v_target + g_target + weight_decay * p,   p <- p - lr * v_target

    in this order: the decay is that of the parameter that the first two lines have moved. A buffer starts as its first
    gradient (the target's with its decay).

    What a parameter uses that not all three gradients reach:

    | reached by | momentum | weight decay |
    |---|---|---|
    | one gradient | the mean of the three momenta | task: none; others: from the second step on; target: once in the \
first step, twice from the second on |
    | target and others | each the other's | once, in the target's buffer |
    | task and one other | each its own | in the target's buffer, if it is the target |

    So in the released code. In a step a missing gradient of a kind that once was there counts as zero.

    Args:
        params: parameters, or parameter groups with their own values of the arguments below.
        lr: >= 0; a tensor () for a step that a CUDA graph records.
        momentum: of the task gradient, >= 0.
        momentum_target: of the target part's gradient, >= 0.
        momentum_others: of the non-target part's gradient, >= 0.
        weight_decay: >= 0.
        released: use for the task's buffer what the released code uses: the momentum of the target part, where that
            reaches the parameter, or else that of the non-target part. So `momentum` has no effect but in means.

    Raises:
        ValueError: a value out of range.

    Reference: Huang et al. 2025, arXiv 2505.15133.
    """

    kinds = (OTHERS, TARGET, TASK)
    title = "DeepKD"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        momentum_target: float = 0.0,
        momentum_others: float = 0.0,
        weight_decay: float = 0.0,
        released: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_target": momentum_target,
            "momentum_others": momentum_others,
            "weight_decay": weight_decay,
            "released": released,
        }
        numbers = ("lr", "momentum", "momentum_target", "momentum_others", "weight_decay")
        super().__init__(params, defaults, numbers)

    def _update(self, params: list[Tensor], group: dict[str, Any], reach: frozenset[str]) -> None:
        for kind in (kind for kind in (TASK, OTHERS, TARGET) if kind in reach):
            grads = self._decayed(params, group["weight_decay"], kind, alone=len(reach) == 1)
            buffers = self._buffers(params, grads, kind, _momentum(kind, reach, group))
            move(params, buffers, group["lr"])

    def _decayed(self, params: list[Tensor], decay: float, kind: str, alone: bool) -> list[Tensor]:
        """The gradients of a kind with their weight decay; see the class."""
        grads = self._grads(kind, params)
        if kind == TARGET:
            grads = decayed(grads, params, decay)
        if alone and kind != TASK:
            first = [kind not in self.state[p] for p in params]
            grads = [g if new else decayed([g], [p], decay)[0] for g, p, new in zip(grads, params, first)]
        return grads


def _momentum(kind: str, reach: frozenset[str], group: dict[str, Any]) -> float:
    """The momentum of a kind's buffer, of a parameter that the kinds `reach` reach."""
    own = {TASK: group["momentum"], TARGET: group["momentum_target"], OTHERS: group["momentum_others"]}
    if len(reach) == 1:
        return sum(own.values()) / len(own)
    if kind == TASK:
        return own[TARGET if TARGET in reach else OTHERS] if group["released"] else own[TASK]
    if TASK not in reach:
        return own[TARGET if kind == OTHERS else OTHERS]
    return own[kind]
