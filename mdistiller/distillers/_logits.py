"""What the methods that compare logits share: a check, and the KL divergence."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError


def check_logits(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> None:
    """Refuse logits of different shapes and a temperature that is not positive.

    Raises:
        UserError: they differ in shape.
        ValueError: the temperature is not positive.
    """
    if logits_student.shape != logits_teacher.shape:
        raise UserError(
            f"student logits {tuple(logits_student.shape)} and teacher logits {tuple(logits_teacher.shape)} "
            "differ in shape; both networks must know the same classes"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, it is {temperature}")


def kl_divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL divergence from the teacher's distribution to the student's, averaged over the batch.

        loss = mean_B[ sum_C p_t * (log p_t - log p_s) ]

    Where p_t is 0, also by underflow, the term and its gradients are 0, even if log p_s is -inf. Where only log p_s is
    -inf, the loss is infinite.

    Args:
        log_student: (B, C) log-probabilities.
        log_teacher: (B, C) log-probabilities; not detached here.

    Returns:
        () in nats.
    """
    p = log_teacher.exp()
    # torch's kl_div multiplies p by the difference everywhere: 0 * inf = NaN.
    log_ratio = (log_teacher - log_student).masked_fill_(p == 0, 0)
    return (p * log_ratio).sum() / len(p)
