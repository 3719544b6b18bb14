"""What the methods that compare logits share: a check, softening, and the KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError

# A number; or one for each image, (B, 1), or for all of them, () or (1,), both with or without a gradient.
Temperature = float | Tensor


def check_logits(logits_student: Tensor, logits_teacher: Tensor, temperature: Temperature = 1.0) -> None:
    """Refuse logits of different shapes and a temperature that is not positive.

    The values of a tensor are not looked at, which would wait for the device.

    Raises:
        UserError: they differ in shape.
        ValueError: the temperature is not positive, or a tensor of another form than `Temperature`.
    """
    if logits_student.shape != logits_teacher.shape:
        raise UserError(
            f"student logits {tuple(logits_student.shape)} and teacher logits {tuple(logits_teacher.shape)} "
            "differ in shape; both networks must know the same classes"
        )
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,), (len(logits_student), 1)):
            raise ValueError(
                f"the temperature is a tensor {tuple(temperature.shape)}; it must be one number, or one for each "
                f"image, ({len(logits_student)}, 1)"
            )
    elif temperature <= 0:
        raise ValueError(f"the temperature must be positive, it is {temperature}")


def logit_stand(cfg: CN) -> bool:
    """EXPERIMENT.LOGIT_STAND; False for a tree that has methods' sections alone, as of a method built by hand."""
    return bool(cfg.get("EXPERIMENT", {}).get("LOGIT_STAND", False))


def softened(logits: Tensor, temperature: Temperature, standardize: bool = False) -> Tensor:
    """z / T, of logits that are standardised first if `standardize`: what goes into every softmax of a soft label.

    Args:
        logits: (B, C), or with more dimensions behind the classes.
    """
    logits = standardized(logits) if standardize else logits
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, *[1] * (logits.ndim - 1))
    return logits / temperature


def standardized(logits: Tensor) -> Tensor:
    """Logits of mean 0 and standard deviation 1 over the classes of each image.

        z' = (z - mean_C z) / (1e-7 + std_C z),   std with divisor C - 1

    Mean and deviation have gradients. Classes that are masked out by -inf keep it, and do not count. Where all logits
    are equal, z' is 0, and the deviation, which has no derivative there, gets no gradient.

    Args:
        logits: (B, C), or with more dimensions behind the classes.

    Reference: Sun et al. 2024, arXiv 2403.01427, equation 14.
    """
    masked = logits == -torch.inf
    count = (~masked).sum(dim=1, keepdim=True)
    mean = logits.masked_fill(masked, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (logits - mean).masked_fill(masked, 0)
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    equal = variance == 0
    deviation = variance.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)
    return (centred / (deviation + 1e-7)).masked_fill(masked, -torch.inf)


def kl_divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL divergence from the teacher's distribution to the student's, for each image.

        KL_i = sum_C p_t * (log p_t - log p_s)

    Where p_t is 0, also by underflow, the term and its gradients are 0, even if log p_s is -inf. Where only log p_s is
    -inf, the divergence is infinite.

    Args:
        log_student: (B, C) log-probabilities, or with more dimensions behind the classes.
        log_teacher: likewise; not detached here.

    Returns:
        (B,), or (B, ...), in nats.
    """
    p = log_teacher.exp()
    # torch's kl_div multiplies p by the difference everywhere: 0 * inf = NaN.
    log_ratio = (log_teacher - log_student).masked_fill_(p == 0, 0)
    return (p * log_ratio).sum(dim=1)


def tempered_mean(values: Tensor, temperature: Temperature) -> Tensor:
    """mean_B[ T^2 * values ] (): the factor keeps the gradient's scale as T grows.

    Args:
        values: (B,), one for each image.
    """
    if isinstance(temperature, Tensor):
        return (values * temperature.reshape(-1).square()).mean()
    return values.mean() * temperature**2
