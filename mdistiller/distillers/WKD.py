"""WKD: Wasserstein distances, between predictions over the distances of classes (L) and between feature maps (F)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import warn
from ..errors import UserError
from ..grouping import load_distances
from ..models.classifier import classifier_of
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, PATH, POSITIVE, TEMPERATURE, WHOLE, list_of, whole
from ._base import Distiller, Features, Losses, cosine_fall, register
from ._feature_maps import hint_layers, input_size, probe_pair, regressor, require_maps
from ._logits import check_logits
from ._precision import full_precision

DEFAULTS = CN(
    {
        "TEMPERATURE": 8.0,
        # "fc": cosine distances of the teacher's classifier rows; or a file with the (C, C) distances of the classes.
        "COST_MATRIX": "fc",
        # kappa of D' = 1 - exp(-kappa D); 0: D itself.
        "COST_MATRIX_SHARPEN": 1.0,
        "SINKHORN": CN({"LAMBDA": 0.05, "ITER": 10}),
        "HINT_LAYER": -1,
        "INPUT_SIZE": [32, 32],
        "SPATIAL_GRID": 1,
        "MEAN_COV_RATIO": 4.0,
        "EPS": 1e-5,
        "LOSS": CN(
            {"CE_WEIGHT": 1.0, "WKD_LOGIT_WEIGHT": 0.0, "WKD_FEAT_WEIGHT": 0.0, "COSINE_DECAY_EPOCH": 150}
        ),
    }
)  # fmt: skip

RANGES = {
    "TEMPERATURE": TEMPERATURE,
    "COST_MATRIX": PATH,
    "COST_MATRIX_SHARPEN": NOT_NEGATIVE,
    "SINKHORN.LAMBDA": POSITIVE,
    "SINKHORN.ITER": whole(1, 10000),
    "HINT_LAYER": WHOLE,  # a negative one counts from the deepest map
    "INPUT_SIZE": list_of(whole(1), 0, 2),
    "SPATIAL_GRID": whole(1),
    "MEAN_COV_RATIO": NOT_NEGATIVE,
    "EPS": POSITIVE,
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.WKD_LOGIT_WEIGHT": NOT_NEGATIVE,
    "LOSS.WKD_FEAT_WEIGHT": NOT_NEGATIVE,
    "LOSS.COSINE_DECAY_EPOCH": whole(0),
}


@full_precision
def target_loss(logits_student: Tensor, logits_teacher: Tensor, target: Tensor) -> Tensor:
    """WKD-L's term of the labelled class: mean_B[ -p_t(y) log p_s(y) ] at temperature 1; () in nats.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels y.

    Reference: Lv et al. 2024, arXiv 2412.08139, section 3.1.
    """
    log_student, log_teacher = (
        F.log_softmax(logits, dim=1).gather(1, target[:, None]) for logits in (logits_student, logits_teacher)
    )
    p = log_teacher.exp()
    return -(p * log_student.masked_fill(p == 0, 0)).mean()


@full_precision
def transport_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    distances: Tensor,
    temperature: float,
    smoothing: float,
    iterations: int,
) -> Tensor:
    """Entropic transport cost between the two predictions over the C - 1 classes other than the label.

        loss = mean_B[ sum_ij u_i K_ij v_j c_ij ],   c = max(D, 0) + 1e-8,   K = exp(-c / smoothing)
        u = 1 / (C - 1), then `iterations` times:   v = p_t / (K' u + 1e-8),   u = p_s / (K v + 1e-8)

    p = softmax(z / T) over the other classes. The gradient passes through all iterations. They do not converge: the
    value depends on their number, as in the authors' code.

    All images share one K: a label has weight 0 in u and v, and so takes no part. This takes 2 `iterations` + 1
    products of (B, C) with (C, C). Of two classes only one is not the label, and nothing is to be moved. An image whose
    other classes the teacher masks out with -inf has the value 0.

    Args:
        logits_student: (B, C), C >= 2, before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels.
        distances: D (C, C), from the student's class i to the teacher's class j; see `sharpened`.
        temperature: T > 0.
        smoothing: the authors' lambda; the smaller, the closer to the Wasserstein distance, and the larger is 1 / K.
        iterations: of Sinkhorn.

    Returns:
        () in the unit of D, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, T <= 0, or C < 2.

    Reference: Lv et al. 2024, arXiv 2412.08139, section 3.1; Cuturi 2013, arXiv 1306.0895.
    """
    check_logits(logits_student, logits_teacher, temperature)
    classes = logits_student.shape[1]
    if classes < 2:
        raise ValueError(f"WKD needs two classes or more, the logits have {classes}")
    others = torch.arange(classes, device=target.device) != target[:, None]
    p_student, p_teacher = (_others_softmax(z / temperature, others) for z in (logits_student, logits_teacher))
    cost = distances.clamp(min=0) + _SMALL
    kernel = torch.exp(-cost / smoothing)
    u, v = others.to(cost.dtype) / (classes - 1), p_teacher
    for _ in range(iterations):
        v = p_teacher / (u @ kernel + _SMALL)
        u = p_student / (v @ kernel.T + _SMALL)
    return (u * (v @ (kernel * cost).T)).sum(dim=1).mean()


_SMALL = 1e-8  # part of the definition: K falls to exp(-1 / 0.05) = 2e-9


def _others_softmax(logits: Tensor, others: Tensor) -> Tensor:
    """(B, C) probabilities over the classes `others` (B, C), 0 for the label; all 0 where every other one is -inf."""
    logits = logits.masked_fill(~others, -torch.inf)
    empty = (logits == -torch.inf).all(dim=1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(dim=1).masked_fill(empty, 0)


def classifier_distances(weight: Tensor) -> Tensor:
    """1 - cosine between the rows of a classifier: (C, D) -> (C, C), from 0 to 2."""
    rows = F.normalize(weight, dim=1)
    return 1 - rows @ rows.T


def sharpened(distances: Tensor, kappa: float) -> Tensor:
    """1 - exp(-kappa D): (C, C) -> (C, C); D itself for kappa 0."""
    return 1 - torch.exp(-kappa * distances) if kappa else distances


@full_precision
def gaussian_loss(
    feat_student: Tensor, feat_teacher: Tensor, ratio: float, grid: int = 1, eps: float = 1e-5
) -> Tensor:
    """Squared Wasserstein distance between Gaussians of diagonal covariance, fitted to each part of two maps.

        loss = 1 / (B g^2) * sum_{B, C, parts}[ ratio (m_s - m_t)^2 + (s_s - s_t)^2 ],   s = sqrt(var + eps)

    m and var are a channel's mean and variance, with divisor n - 1, over the n positions of a part; a variance of one
    position is 0. g = `grid` divides both height and width into g parts, which differ by one row or column where g does
    not divide them. A map with fewer than g rows or columns has as many parts as those, and g^2 is their number.

    Args:
        feat_student: (B, C, H, W).
        feat_teacher: (B, C, H, W); not detached here.
        ratio: weight of the means, the authors' MEAN_COV_RATIO.

    Returns:
        () >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ.

    Reference: Lv et al. 2024, arXiv 2412.08139, section 3.2.
    """
    if feat_student.shape != feat_teacher.shape:
        raise ValueError(f"maps {tuple(feat_student.shape)} and {tuple(feat_teacher.shape)} differ in shape")
    parts = min(grid, feat_student.shape[2]), min(grid, feat_student.shape[3])
    (mean_s, std_s), (mean_t, std_t) = (_moments(f, parts, eps) for f in (feat_student, feat_teacher))
    squares = ratio * (mean_s - mean_t).square() + (std_s - std_t).square()
    return squares.sum() / (len(feat_student) * parts[0] * parts[1])


def _moments(feat: Tensor, parts: tuple[int, int], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(var + eps) of every part of every channel, each (B, C, parts)."""
    rows, columns = (_membership(size, count, feat) for size, count in zip(feat.shape[2:], parts))
    # One product sums over all parts: reductions over their few positions take a CPU much longer.
    member = torch.kron(rows, columns)
    positions, cells = member.sum(dim=0), feat.flatten(2)
    mean = cells @ (member / positions)
    centred = cells - mean @ member.T
    var = centred.square() @ (member / (positions - 1).clamp(min=1))
    return mean, (var + eps).sqrt()


def _membership(size: int, parts: int, like: Tensor) -> Tensor:
    """(size, parts): 1 where an index is in a part, of about equal lengths, else 0."""
    part = torch.arange(size, device=like.device) * parts // size
    return (part[:, None] == torch.arange(parts, device=like.device)).to(like.dtype)


@register("WKD", DEFAULTS, ranges=RANGES)
class WKD(Distiller):
    """Cross-entropy with the labels and Wasserstein distances of predictions (WKD-L), of maps (WKD-F), or of both.

        loss_kd = target + f(epoch) * WKD_LOGIT_WEIGHT * transport      (L)
                + f(epoch) * WKD_FEAT_WEIGHT * gaussian                 (F)

    by `target_loss`, `transport_loss` and `gaussian_loss`. f is 1 up to epoch COSINE_DECAY_EPOCH, then falls by a
    cosine to 0 at the last epoch; it does not weigh the target term. A weight of 0 leaves its part out. If both are 0,
    only the target term remains, and a warning says so.

    L: the distances between classes are those of the teacher's classifier rows (COST_MATRIX fc), or those of a file;
    `grouping.class_distances` computes the paper's. F: the student's map HINT_LAYER, counted in both networks' lists,
    from the deepest if negative, goes through a regressor to the teacher's; a pair in DISTILLER.PAIRS, [[student's map,
    teacher's map]], replaces it.

    Args:
        image_size: of the run; without it WKD.INPUT_SIZE counts, [] for the data set's.
        epochs: of the run; without it SOLVER.EPOCHS.

    Raises:
        UserError: the teacher tells no classifier, the file does not hold distances of its classes, there is no such
            map (see `FitNet`), or DISTILLER.PAIRS is set without WKD-F.

    Reference: Lv et al. 2024, arXiv 2412.08139.
    """

    needs_run = ("image_size", "epochs")
    teacher_outputs = ("logits", "feats")
    soft_labels = True
    reads_labels = True  # the classes other than the label are what is transported
    compares_maps = True

    def __init__(
        self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None, epochs: int | None = None
    ) -> None:
        super().__init__(student, teacher)
        self.own = own = cfg.WKD
        self.epochs = cfg.SOLVER.EPOCHS if epochs is None else epochs
        self.features, self.logits = own.LOSS.WKD_FEAT_WEIGHT > 0, _compares_logits(own)
        outputs = []
        if self.logits:
            outputs.append("logits")
            self._build_logits(teacher)
        if self.features:
            size = input_size(own.INPUT_SIZE, image_size, cfg, "WKD.INPUT_SIZE")
            outputs.append(self._build_features(cfg, size))
        elif cfg.get("DISTILLER", {}).get("PAIRS", []):
            raise UserError("DISTILLER.PAIRS is for WKD-F, but WKD.LOSS.WKD_FEAT_WEIGHT is 0; set it, such as to 0.08")
        self.reads_only("teacher", outputs)

    def _build_logits(self, teacher: nn.Module) -> None:
        if not self.own.LOSS.WKD_LOGIT_WEIGHT:
            warn(
                "WKD compares neither predictions nor maps: its weights are 0, and only its target term remains; set "
                "WKD.LOSS.WKD_LOGIT_WEIGHT, such as to 200, or WKD.LOSS.WKD_FEAT_WEIGHT, such as to 0.08"
            )
        elif self.own.COST_MATRIX == "fc":
            # In a tuple, so that the teacher's weights are in the state dict once.
            self._classifier = (classifier_of(teacher),)
        else:
            like = next(teacher.parameters())
            distances = load_distances(self.own.COST_MATRIX, "WKD.COST_MATRIX").to(like.device, like.dtype)
            # Not in the state dict: the setting says which it is.
            self.register_buffer("_distances", distances, persistent=False)

    def _build_features(self, cfg: CN, size: int | tuple[int, int]) -> str:
        """Build the regressor; returns the teacher's map by name."""
        networks = self.student, self.teacher
        maps_s, maps_t = (features["feats"] for features in probe_pair(*networks, size))
        counts = len(maps_s), len(maps_t)
        self.layer_s, self.layer_t = hint_layers(cfg, "WKD", counts, networks)
        hint = maps_s[self.layer_s].shape, maps_t[self.layer_t].shape
        require_maps([hint], "WKD", networks)
        self.conv_reg = regressor(*hint)
        return f"feats[{self.layer_t}]"

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...] | None:
        return None if _compares_logits(cfg.WKD) else ("WKD.LOSS.CE_WEIGHT",)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        own = list(self.conv_reg.parameters()) if self.features else []
        return [*super().get_learnable_parameters(), *own]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.conv_reg) if self.features else 0

    def distances(self) -> Tensor:
        """D' (C, C), of the teacher as it is now."""
        with torch.no_grad():
            of_classifier = hasattr(self, "_classifier")
            own = classifier_distances(self._classifier[0].weight) if of_classifier else self.get_buffer("_distances")
            return sharpened(own, self.own.COST_MATRIX_SHARPEN)

    def _logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor, factor: float | Tensor) -> Tensor:
        loss = target_loss(student, teacher, target)
        weight = self.own.LOSS.WKD_LOGIT_WEIGHT
        if not weight:
            return loss
        distances = self.distances()
        if len(distances) != student.shape[1]:
            raise UserError(
                f"WKD.COST_MATRIX {self.own.COST_MATRIX} has the distances of {len(distances)} classes, the networks "
                f"have {student.shape[1]}"
            )
        settings = self.own.TEMPERATURE, self.own.SINKHORN.LAMBDA, self.own.SINKHORN.ITER
        return loss + factor * weight * transport_loss(student, teacher, target, distances, *settings)

    def _feature_loss(self, student: Features, teacher: Features) -> Tensor:
        guided, hint = self.conv_reg(student["feats"][self.layer_s]), teacher["feats"][self.layer_t]
        rest = self.own.MEAN_COV_RATIO, self.own.SPATIAL_GRID, self.own.EPS
        return self.own.LOSS.WKD_FEAT_WEIGHT * gaussian_loss(guided, hint, *rest)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, feature_student = self.student(image)
        logits_teacher, feature_teacher = self.teacher_forward(image)
        factor = cosine_fall(kwargs["epoch"], self.own.LOSS.COSINE_DECAY_EPOCH, self.epochs)
        parts = []
        if self.logits:
            parts.append(self._logit_loss(logits_student, logits_teacher, target, factor))
        if self.features:
            parts.append(factor * self._feature_loss(feature_student, feature_teacher))
        return logits_student, {
            "loss_ce": self.own.LOSS.CE_WEIGHT * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": sum(parts),  # type: ignore[dict-item]
        }


def _compares_logits(own: CN) -> bool:
    """Whether the section asks for WKD-L, or for neither part."""
    return bool(own.LOSS.WKD_LOGIT_WEIGHT > 0 or own.LOSS.WKD_FEAT_WEIGHT == 0)
