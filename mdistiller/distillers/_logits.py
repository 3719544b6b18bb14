"""A check that the methods that compare logits share."""

from __future__ import annotations

from torch import Tensor


def check_logits(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> None:
    """Refuse logits of different shapes and a temperature that is not positive.

    Raises:
        ValueError: in either case; the message names the shapes or the temperature.
    """
    if logits_student.shape != logits_teacher.shape:
        raise ValueError(
            f"student logits {tuple(logits_student.shape)} and teacher logits {tuple(logits_teacher.shape)} "
            "differ in shape; both networks must know the same classes"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, it is {temperature}")
