"""Feature maps of student and teacher: shapes, pairs of stages, and regressors from the student's to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name, one_line
from ..errors import UserError
from ..models.eval_mode import eval_mode
from ..models.returned import FORM, ReturnedFeatures, described
from ._base import Features
from ._pooling import pool_larger
from .facts import image_size_of

# The next step for maps that a method cannot compare.
OTHER_MAPS = (
    "DISTILLER.PAIRS names other pairs of maps, STUDENT_FEATS and TEACHER_FEATS other layers of networks from elsewhere"
)


def probe(model: nn.Module, input_size: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """The model's output for one zero image of (height, width) = `input_size`.

    It runs in eval mode: in training mode it would update the BatchNorm statistics of a pretrained teacher.
    """
    like = next(model.parameters())
    with eval_mode(model):
        return model(like.new_zeros(1, 3, *input_size))


def probe_pair(student: nn.Module, teacher: nn.Module, image_size: int | Sequence[int]) -> tuple[Features, Features]:
    """Features of both networks for one zero image of `image_size`: one number for a square, or (height, width).

    Raises:
        UserError: a network returns no features.
        ValueError: a network cannot take such an image, or has a fault; the network's own error is its cause.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    return _probed(student, size, "student"), _probed(teacher, size, "teacher")


def _probed(model: nn.Module, size: Sequence[int], role: str) -> Features:
    name = f"the {role} {network_name(model)}"
    try:
        output = probe(model, size)
    except (RuntimeError, AssertionError) as error:  # a vision transformer asserts that an image has its size
        raise ValueError(f"{name} cannot take an image of {size[0]}x{size[1]}: {one_line(error)}") from error
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping)):
        raise UserError(f"{name} must return (logits, features by name), it returns {described(output)}; {FORM}")
    return ReturnedFeatures(output[1], name)


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes (1, C, H, W) of the feature maps of student and teacher, stage by stage.

    Args:
        input_size: (height, width) of the images.
    """
    return tuple([f.shape for f in features["feats"]] for features in probe_pair(student, teacher, input_size))  # type: ignore[return-value]


def input_size(configured: Sequence[int], image_size: int | None, cfg: CN, key: str) -> int | tuple[int, int]:
    """The size of the images to probe with: the run's `image_size` or, without a run, the configured one.

    Args:
        configured: the value of `key`: (height, width), or empty for the data set's. The original's default is ignored.
        image_size: of the run; None for a method that is built by hand.

    Raises:
        UserError: `configured` is no size, or contradicts the run.
    """
    if configured and (len(configured) != 2 or not all(isinstance(x, int) and x > 0 for x in configured)):
        raise UserError(f"{key} must be [] or [height, width], not {list(configured)}")
    if image_size is None:
        return tuple(configured) if configured else image_size_of(cfg)  # type: ignore[return-value]
    if configured and list(configured) not in (_ORIGINAL_SIZE, [image_size, image_size]):
        raise UserError(f"{key} is {list(configured)}, but the images are {image_size}x{image_size}; set it to []")
    return image_size


_ORIGINAL_SIZE = [32, 32]


def pair_stages(count_s: int, count_t: int, first_t: int = 1) -> list[tuple[int, int]]:
    """The (student's, teacher's) indices of the maps that belong together, from shallow to deep.

    Each stage of the teacher is paired with the student's map at the same place, counted from the deepest. A student
    with fewer stages lends its stem's map too.

    Args:
        count_s, count_t: number of maps of each network.
        first_t: index of the teacher's first stage: 1 after the stem's map, 0 for a network that lists no stem.
    """
    pairs = min(count_s, count_t - first_t)
    return [(count_s - i, count_t - i) for i in range(pairs, 0, -1)]


class MapPairs:
    """Which of the student's feature maps a method compares with which of the teacher's: one rule for every method.

    The teacher's stages after the stem are paired from the deepest up (`pair_stages`), or as DISTILLER.PAIRS says:
    [[student's index, teacher's index], ...], from shallow to deep.

    Args:
        student, teacher: a teacher that lists no stem's map says so by `stem_in_feats = False`.
        features: their features for one image, from `probe_pair`.
        cfg: the whole tree.
        method: for the messages.
        kinds: which of the student's and of the teacher's features are paired: "feats" or "preact_feats".
        least: number of pairs that the method needs.
        stem: pair the stems' maps too.

    Attributes:
        counts: number of maps of the student and of the teacher.
        configured: the pairs of DISTILLER.PAIRS; empty where it names none.
        indices: (student's, teacher's) index of each pair.
        shapes: (student's, teacher's) shape (1, C, H, W) of each pair.

    Raises:
        UserError: too few pairs, no such map, pairs that do not go deeper, or features that are not maps.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: tuple[Features, Features],
        cfg: CN,
        method: str,
        kinds: tuple[str, str] = ("feats", "feats"),
        least: int = 1,
        stem: bool = False,
    ) -> None:
        self.kinds = kinds
        maps_s, maps_t = self._lists(features, (student, teacher), method)
        self.counts = len(maps_s), len(maps_t)
        self.configured = configured_pairs(cfg, *self.counts)
        first = 0 if stem else int(getattr(teacher, "stem_in_feats", True))
        self.indices = self.configured or pair_stages(*self.counts, first)
        self.shapes = [(maps_s[i].shape, maps_t[j].shape) for i, j in self.indices]
        require_maps(self.shapes, method, (student, teacher))
        if len(self.indices) < least:
            raise UserError(
                f"{method} needs {least} or more pairs of feature maps; of the student's {self.counts[0]} maps and the "
                f"teacher's {self.counts[1]}, {len(self.indices)} can be paired "
                f"({network_name(student)} and {network_name(teacher)}); {OTHER_MAPS}"
            )

    @classmethod
    def probed(
        cls, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None, method: str, **options: Any
    ) -> MapPairs:
        """The pairs, from probing both networks with an image of the run's size; None for the data set's."""
        features = probe_pair(student, teacher, image_size or image_size_of(cfg))
        return cls(student, teacher, features, cfg, method, **options)

    def keep_deepest(self, count: int, method: str, why: str) -> None:
        """Keep the pairs of the teacher's `count` deepest maps.

        Raises:
            UserError: DISTILLER.PAIRS names another one, or none is left; the message says `why`.
        """
        kept = [(pair, shapes) for pair, shapes in zip(self.indices, self.shapes) if pair[1] >= self.counts[1] - count]
        if not kept or (self.configured and len(kept) < len(self.indices)):
            raise UserError(f"{method} cannot compare the pairs {self.indices} of feature maps: {why}")
        self.indices, self.shapes = map(list, zip(*kept))

    def keep_one(self, method: str) -> None:
        """Keep the deepest pair, or the one that DISTILLER.PAIRS names, for a method that compares one.

        Raises:
            UserError: DISTILLER.PAIRS names several.
        """
        if len(self.configured) > 1:
            raise UserError(
                f"{method} compares one pair of maps, DISTILLER.PAIRS names {len(self.configured)}: {self.configured}"
            )
        if not self.configured:
            self.keep_deepest(1, method, "it compares the last ones")

    def require_positions(self, method: str) -> None:
        """Refuse pairs all of which have a map of 1x1, for a method that compares where in a map the activations are.

        Raises:
            UserError: its loss would have no gradient for any images.
        """
        if all(min(math.prod(s[2:]), math.prod(t[2:])) == 1 for s, t in self.shapes):
            raise UserError(
                f"{method} compares where in a map the activations are, but every pair of maps has one of 1x1, so that "
                f"its loss has no gradient: the student's {[tuple(s) for s, _ in self.shapes]}, the teacher's "
                f"{[tuple(t) for _, t in self.shapes]}; use larger images, or DISTILLER.PAIRS with earlier maps"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The teacher's maps that are compared, as `Distiller.reads_only` takes them."""
        return tuple(f"{self.kinds[1]}[{j}]" for _, j in self.indices)

    def _lists(
        self, features: tuple[Features, Features], networks: tuple[nn.Module, nn.Module], method: str
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        for kind, own, network in zip(self.kinds, features, networks):
            if kind not in own:
                raise UserError(f"{method} compares feature maps, but {network_name(network)} returns no {kind!r}")
        return features[0][self.kinds[0]], features[1][self.kinds[1]]

    def of_student(self, features: Features) -> list[Tensor]:
        """The student's maps, one for every pair, from shallow to deep."""
        return [features[self.kinds[0]][i] for i, _ in self.indices]

    def __call__(self, features_s: Features, features_t: Features) -> tuple[list[Tensor], list[Tensor]]:
        """The student's maps and the teacher's, one of each for every pair, from shallow to deep."""
        return self.of_student(features_s), [features_t[self.kinds[1]][j] for _, j in self.indices]


def configured_pairs(cfg: CN, count_s: int, count_t: int) -> list[tuple[int, int]]:
    """DISTILLER.PAIRS as pairs of indices; empty where it names none.

    Args:
        cfg: the whole tree; a tree without the section DISTILLER names none.
        count_s, count_t: number of maps of each network; a negative index counts from the deepest.

    Raises:
        UserError: not a list of pairs of whole numbers, no such map, or pairs that do not go deeper.
    """
    given = cfg.get("DISTILLER", {}).get("PAIRS", [])
    pairs: list[tuple[int, int]] = []
    for pair in given:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(i) is int for i in pair)):
            raise UserError(
                f"DISTILLER.PAIRS must list [student's map, teacher's map], such as [[1, 1], [2, 3]], not {given}"
            )
        for i, count, role in zip(pair, (count_s, count_t), ("student", "teacher")):
            if not -count <= i < count:
                raise UserError(
                    f"DISTILLER.PAIRS {given} names map {i} of the {role}, which has maps 0 to {count - 1}"
                )
        i, j = pair[0] % count_s, pair[1] % count_t
        if pairs and not (pairs[-1][0] <= i and pairs[-1][1] <= j and pairs[-1] != (i, j)):
            raise UserError(f"DISTILLER.PAIRS {given} must go from shallow to deep in both networks")
        pairs.append((i, j))
    return pairs


def hint_layers(
    cfg: CN, method: str, counts: tuple[int, int], networks: tuple[nn.Module, nn.Module]
) -> tuple[int, int]:
    """The indices of the student's and of the teacher's map, for a method that compares one pair of maps.

    The pair in DISTILLER.PAIRS; else HINT_LAYER of the method's section, the same index in both networks' lists, from
    the deepest map if it is negative.

    Args:
        method: its name, which is its section's.
        counts: number of maps of each network.

    Raises:
        UserError: no such map, or several pairs.
    """
    pairs = configured_pairs(cfg, *counts)
    if len(pairs) > 1:
        given = cfg.DISTILLER.PAIRS
        raise UserError(f"{method} compares one pair of maps, DISTILLER.PAIRS names {len(pairs)}: {given}")
    if pairs:
        return pairs[0]
    layer, count = cfg[method].HINT_LAYER, min(counts)
    if not -count <= layer < count:
        student, teacher = map(network_name, networks)
        have = f"feature maps 0 to {count - 1}" if count else "no feature maps"
        raise UserError(
            f"{method}.HINT_LAYER is {layer}, the networks have {have} ({student} and {teacher}); {OTHER_MAPS}"
        )
    return layer, layer


def require_maps(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], method: str, networks: tuple[nn.Module, nn.Module]
) -> None:
    """Refuse (student's, teacher's) shapes that are not both (B, C, H, W).

    Raises:
        UserError: names the method, both shapes and both networks.
    """
    for shape_s, shape_t in pairs:
        if len(shape_s) != 4 or len(shape_t) != 4:
            student, teacher = map(network_name, networks)
            raise UserError(
                f"{method} compares feature maps (B, C, H, W), these are not both maps: the student's "
                f"{tuple(shape_s)}, the teacher's {tuple(shape_t)} ({student} and {teacher}); {OTHER_MAPS}"
            )


class ConvReg(nn.Module):
    """Convolution, BatchNorm and (by default) ReLU that bring a student's map to the shape of the teacher's.

    Args:
        s_shape: the student's (B, C, H, W).
        t_shape: the teacher's (B, C, H, W): half or twice the student's height, or no larger than the student's map.
        use_relu: end with a ReLU.

    Raises:
        UserError: the teacher's map is larger, but not exactly twice as high.

    Reference: FitNets, Romero et al. 2015, arXiv 1412.6550, section 2.2.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> None:
        super().__init__()
        (_, s_channels, s_h, s_w), (_, t_channels, t_h, t_w) = s_shape, t_shape
        self.use_relu = use_relu
        self.conv: nn.Module
        if s_h == 2 * t_h:
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=3, stride=2, padding=1)
        elif 2 * s_h == t_h:
            self.conv = nn.ConvTranspose2d(s_channels, t_channels, kernel_size=4, stride=2, padding=1)
        elif s_h >= t_h and s_w >= t_w:
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=(1 + s_h - t_h, 1 + s_w - t_w))
        else:
            raise UserError(
                f"no regressor from a student map of {tuple(s_shape)} to a teacher map of {tuple(t_shape)}: "
                "the teacher's must be half as high, twice as high, or no larger"
            )
        self.bn = nn.BatchNorm2d(t_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_student, H, W) -> (B, C_teacher, H', W')."""
        x = self.bn(self.conv(x))
        return self.relu(x) if self.use_relu else x


class ResizedReg(ConvReg):
    """`ConvReg` for two maps of any sizes: the student's is resized to the teacher's size, then a 1x1 convolution.

    Where the student's map is larger it is average-pooled, where it is smaller it is interpolated linearly.

    Args:
        s_shape, t_shape, use_relu: see `ConvReg`.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> None:
        super().__init__((*s_shape[:2], *t_shape[2:]), t_shape, use_relu)
        self.size = t_shape[2], t_shape[3]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_student, H, W) -> (B, C_teacher, H', W')."""
        x = pool_larger(x, self.size)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return super().forward(x)


# Positions of the largest kernel by which a regressor shrinks a map. Beyond it, the kernel would have more weights than
# most students: 30 million from 64 channels of 56x56 to 256 of 14x14.
_WIDEST_KERNEL = 8


def regressor(s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> ConvReg:
    """A regressor from a student's map (B, C, H, W) to a teacher's, of any sizes.

    `ConvReg` where it takes both shapes: one convolution, of stride 2, transposed, or whose kernel of at most 8x8 is as
    much larger than 1x1 as the student's map is larger than the teacher's. `ResizedReg` for all other shapes.
    """
    (s_h, s_w), (t_h, t_w) = s_shape[2:], t_shape[2:]
    half, twice = (s_h, s_w) == (2 * t_h, 2 * t_w), (t_h, t_w) == (2 * s_h, 2 * s_w)
    shrinks = all(0 <= s - t < _WIDEST_KERNEL for s, t in ((s_h, t_h), (s_w, t_w)))
    return (ConvReg if half or twice or (shrinks and s_h != 2 * t_h) else ResizedReg)(s_shape, t_shape, use_relu)


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps (B, C, H, W) to the smaller height and the smaller width of the two."""
    return pool_larger(a, b.shape[-2:]), pool_larger(b, a.shape[-2:])
