"""Semantic calibration for cross-layer distillation: attention pairs each of the student's maps with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name
from ..distributed.gather import gather_batch
from ..errors import UserError
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, POSITIVE, TEMPERATURE
from ._base import Distiller, Features, Losses, register
from ._feature_maps import OTHER_MAPS, align, probe_pair, require_maps
from ._precision import full_precision
from .facts import image_size_of
from .KD import kd_loss

# SOLVER.BATCH_SIZE where a method is built by hand, from a tree without it: that of `engine/cfg.py`.
_BATCH_SIZE = 64


@full_precision
def similarities(x: Tensor, size: int) -> Tensor:
    """The inner products of each image's features with those of all images of the batch.

        G[b, k] = <x_b, x_k> for the k-th image of the batch over all ranks, 0 for k up to `size` where there is none

    Args:
        x: (B, ...), this rank's images; the products have gradients in both factors.
        size: number of columns, at least that of the images of all ranks.

    Returns:
        (B, size), the dtype of `x`; float32 for half precision.

    Raises:
        UserError: there are more images than columns.
    """
    x = x.flatten(1)
    batch = gather_batch(x)
    if len(batch) > size:
        raise UserError(
            f"SEMCKD's layers are for batches of up to {size} images, as SOLVER.BATCH_SIZE says, and a batch has "
            f"{len(batch)}; set SOLVER.BATCH_SIZE to the images of a full batch"
        )
    return F.pad(x @ batch.T, (0, size - len(batch)))


@full_precision
def semantic_attention(queries: Tensor, keys: Tensor, soft: float) -> Tensor:
    """How much each of the student's maps attends to each of the teacher's, for each image.

        a[b, i, :] = softmax over j of <q_i[b], k_j[b]> / soft

    Args:
        queries: (B, S, D), one for each of the student's maps.
        keys: (B, T, D), one for each of the teacher's.
        soft: > 0; a larger one spreads the attention.

    Returns:
        (B, S, T), whose rows sum to 1.

    Raises:
        ValueError: soft <= 0.

    Reference: Chen et al. 2021, arXiv 2012.03236, equation 5.
    """
    if soft <= 0:
        raise ValueError(f"SEMCKD's SOFT must be positive, it is {soft}")
    return torch.einsum("bsd,btd->bst", queries, keys).div(soft).softmax(dim=2)


@full_precision
def map_distance(f_s: Tensor, f_t: Tensor) -> Tensor:
    """The mean squared difference of two maps of one shape (B, C, H, W), for each image: (B,) >= 0."""
    return (f_s - f_t).square().flatten(1).mean(dim=1)


@full_precision
def semckd_loss(attention: Tensor, distances: Tensor) -> Tensor:
    """The distances of all pairs of maps, weighted by attention.

        loss = sum_(b, i, j) a[b, i, j] d2[b, i, j] / (B S)

    Args:
        attention: (B, S, T), see `semantic_attention`.
        distances: (B, S, T), see `map_distance`.

    Returns:
        () >= 0, the distances' dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ.

    Cost: negligible; that of the method are its S T regressors, each of three convolutions with up to 4 C_t^2 weights
    for each of 9 places.

    Reference: Chen et al. 2021, arXiv 2012.03236, equation 7; `SemCKDLoss` in their code,
    https://github.com/DefangChen/SemCKD.
    """
    if attention.shape != distances.shape:
        raise ValueError(f"attention {tuple(attention.shape)} and distances {tuple(distances.shape)} differ in shape")
    return (attention * distances).sum() / (attention.shape[0] * attention.shape[1])


class Embedding(nn.Module):
    """Rows of similarities (B, size) to unit vectors (B, width): linear to 2 width, ReLU, linear, L2 norm."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(size, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return _unit_vectors(x, self)


@full_precision
def _unit_vectors(x: Tensor, own: Embedding) -> Tensor:
    """Outside autocast, as the products of two maps exceed the numbers of float16."""
    return F.normalize(own.linear2(F.relu(own.linear1(x))), dim=1)


class Regressor(nn.Module):
    """(B, C_s, H, W) -> (B, C_t, H, W): 1x1, BatchNorm, ReLU, 3x3, BatchNorm, ReLU, 1x1, of 2 C_t channels between."""

    def __init__(self, channels_s: int, channels_t: int) -> None:
        super().__init__()
        between = 2 * channels_t
        self.regressor = nn.Sequential(
            nn.Conv2d(channels_s, between, 1, bias=False), nn.BatchNorm2d(between), nn.ReLU(inplace=True),
            nn.Conv2d(between, between, 3, padding=1, bias=False), nn.BatchNorm2d(between), nn.ReLU(inplace=True),
            nn.Conv2d(between, channels_t, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.regressor(x)


def regressor_name(i: int, j: int) -> str:
    """The name of the regressor from the student's map i to the teacher's map j: regressor01, regressor1_11.

    From ten maps on the two numbers are set apart, because regressor111 might be that of maps 1 and 11 or 11 and 1.
    """
    return f"regressor{i}{j}" if max(i, j) < 10 else f"regressor{i}_{j}"


class CrossLayerAttention(nn.Module):
    """The layers of SemCKD: maps of student and teacher -> attention and distances (B, S, T).

    Args:
        channels_s, channels_t: of the student's S and the teacher's T maps.
        size: number of images of a full batch, over all ranks; queries and keys have a fourth of it.
        soft: see `semantic_attention`.
    """

    def __init__(self, channels_s: Sequence[int], channels_t: Sequence[int], size: int, soft: float) -> None:
        super().__init__()
        self.size, self.soft, self.counts = size, soft, (len(channels_s), len(channels_t))
        width = max(size // 4, 1)
        for role, count in zip(("query", "key"), self.counts):
            for i in range(count):
                self.add_module(f"{role}_{i}", Embedding(size, width))
        for i, own in enumerate(channels_s):
            for j, taught in enumerate(channels_t):
                self.add_module(regressor_name(i, j), Regressor(own, taught))

    def _embedded(self, role: str, maps: Sequence[Tensor]) -> Tensor:
        """(B, number of maps, width)."""
        rows = [getattr(self, f"{role}_{i}")(similarities(x, self.size)) for i, x in enumerate(maps)]
        return torch.stack(rows, dim=1)

    def _distance(self, i: int, j: int, f_s: Tensor, f_t: Tensor) -> Tensor:
        f_s, f_t = align(f_s, f_t)
        return map_distance(getattr(self, regressor_name(i, j))(f_s), f_t)

    def forward(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        attention = semantic_attention(self._embedded("query", maps_s), self._embedded("key", maps_t), self.soft)
        distances = [self._distance(i, j, s, t) for i, s in enumerate(maps_s) for j, t in enumerate(maps_t)]
        return attention, torch.stack(distances, dim=1).unflatten(1, self.counts)


@register(
    "SEMCKD",
    CN({"TEMPERATURE": 4.0, "SOFT": 1.0, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0, "FEAT_WEIGHT": 400.0})}),
    ranges={
        "TEMPERATURE": TEMPERATURE, "SOFT": POSITIVE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE,
        "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
    },
)
class SemCKD(Distiller):
    """Cross-entropy with the labels, `kd_loss` with the teacher, and `semckd_loss` of every pair of their maps.

    The maps are those of all stages after the stem. Attention depends on the similarities between the images of a
    batch, over all ranks, so that its layers have as many inputs as a full batch has images: SOLVER.BATCH_SIZE. In a
    smaller batch, as the last one of an epoch, the similarities to the images that are missing are 0. The authors' code
    leaves such a batch out. A larger batch is refused.

    Args:
        image_size: of the run.

    Raises:
        UserError: a network lists no maps after its stem, or other features than maps.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits", "feats")
    compares_images = True
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        own = cfg.SEMCKD
        self.temperature = own.TEMPERATURE
        self.ce_loss_weight, self.kd_loss_weight = own.LOSS.CE_WEIGHT, own.LOSS.KD_WEIGHT
        self.feat_loss_weight = own.LOSS.FEAT_WEIGHT
        self.first = tuple(int(getattr(network, "stem_in_feats", True)) for network in (student, teacher))
        probed = probe_pair(student, teacher, image_size or image_size_of(cfg))
        maps_s, maps_t = (self._stages(features, role, student, teacher) for role, features in enumerate(probed))
        require_maps([(s.shape, t.shape) for s in maps_s for t in maps_t], "SEMCKD", (student, teacher))
        self.reads_only("teacher", ["logits", *(f"feats[{self.first[1] + j}]" for j in range(len(maps_t)))])
        size = cfg.get("SOLVER", {}).get("BATCH_SIZE", _BATCH_SIZE)
        channels_s, channels_t = ([f.shape[1] for f in maps] for maps in (maps_s, maps_t))
        self.attention = CrossLayerAttention(channels_s, channels_t, size, own.SOFT)

    def _stages(self, features: Features, role: int, *networks: nn.Module) -> Sequence[Tensor]:
        """The maps after the stem of the student (`role` 0) or of the teacher (1)."""
        maps = features.get("feats", [])
        if len(maps) <= self.first[role]:
            student, teacher = map(network_name, networks)
            raise UserError(
                f"SEMCKD compares the maps of all stages after the stem, and the {('student', 'teacher')[role]} has "
                f"{len(maps)} feature maps ({student} and {teacher}); {OTHER_MAPS}"
            )
        return maps[self.first[role] :]

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.attention.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.attention)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, features_student = self.student(image)
        logits_teacher, features_teacher = self.teacher_forward(image)
        maps_s, maps_t = (f["feats"][first:] for f, first in zip((features_student, features_teacher), self.first))
        loss_feat = semckd_loss(*self.attention(maps_s, maps_t))
        return logits_student, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": self.kd_loss_weight * kd_loss(logits_student, logits_teacher, self.temperature),
            "loss_feat": self.feat_loss_weight * loss_feat,
        }
