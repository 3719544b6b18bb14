"""Contrastive representation distillation: match the two networks' embeddings of an image, not of other images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch, mean_over_ranks
from ..errors import UserError
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, TEMPERATURE, interval, whole
from ._base import Distiller, Features, Losses, register
from ._feature_maps import probe_pair
from ._precision import full_precision
from .facts import image_size_of

_EPS = 1e-7
# Elements of the largest temporary tensor: 16 MiB in float32, about what a processor's cache holds.
_CHUNK = 2**22
# The default of CRD.FEAT.STUDENT_DIM and TEACHER_DIM.
_DEFAULT_WIDTH = 256


@full_precision
def nce_loss(embed: Tensor, bank: Tensor, contrastive_index: Tensor, temperature: Tensor, z: Tensor) -> Tensor:
    """Noise-contrastive loss of embeddings against their positive and K negatives from a memory bank.

        loss = -mean_B[ log h_0 + sum_(k=1..K) log(1 - h_k) ],
        h_k = p_k / (p_k + K/N),   p_k = exp(<embed_b, bank_i(b,k)> / temperature) / z

    where h_k is the probability that entry i(b, k) is the positive and not one of K draws from N. As in the original,
    1e-7 is added to K/N in the denominators.

    Args:
        embed: (B, D).
        bank: (N, D) of `embed`'s dtype (float32 where `embed` is half precision); gets no gradient.
        contrastive_index: (B, K + 1) int64 rows of `bank`: the positive in column 0, the negatives after it.
        temperature: () > 0.
        z: () > 0, the normalising constant that replaces the sum over all N entries.

    Returns:
        () in nats, >= 0. Finite for any finite score: h is a logistic function, computed in log space.

    Cost: one matrix product with the bank for the scores and one for the gradient, O(BND) time and O(BN) memory (at
    most 16 MiB at a time, or one row of the batch if that is more). From a bank of more than 32 (K + 1) entries, the
    rows are gathered instead, O(BKD). No B x K x D tensor is formed; only (B, D) is kept for the backward pass.

    Reference: Tian et al. 2020, arXiv 1910.10699, section 3.1.
    """
    noise = (contrastive_index.shape[1] - 1) / len(bank)
    shift = torch.log(z * (noise + _EPS))
    loss = _LogisticNCE.apply(embed, bank, contrastive_index, temperature, shift)
    return loss + (contrastive_index.shape[1] - 1) * math.log1p(_EPS / noise)


class _LogisticNCE(torch.autograd.Function):
    """mean_B[ softplus(-u_0) + sum_k softplus(u_k) ],  u = score / temperature - shift.

    With shift = log(z K/N), h = sigmoid(u), so the slope in u is sigmoid(u_k), and for the positive -sigmoid(-u_0). The
    forward pass computes it together with the loss, so that the scores need not be kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, embed: Tensor, bank: Tensor, index: Tensor, temperature: Tensor, shift: Tensor
    ) -> Tensor:
        loss, slopes = embed.new_zeros(()), []
        for scores, pull_back in _scores(embed, bank, index):
            u = scores.div_(temperature).sub_(shift)
            u[:, 0].neg_()
            loss += F.softplus(u).sum()
            slope = u.sigmoid_()
            slope[:, 0].neg_()
            slopes.append(pull_back(slope))
        ctx.save_for_backward(torch.cat(slopes).div_(temperature * len(embed)))
        return loss / len(embed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None, None, None, None


def _scores(embed: Tensor, bank: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """<embed_b, bank[index[b, k]]> as (rows, K + 1), for one chunk of the batch's rows at a time.

    With them, a function from the loss's slopes in those scores, (rows, K + 1), to those in the embeddings, (rows, D).
    """
    many = len(bank) > 32 * index.shape[1]
    score, width = (_gathered_scores, index.shape[1] * bank.shape[1]) if many else (_dense_scores, len(bank))
    rows = max(1, _CHUNK // width)
    for chunk, chunk_index in zip(embed.split(rows), index.split(rows)):
        yield score(chunk, bank, chunk_index)


def _dense_scores(embed: Tensor, bank: Tensor, index: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    everything = embed @ bank.T
    # An entry that occurs twice in a row of `index` counts twice: its slopes are added.
    return everything.gather(1, index), lambda slope: everything.zero_().scatter_add_(1, index, slope) @ bank


def _gathered_scores(embed: Tensor, bank: Tensor, index: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    near = bank[index]
    return (near @ embed.unsqueeze(2)).squeeze(2), lambda slope: (slope.unsqueeze(1) @ near).squeeze(1)


class Embed(nn.Module):
    """A linear layer and L2 normalisation: (B, D_in, ...) -> (B, D_out), in float32 or float64."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1))
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


class ContrastMemory(nn.Module):
    """Moving averages of every training image's embeddings, the student's in memory_v1, the teacher's in memory_v2.

    Args:
        dim: D, width of the embeddings.
        num_data: N, size of the training set.
        num_negatives: K.
        temperature: of the scores.
        momentum: weight of an image's old entry in its new one.

    The buffer `params` holds [K, temperature, Z_v1, Z_v2, momentum], as the original's checkpoints do; Z < 0 until
    the first batch sets it.
    """

    def __init__(self, dim: int, num_data: int, num_negatives: int, temperature: float, momentum: float) -> None:
        super().__init__()
        self.register_buffer("params", torch.tensor([num_negatives, temperature, -1, -1, momentum]))
        bound = math.sqrt(3 / dim)  # rows of about unit length
        self.register_buffer("memory_v1", torch.empty(num_data, dim).uniform_(-bound, bound))
        self.register_buffer("memory_v2", torch.empty(num_data, dim).uniform_(-bound, bound))
        self._z_known = False  # not read from `params` at every step: the host would wait for the device
        self._seen: tuple[Tensor, ...] | None = None  # of the last forward pass, for `update`

    params: Tensor
    memory_v1: Tensor
    memory_v2: Tensor

    def forward(self, v_student: Tensor, v_teacher: Tensor, index: Tensor, contrastive_index: Tensor) -> Tensor:
        """Sum of `nce_loss` of the student against the teacher's bank and of the teacher against the student's bank.

        Changes nothing; `update` does.

        Args:
            v_student: (B, D) of unit length.
            v_teacher: (B, D) of unit length.
            index: (B,) int64, each image's row in the banks. If an image occurs twice, the last one counts.
            contrastive_index: (B, K + 1) int64, rows of the banks, the positive first.
        """
        _, temperature, z_student, z_teacher, _ = self.params.unbind()
        self._seen = index, v_student.detach(), v_teacher.detach()
        if not self.z_known():
            z_student = self._z(z_student, v_student, self.memory_v2, contrastive_index)
            z_teacher = self._z(z_teacher, v_teacher, self.memory_v1, contrastive_index)
            self._seen += (torch.stack([z_student, z_teacher]),)
        loss_student = nce_loss(v_student, self.memory_v2, contrastive_index, temperature, z_student)
        loss_teacher = nce_loss(v_teacher, self.memory_v1, contrastive_index, temperature, z_teacher)
        return loss_student + loss_teacher

    def z_known(self) -> bool:
        """Whether a first batch, or a checkpoint, has set both normalising constants."""
        if not (self._z_known or torch.compiler.is_compiling()):
            self._z_known = bool((self.params[2:4] > 0).all())
        return self._z_known

    @torch.no_grad()
    def update(self) -> None:
        """Write the embeddings of the last forward pass into both banks and, in the first step, set Z."""
        if self._seen is None:
            return
        (index, v_student, v_teacher, *z), self._seen = self._seen, None
        if z:
            self.params[2:4] = z[0]
        # Every rank writes the images of all ranks, so that all ranks have the same banks.
        index = gather_batch(index)
        last = _last_places(index)
        self._update(self.memory_v1, gather_batch(v_student), index, last)
        self._update(self.memory_v2, gather_batch(v_teacher), index, last)

    @torch.no_grad()
    def _z(self, known: Tensor, embed: Tensor, bank: Tensor, contrastive_index: Tensor) -> Tensor:
        """Z () = N times the mean of exp(score / temperature) over the batch; the `known` one if it is above 0."""
        chunks = _scores(embed, bank, contrastive_index)
        total = torch.stack([scores.div_(self.params[1]).exp_().sum() for scores, _ in chunks]).sum()
        z = mean_over_ranks(total / contrastive_index.numel()) * len(bank)
        return torch.where(known > 0, known, z.to(known.dtype))

    @torch.no_grad()
    def _update(self, bank: Tensor, embed: Tensor, index: Tensor, last: Tensor) -> None:
        """Write a batch into `bank`; `last` is `_last_places(index)`."""
        momentum = self.params[4]
        entry = F.normalize(momentum * bank[index] + (1 - momentum) * embed, dim=1)
        # Rows written twice get the same values twice, so that the order of writing does not matter on any device.
        bank.index_copy_(0, index, entry[last])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._z_known = False


def _last_places(index: Tensor) -> Tensor:
    """(B,) the last place in the batch `index` (B,) of each of its images."""
    return torch.where(index == index.unsqueeze(1), torch.arange(len(index), device=index.device), -1).amax(1)


@register(
    "CRD",
    CN(
        {
            "MODE": "exact",  # the positive is the image itself; "relax": any image of its class
            "FEAT": CN({"DIM": 128, "STUDENT_DIM": _DEFAULT_WIDTH, "TEACHER_DIM": _DEFAULT_WIDTH}),
            "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.8}),
            "NCE": CN({"K": 16384, "MOMENTUM": 0.5, "TEMPERATURE": 0.07}),
        }
    ),
    ranges={
        **{f"FEAT.{key}": whole(1, most=2**16) for key in ("DIM", "STUDENT_DIM", "TEACHER_DIM")},
        "LOSS.CE_WEIGHT": NOT_NEGATIVE,
        "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
        "NCE.K": whole(1, most=2**24),
        "NCE.MOMENTUM": interval(0, 1, "[)"),
        "NCE.TEMPERATURE": TEMPERATURE,
    },
)
class CRD(Distiller):
    """Cross-entropy with the labels and the contrastive loss between the two networks' `pooled_feat`.

    The embeddings' input widths are read from the networks. CRD.FEAT.STUDENT_DIM and TEACHER_DIM need not be set: 256,
    the original's default, is ignored; any other value must agree with the network.

    Args:
        num_data: N, size of the training set.
        image_size: of the run.

    Raises:
        UserError: a width that contradicts the network.

    Cost: two banks of N x DIM floats on the device (51 MB for 50,000 images, 1.3 GB for ImageNet).

    Reference: Tian et al. 2020, arXiv 1910.10699.
    """

    needs_run = ("num_data", "image_size")
    needs_batch = ("index", "contrastive_index")
    teacher_outputs = ("pooled_feat",)
    soft_labels = True
    reads_labels = True  # a mixed image is of two classes, and has no row of its own in the banks
    compares_images = True  # a micro-batch would update the bank before the next one is compared with it

    def __init__(
        self, student: nn.Module, teacher: nn.Module, cfg: CN, num_data: int, image_size: int | None = None
    ) -> None:
        super().__init__(student, teacher)
        feat, nce = cfg.CRD.FEAT, cfg.CRD.NCE
        self.ce_loss_weight = cfg.CRD.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.CRD.LOSS.FEAT_WEIGHT
        feature_student, feature_teacher = probe_pair(student, teacher, image_size or image_size_of(cfg))
        self.embed_s = Embed(_width("STUDENT", feature_student, feat.STUDENT_DIM), feat.DIM)
        self.embed_t = Embed(_width("TEACHER", feature_teacher, feat.TEACHER_DIM), feat.DIM)
        self.contrast = ContrastMemory(feat.DIM, num_data, nce.K, nce.TEMPERATURE, nce.MOMENTUM)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.embed_s.parameters(), *self.embed_t.parameters()]

    def get_extra_parameters(self) -> int:
        """Parameters of the two embeddings and, as in the original's count, every element of the memory's buffers."""
        memory = sum(buffer.numel() for buffer in self.contrast.buffers())
        return count_parameters(self.embed_s) + count_parameters(self.embed_t) + memory

    def settled(self) -> bool:
        return self.contrast.z_known()

    def after_step(self) -> None:
        self.contrast.update()

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, feature_student = self.student(image)
        _, feature_teacher = self.teacher_forward(image)
        loss_crd = self.contrast(
            self.embed_s(feature_student["pooled_feat"]),
            self.embed_t(feature_teacher["pooled_feat"]),
            kwargs["index"],
            kwargs["contrastive_index"],
        )
        return logits_student, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": self.feat_loss_weight * loss_crd,
        }


def _width(network: str, features: Features, configured: int) -> int:
    """Width of the `pooled_feat`; a `configured` width other than the default must agree with it."""
    own = features["pooled_feat"].flatten(1).shape[1]
    if configured not in (own, _DEFAULT_WIDTH):
        raise UserError(
            f"CRD.FEAT.{network}_DIM is {configured}, but the {network.lower()}'s pooled_feat has {own} channels; "
            "leave the key out, the width is taken from the network"
        )
    return own
