"""Correlation congruence: what sets an image apart from its teacher is compared between neighbours in the batch."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, whole
from ._base import FeatureDistiller, Features, register
from ._feature_maps import probe_pair
from ._precision import full_precision
from .facts import image_size_of


@full_precision
def cc_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Correlation of the distances between student and teacher of images that follow each other in the batch.

        loss = mean_(i = 1..B-1)[ sum_D d_i * d_(i+1) ],   d_i = |f_s_i - f_t_i|

    So it depends on the order of the images, and it is 0 wherever every second image has no distance.

    Args:
        f_s: the student's embedded features (B, D).
        f_t: the teacher's (B, D).

    Returns:
        () >= 0, the student's dtype; float32 for half precision. 0 for a batch of one, which has no neighbours.

    Raises:
        ValueError: the shapes differ.

    Cost: three tensors of the features' size.

    Reference: Peng et al. 2019, arXiv 1904.01802, in the form of the common benchmark's code, not the kernels of its
    section 3.2.
    """
    if f_s.shape != f_t.shape:
        raise ValueError(f"CC needs features of one shape: the student's {tuple(f_s.shape)}, not {tuple(f_t.shape)}")
    distance = (f_s - f_t).abs()
    return (distance[:-1] * distance[1:]).sum() / max(len(distance) - 1, 1)


@register(
    "CC",
    CN({"FEAT_DIM": 128, "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.02})}),
    ranges={"FEAT_DIM": whole(1, 2**16), "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class CC(FeatureDistiller):
    """Cross-entropy with the labels and `cc_loss` between the pooled features, each through its own linear layer.

    Both layers, from D to FEAT_DIM, are trained: the loss alone would be 0 with two constant embeddings. Over several
    processes the whole batch is gathered in its order, so that the neighbours are those of one process.

    Args:
        image_size: of the run.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("pooled_feat",)
    compares_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.CC)
        size = image_size or image_size_of(cfg)
        pooled = [features["pooled_feat"].shape[1] for features in probe_pair(student, teacher, size)]
        self.embed_s, self.embed_t = (nn.Linear(width, cfg.CC.FEAT_DIM) for width in pooled)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.embed_s.parameters(), *self.embed_t.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.embed_s) + count_parameters(self.embed_t)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        embedded = self.embed_s(feature_student["pooled_feat"]), self.embed_t(feature_teacher["pooled_feat"])
        return cc_loss(*map(gather_batch, embedded))
