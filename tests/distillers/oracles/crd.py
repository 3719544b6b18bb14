"""CRD as the paper writes it: one image, one entry of the bank, one logarithm at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_nce(embed: Tensor, bank: Tensor, contrastive_index: Tensor, temperature: float, z: float) -> Tensor:
    """-mean_B[ log p_0 / (p_0 + K/N) + sum_k log (K/N) / (p_k + K/N) ] with the original's 1e-7 in the denominators."""
    noise = (contrastive_index.shape[1] - 1) / len(bank)
    total = embed.new_zeros(())
    for v, row in zip(embed, contrastive_index.tolist()):
        for place, image in enumerate(row):
            p = torch.exp((v * bank[image]).sum() / temperature) / z
            total = total - torch.log((p if place == 0 else noise) / (p + noise + 1e-7))
    return total / len(embed)


def naive_z(embed: Tensor, bank: Tensor, contrastive_index: Tensor, temperature: float) -> float:
    """N times the mean of exp(score / temperature)."""
    exps = [
        math.exp(float((v * bank[image]).sum()) / temperature)
        for v, row in zip(embed, contrastive_index.tolist())
        for image in row
    ]
    return len(bank) * sum(exps) / len(exps)


def naive_update(bank: Tensor, embed: Tensor, index: Tensor, momentum: float) -> Tensor:
    """The bank after one batch, one image at a time; each new entry is computed from the bank before the batch."""
    after = bank.clone()
    for v, image in zip(embed, index.tolist()):
        entry = momentum * bank[image] + (1 - momentum) * v
        after[image] = entry / entry.pow(2).sum().sqrt()
    return after
