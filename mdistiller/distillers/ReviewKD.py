"""Knowledge review: every level of the teacher guides a fusion of the student's same and deeper levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, list_of, whole
from ._base import Distiller, Features, Losses, register, warm_up
from ._feature_maps import MapPairs, probe_pair
from ._pooling import average_pool
from ._precision import full_precision
from .facts import image_size_of

Size = int | Sequence[int]


def hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss, summed over the levels.

        loss = sum_levels[ sum_k w_k mean[(pool_k(f_s) - pool_k(f_t))^2] / sum_k w_k ]

    pool_k is average pooling to one of several sizes: the full size (w = 1), then those of 4x4, 2x2 and 1x1 that are
    below the map's height, each with half the weight of the one before.

    Args:
        fstudent: the student's maps (B, C, H, W), one per level.
        fteacher: the teacher's, of the same shapes; not detached here.

    Returns:
        () >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the two maps of a level differ in shape.

    Reference: Chen et al. 2021, arXiv 2104.09044, section 3.
    """
    return torch.stack([_context_loss(f_s, f_t) for f_s, f_t in zip(fstudent, fteacher)]).sum()


@full_precision
def _context_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    if f_s.shape != f_t.shape:
        shapes = f"the student's {tuple(f_s.shape)}, the teacher's {tuple(f_t.shape)}"
        raise ValueError(f"ReviewKD needs maps of the same shape: {shapes}")
    # Pooling is linear, so only the difference is pooled; where the sizes divide, each time from the size before.
    diff = pooled = f_s - f_t
    height, width = diff.shape[-2:]
    nested = height % 4 == 0 and width % 4 == 0
    loss, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < height:
            pooled = average_pool(pooled if nested else diff, (size, size))
            weight /= 2
            total += weight
            loss = loss + weight * pooled.square().mean()
    return loss / total


class ABF(nn.Module):
    """Attention-based fusion of a level of the student with the fused map of its deeper levels.

    Args:
        in_channel: C_in of the level's map.
        mid_channel: M, common to all levels.
        out_channel: C_out, the teacher's at this level.
        fuse: False for the deepest level, which has nothing to fuse with.

    Reference: Chen et al. 2021, arXiv 2104.09044, section 3.
    """

    def __init__(self, in_channel: int, mid_channel: int, out_channel: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_channel, mid_channel, 1, bias=False), nn.BatchNorm2d(mid_channel))
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channel, out_channel, 3, padding=1, bias=False), nn.BatchNorm2d(out_channel)
        )
        self.att_conv = nn.Sequential(nn.Conv2d(mid_channel * 2, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, y: Tensor | None = None, shape: Size | None = None, out_shape: Size | None = None
    ) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's at this level, and the fused map for the next shallower level.

        Args:
            x: the student's map (B, C_in, H, W).
            y: (B, M, H', W') from the next deeper level; used only if this level fuses.
            shape: height and width to fuse at; those of `x` by default.
            out_shape: height and width of both results; `shape` by default.

        Returns:
            (B, C_out, *out_shape) and (B, M, *out_shape).
        """
        x = self.conv1(x)
        if self.att_conv is not None:
            assert y is not None, "a level that fuses needs the deeper level's map"
            x = self._fuse(self.att_conv[0], x, y, x.shape[-2:] if shape is None else shape)  # type: ignore[arg-type]
        if out_shape is not None:
            x = _resize(x, out_shape)
        return self.conv2(x), x

    @staticmethod
    def _fuse(conv: nn.Conv2d, x: Tensor, y: Tensor, size: Size) -> Tensor:
        """x * z_0 + y * z_1 with z = sigmoid(conv([x, y])).

        The 1x1 convolution is applied to x and, before its resizing, to y; the results are added without concatenating.
        """
        of_x, of_y = conv.weight.chunk(2, dim=1)
        z = torch.sigmoid(F.conv2d(x, of_x, conv.bias) + _resize(F.conv2d(y, of_y), size))
        return x * z[:, :1] + _resize(y, size) * z[:, 1:]


def _resize(x: Tensor, size: Size) -> Tensor:
    """Nearest-neighbour resizing to `size` (one number for a square); `x` itself if it has that size."""
    height, width = (size, size) if isinstance(size, int) else size
    return x if x.shape[-2:] == (height, width) else F.interpolate(x, (height, width), mode="nearest")


def build_abfs(in_channels: Sequence[int], out_channels: Sequence[int], max_mid_channel: int = 512) -> nn.ModuleList:
    """The fusion module of each level, the deepest first.

    Args:
        in_channels: of the student's maps, shallow to deep.
        out_channels: of the teacher's.
        max_mid_channel: the fused maps have this many channels, or as many as the student's deepest if that is less.
    """
    mid_channel = min(max_mid_channel, in_channels[-1])
    deepest = len(in_channels) - 1
    abfs = [ABF(c, mid_channel, o, fuse=i < deepest) for i, (c, o) in enumerate(zip(in_channels, out_channels))]
    return nn.ModuleList(abfs[::-1])


def review(abfs: nn.ModuleList, maps: Sequence[Tensor], out_sizes: Sequence[Size | None]) -> list[Tensor]:
    """Fuse the student's maps from the deepest up.

    Args:
        abfs: from `build_abfs`.
        maps: the student's (B, C, H, W), shallow to deep.
        out_sizes: height and width of the teacher's map at each level, shallow to deep; None for the student's own.

    Returns:
        The maps to compare with the teacher's, shallow to deep.
    """
    # On a CPU, convolutions need not reorder this layout: the whole takes a fifth less time.
    layout = torch.channels_last if maps[0].device.type == "cpu" else torch.preserve_format
    results: list[Tensor] = []
    fused: Tensor | None = None
    for abf, x, out_size in zip(abfs, maps[::-1], out_sizes[::-1]):
        result, fused = abf(x.to(memory_format=layout), fused, out_shape=out_size)
        results.insert(0, result.contiguous())
    return results


DEFAULTS = CN(
    {
        "CE_WEIGHT": 1.0,
        "REVIEWKD_WEIGHT": 1.0,
        "WARMUP_EPOCHS": 20,
        "SHAPES": [1, 8, 16, 32],
        "OUT_SHAPES": [1, 8, 16, 32],
        "IN_CHANNELS": [64, 128, 256, 256],
        "OUT_CHANNELS": [64, 128, 256, 256],
        "MAX_MID_CHANNEL": 512,
        "STU_PREACT": False,
    }
)


RANGES = {
    "CE_WEIGHT": NOT_NEGATIVE,
    "REVIEWKD_WEIGHT": NOT_NEGATIVE,
    "WARMUP_EPOCHS": whole(0),
    "MAX_MID_CHANNEL": whole(1),
    **{key: list_of(whole(1)) for key in ("SHAPES", "OUT_SHAPES", "IN_CHANNELS", "OUT_CHANNELS")},
}


@register("REVIEWKD", DEFAULTS, ranges=RANGES)
class ReviewKD(Distiller):
    """Cross-entropy with the labels and `hcl_loss` between the reviewed student and the teacher's pre-activations.

    The levels are the pairs of stages, see `MapPairs`, and the pooled features. The teacher's maps are those before the
    ReLU, and so are the student's if STU_PREACT is set. The loss weight grows linearly to REVIEWKD_WEIGHT over
    WARMUP_EPOCHS.

    Numbers of channels and sizes are read from the networks and their maps. SHAPES, OUT_SHAPES (deep to shallow),
    IN_CHANNELS and OUT_CHANNELS (shallow to deep) need not be set: `[]`, or the value in `DEFAULTS`, which is
    resnet32x4's, is ignored. Any other value must agree with the networks.

    Args:
        image_size: of the run.

    Raises:
        UserError: one of the four contradicts the networks, or a network has tokens or vectors instead of maps. Built
            by hand without `image_size`, contradicting sizes are refused in the first step.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("preact_feats", "pooled_feat")
    soft_labels = True
    label_weight = "CE_WEIGHT"
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        self.cfg = cfg.REVIEWKD.clone()
        features = probe_pair(student, teacher, image_size or image_size_of(cfg))
        kinds = ("preact_feats" if self.cfg.STU_PREACT else "feats"), "preact_feats"
        self.pairs = MapPairs(student, teacher, features, cfg, "ReviewKD", kinds)
        maps_s, maps_t = self._levels(*features)
        in_channels, out_channels = ([m.shape[1] for m in maps] for maps in (maps_s, maps_t))
        self._agree("IN_CHANNELS", in_channels)
        self._agree("OUT_CHANNELS", out_channels)
        if image_size is not None:  # else the maps' sizes are known in the first step
            self._check_sizes(maps_s, maps_t)
        self.abfs = build_abfs(in_channels, out_channels, self.cfg.MAX_MID_CHANNEL)

    def _agree(self, key: str, found: list[Any]) -> None:
        """Refuse a configured value of `key` that contradicts the one `found` in the networks."""
        given = list(self.cfg[key])
        if given and given not in (found, DEFAULTS[key]):
            raise UserError(f"REVIEWKD.{key} is {given} but the networks have {found}; leave it out, or set it to []")

    def _check_sizes(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> None:
        self._agree("SHAPES", _sizes(maps_s)[::-1])
        self._agree("OUT_SHAPES", _sizes(maps_t)[::-1])

    def _levels(self, features_s: Features, features_t: Features) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's maps, shallow to deep, and last the pooled features (B, C, 1, 1)."""
        maps_s, maps_t = self.pairs(features_s, features_t)
        pooled_s, pooled_t = (f["pooled_feat"].flatten(1)[..., None, None] for f in (features_s, features_t))
        return [*maps_s, pooled_s], [*maps_t, pooled_t]

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return super().get_learnable_parameters() + list(self.abfs.parameters())

    def get_extra_parameters(self) -> int:
        return count_parameters(self.abfs)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, feature_student = self.student(image)
        _, feature_teacher = self.teacher_forward(image)
        maps_s, maps_t = self._levels(feature_student, feature_teacher)
        self._check_sizes(maps_s, maps_t)
        results = review(self.abfs, maps_s, [m.shape[-2:] for m in maps_t])
        weight = self.cfg.REVIEWKD_WEIGHT * warm_up(kwargs["epoch"], self.cfg.WARMUP_EPOCHS)
        return logits_student, {
            "loss_ce": self.cfg.CE_WEIGHT * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": weight * hcl_loss(results, maps_t),
        }


def _sizes(maps: Sequence[Tensor]) -> list[Any]:
    """Height and width of each map; one number where they are equal."""
    return [h if h == w else (h, w) for h, w in (m.shape[-2:] for m in maps)]
