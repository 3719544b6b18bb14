"""A method's `forward_train` through torch.compile: one graph for each size of batch, for the whole training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._functorch import config as functorch_config


class CompiledForward:
    """`forward`, compiled for batches of these sizes only; a caller runs all others uncompiled.

    One graph for every size would be compiled anew at the first short batch, and be slower from then on.

    Args:
        sizes: numbers of images.
        backward_passes: how many a step takes; after the first of several, the graph's memory is still needed.
        ready: whether the next step may be compiled.
        options: those of torch.compile.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        sizes: Collection[int],
        backward_passes: int = 1,
        ready: Callable[[], bool] | None = None,
        **options: Any,
    ) -> None:
        self.function = torch.compile(forward, dynamic=False, **options)
        self.sizes, self.ready = frozenset(sizes), ready
        config: Any = functorch_config
        if backward_passes > 1 and hasattr(config, "donated_buffer"):  # older torch has no such setting
            # By default, the first backward pass takes over the memory of what it needs.
            self.function = config.patch(donated_buffer=False)(self.function)

    def takes(self, batch: dict[str, Any]) -> bool:
        """Whether the batch is of a compiled size, and this step may be compiled."""
        return len(batch["target"]) in self.sizes and (self.ready is None or self.ready())

    def __call__(self, batch: dict[str, Any]) -> Any:
        if isinstance(batch.get("epoch"), int):
            # As a number it would be part of the graph, which would be compiled anew at every epoch.
            batch = {**batch, "epoch": torch.full((), batch["epoch"], device=batch["target"].device)}
        return self.function(**batch)
