"""What the methods that compare logits share: a check, softening, and the KL divergence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        # A trained temperature's gradient is a sum over the logits, in which 0 * -inf of a masked class would be NaN.
        masked = logits == -torch.inf
        return (logits.masked_fill(masked, 0) / temperature).masked_fill(masked, -torch.inf)
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
    own, deviation = centred_and_deviation(logits)
    return (own / (deviation + 1e-7)).masked_fill(logits == -torch.inf, -torch.inf)


def centred_and_deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """z - mean_C z, and the standard deviation (divisor C - 1) of each image's logits, both with gradients.

    Classes that are masked out by -inf do not count; they are 0 in the first. The deviation of equal logits is exactly
    0 and has no gradient.

    Args:
        logits: (B, C), or with more dimensions behind the classes.

    Returns:
        (B, C, ...) and (B, 1, ...).
    """
    own, count = centred(logits)
    variance = own.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    equal = variance == 0
    return own, variance.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)


def centred(logits: Tensor) -> tuple[Tensor, Tensor]:
    """z - mean_C z of each image's logits, and the number of classes; those that -inf masks out are 0, and not counted.

    Args:
        logits: (B, C), or with more dimensions behind the classes.

    Returns:
        (B, C, ...) and (B, 1, ...) int64.
    """
    masked = logits == -torch.inf
    count = (~masked).sum(dim=1, keepdim=True)
    # From the largest logit: the mean of equal numbers is rounded, that of zeros is not.
    below = (logits - logits.detach().amax(dim=1, keepdim=True)).masked_fill(masked, 0)
    mean = below.sum(dim=1, keepdim=True) / count.clamp(min=1)
    return (below - mean).masked_fill(masked, 0), count


def one_against_others(logits: Tensor, one: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The logarithms of two distributions: of one class against all others together, and among these others.

        b = (p_one, 1 - p_one),   q = softmax(z) over the classes other than `one`

    From log-odds: value and gradient are finite for logits any distance apart. Where no class is left for q, log q is
    -inf.

    Args:
        logits: (B, C), C >= 2.
        one: (B,) int64, the one class of each image.
        left_out: (B, C) bool, other classes that q leaves out too, and b does not; None: none.

    Returns:
        log b (B, 2) and log q (B, C - 1), its classes in their order.
    """
    one = one.unsqueeze(1)
    columns = torch.arange(logits.shape[1] - 1, device=one.device).expand(len(one), -1)
    columns = columns + (columns >= one)  # the one class left out
    others = logits.gather(1, columns)
    filled, empty = _filled(others)
    log_sum = filled.logsumexp(dim=1, keepdim=True).masked_fill(empty, -torch.inf)
    log_odds = logits.gather(1, one) - log_sum
    if left_out is not None:
        filled, empty = _filled(others.masked_fill(left_out.gather(1, columns), -torch.inf))
    log_q = F.log_softmax(filled, dim=1).masked_fill(empty, -torch.inf)
    return F.logsigmoid(torch.cat([log_odds, -log_odds], dim=1)), log_q


def _filled(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits` with zeros in rows of -inf alone, whose softmax and gradient are NaN; and (B, 1), which rows are so."""
    empty = (logits == -torch.inf).all(dim=1, keepdim=True)
    return logits.masked_fill(empty, 0), empty


def check_two_classes(method: str, logits: Tensor) -> None:
    """Refuse logits (B, 1), for a method that sets one class against the others.

    Raises:
        ValueError: it names the method.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"{method} needs two classes or more, the logits have {logits.shape[1]}")


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


def soft_cross_entropy(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """-sum_C p_t log p_s of each image, (B,); 0 where p_t is 0, even if log p_s is -inf.

    Args:
        log_student, log_teacher: (B, C) log-probabilities.
    """
    p = log_teacher.exp()
    return -(p * log_student.masked_fill(p == 0, 0)).sum(dim=1)


def tempered_mean(values: Tensor, temperature: Temperature) -> Tensor:
    """mean_B[ T^2 * values ] (): the factor keeps the gradient's scale as T grows.

    Args:
        values: (B,), one for each image.
    """
    if isinstance(temperature, Tensor):
        return (values * temperature.reshape(-1).square()).mean()
    return values.mean() * temperature**2
