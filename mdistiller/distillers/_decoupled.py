"""A distillation loss in two parts: the target against all other classes, and these among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.gather import gather_batch
from ._logits import (
    Temperature,
    check_logits,
    check_two_classes,
    kl_divergence,
    one_against_others,
    softened,
    tempered_mean,
)
from ._precision import full_precision


@dataclass(frozen=True)
class Parts:
    """The two parts for each image, before their T^2.

    Attributes:
        target: (B,) KL(b_t || b_s).
        others: (B,) KL(q_t || q_s).
        log_doubt: (B,) the logarithm of the teacher's 1 - p_t(y); not detached.
    """

    target: Tensor
    others: Tensor
    log_doubt: Tensor


@full_precision
def decoupled_losses(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: Temperature,
    top: int = 0,
    by_doubt: bool = False,
    logit_stand: bool = False,
) -> tuple[Tensor, Tensor]:
    """The target part and the non-target part of a distillation loss, as DeepKD trains on them.

        tckd = T^2 * mean_B[ KL(b_t || b_s) ],   b = (p_y, 1 - p_y),   p = softmax(z / T)
        nckd = w * T^2 * mean_B[ KL(q_t || q_s) ],   q = softmax(z / T) over the classes other than y

    w = 1; with `by_doubt`, w = mean_B[ 1 - p_t(y) ], how little the teacher is sure of the targets. That is a factor of
    the mean over the batch, as in the released code, and without a gradient. Over several ranks it is that of the whole
    batch. KL(p_t || p_s) of one image is tckd + (1 - p_t(y)) * nckd (DKD's equation 6), so that where p_t(y) is equal
    for all images, the sum is `kd_loss`.

    What DKD says of masked classes, far logits and two classes (`dkd_loss`) is true of both parts.

    Args:
        logits_student: (B, C), C >= 2, before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels y in [0, C).
        temperature: T > 0, or one for each image, (B, 1).
        top: q is over those of the teacher's `top` largest classes that are not y; where y is among them, these are one
            less, and of `top` 1 nothing may be left, which is 0. 0, or C and more: over all.
        by_doubt: see above.
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        tckd and nckd, () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, T <= 0, or C < 2.

    Reference: Huang et al. 2025, arXiv 2505.15133; its parts are those of Zhao et al. 2022, arXiv 2203.08679.
    """
    parts = decoupled_parts(logits_student, logits_teacher, target, temperature, top, logit_stand)
    others = tempered_mean(parts.others, temperature)
    if by_doubt:
        others = gather_batch(parts.log_doubt.detach().exp()).mean() * others
    return tempered_mean(parts.target, temperature), others


def decoupled_parts(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: Temperature,
    top: int = 0,
    logit_stand: bool = False,
) -> Parts:
    """Both parts of each image, from log-probabilities: finite for logits any distance apart.

    See `decoupled_losses` for the arguments and the errors.
    """
    check_logits(logits_student, logits_teacher, temperature)
    check_two_classes("DKD", logits_student)
    student, teacher = (softened(z, temperature, logit_stand) for z in (logits_student, logits_teacher))
    out = _out_of_top(teacher, top).repeat(2, 1) if 0 < top < logits_student.shape[1] else None
    # Both networks at once: half the operations, of which each is a kernel on a GPU.
    binary, others = one_against_others(torch.cat([student, teacher]), target.repeat(2), out)
    (binary_student, binary_teacher), (others_student, others_teacher) = binary.chunk(2), others.chunk(2)
    return Parts(
        target=kl_divergence(binary_student, binary_teacher),
        others=kl_divergence(others_student, others_teacher),
        log_doubt=binary_teacher[:, 1],
    )


def _out_of_top(logits: Tensor, top: int) -> Tensor:
    """(B, C) bool: the classes that are not among the `top` largest; of equal ones, `top` are taken all the same."""
    largest = logits.topk(top, dim=1).indices
    return torch.ones_like(logits, dtype=torch.bool).scatter(1, largest, False)
