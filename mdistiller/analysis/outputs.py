"""A network's outputs on a data set: logits, pooled features, and the spatial mean of every stage's feature maps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from sklearn.manifold import TSNE
from torch import Tensor

from ..dataset.batch import labelled
from ..engine.scores import model_heads
from ..errors import UserError


@dataclass(frozen=True)
class Outputs:
    """A network's outputs on N images, float64.

    Attributes:
        logits: (N, C).
        pooled: (N, D), the input of the classifier.
        stages: for the stem and every stage, (N, channels): its feature map after the activation, averaged over space.
        targets: (N,) int64.
    """

    logits: np.ndarray
    pooled: np.ndarray
    stages: list[np.ndarray]
    targets: np.ndarray


def collect(model: nn.Module, loader: Iterable[Any], head: str | None = None) -> Outputs:
    """Run `model`, in eval mode, over a loader's batches, which have an image and a target by name.

    Args:
        head: for a network with several heads, the one whose logits are collected; None for the first.

    Raises:
        UserError: the network has no head of that name, or a batch no image or no target.
    """
    device = next(model.parameters()).device
    heads = model_heads(model, head) if head else None
    logits, pooled, stages, targets = [], [], [], []
    with torch.inference_mode():
        for image, target in labelled(loader):
            image = image.to(device)
            out, features = model(image)
            logits.append(heads(image)[str(head)].cpu() if heads else out.cpu())
            pooled.append(features["pooled_feat"].cpu())
            stages.append([f.mean(dim=(2, 3)).cpu() for f in features["feats"]])
            targets.append(target.cpu())
    by_stage = [_joined(batches) for batches in zip(*stages)]
    return Outputs(_joined(logits), _joined(pooled), by_stage, torch.cat(targets).numpy())


def _joined(batches: Iterable[Tensor]) -> np.ndarray:
    return torch.cat(list(batches)).double().numpy()


def tsne(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of features (N, D): points (N, 2) on a plane. Neighbourhoods are meaningful, distances are not.

    Raises:
        UserError: fewer than four images.

    Reference: van der Maaten and Hinton 2008, JMLR 9.
    """
    if len(features) < 4:
        raise UserError(f"t-SNE needs four images at least, not {len(features)}")
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
