"""`Distiller`, the base class of every distillation method, and `distiller_dict`, which maps names to methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..registry import Registry

Features = dict[str, Any]
Losses = dict[str, Tensor]

distiller_dict = Registry("distiller")
# Each method's default hyper-parameters by their section of the config tree; `engine/cfg.py` reads it.
method_defaults: dict[str, CN] = {}


def register(name: str, defaults: CN | None = None, section: str | None = None) -> Callable[[type], type]:
    """Class decorator: add a method to `distiller_dict` and its hyper-parameters to the config tree.

    Args:
        name: the method's name in `DISTILLER.TYPE`.
        defaults: its hyper-parameters; None when another file declares them.
        section: their section of the config tree; `name` by default.

    Raises:
        ValueError: the name or the section is taken.
    """

    def enter(cls: type) -> type:
        if defaults is not None:
            declare_defaults(section or name, defaults)
        cls.config_section = section or name  # type: ignore[attr-defined]
        return distiller_dict.register(name)(cls)

    return enter


def declare_defaults(section: str, defaults: CN) -> None:
    """Put `defaults` into the config tree under `section`; for hyper-parameters that several methods share."""
    if section in method_defaults:
        raise ValueError(f"config section {section!r} is declared already")
    method_defaults[section] = defaults


class Distiller(nn.Module):
    """A student, a frozen teacher and the loss between them.

    A subclass defines `forward_train(image, target, **kwargs)`, which returns the student's logits (B, C) and a
    dict of named scalar losses; the trainer minimises their sum. `kwargs` holds `index` (B,) int64, each image's
    index in the training set, `epoch` (int, from 1), and the fields that `needs_batch` names.

    A method with additional layers adds their parameters to `get_learnable_parameters()` and their number to
    `get_extra_parameters()`.
    """

    # The section of the config tree that holds its hyper-parameters; `register` sets it.
    config_section: ClassVar[str] = ""
    # Facts of the run that the constructor also needs, as keyword arguments after (student, teacher, cfg): "num_data".
    needs_run: ClassVar[tuple[str, ...]] = ()
    # Fields of the batch that it needs in addition to image, target and index, such as "contrastive_index".
    needs_batch: ClassVar[tuple[str, ...]] = ()
    # False for Vanilla: no teacher is built and no teacher checkpoint is needed.
    needs_teacher: ClassVar[bool] = True
    # OFD keeps its teacher in training mode, as its paper's code does; every other method's teacher is in eval mode.
    teacher_in_train_mode: ClassVar[bool] = False
    # The teacher's outputs that the method reads. Not inherited, as a subclass may read more than its parent class.
    # If they are "logits" and "pooled_feat" at most, the teacher keeps no feature maps, and the outputs may come from
    # DISTILLER.TEACHER_CACHE.
    teacher_outputs: tuple[str, ...] = ("feature maps",)
    # The loss compares the images of a batch with each other, so SOLVER.ACCUMULATE cannot split it into micro-batches.
    compares_images: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "teacher_outputs" not in cls.__dict__:
            cls.teacher_outputs = Distiller.teacher_outputs

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.teacher.requires_grad_(False)
        # In a tuple, so that a runner that is a module becomes no submodule and is not saved in checkpoints.
        self._runner: tuple[Callable[[Tensor], Any]] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._output_checked = False

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for everything; the teacher stays in eval mode, unless `teacher_in_train_mode` is set."""
        super().train(mode)
        if not self.teacher_in_train_mode:
            self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates: the student's parameters and those of the method's layers."""
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """How many parameters the method adds to the student while training."""
        return 0

    @classmethod
    def from_run(cls, student: nn.Module, teacher: nn.Module | None, cfg: CN, facts: Mapping[str, Any]) -> Distiller:
        """Build the method for a run, with those of the run's `facts` that `needs_run` names."""
        return cls(student, teacher, cfg, **{name: facts[name] for name in cls.needs_run})  # type: ignore[call-arg, arg-type]

    @classmethod
    def config_sections(cls, cfg: CN) -> set[str]:
        """The sections of the config tree that the method reads."""
        return {cls.config_section}

    def borrow_networks(self) -> None:
        """Turn student and teacher into plain attributes: they are submodules of another distiller."""
        for name in ("student", "teacher"):
            network = getattr(self, name)
            delattr(self, name)
            object.__setattr__(self, name, network)  # in no state dict or module list; train() leaves it alone

    def compile_training(self, **options: Any) -> None:
        """Run `forward_train` through torch.compile from now on; `options` are those of torch.compile."""
        self._compiled = torch.compile(self.forward_train, **options)

    def run_teacher_by(self, runner: Callable[[Tensor], Any]) -> None:
        """Call `runner` instead of the teacher: a faster implementation of the same function."""
        self._runner = (runner,)

    def teacher_forward(self, image: Tensor) -> tuple[Tensor, Features]:
        """The teacher's logits (B, C) and features for `image` (B, 3, H, W), without gradients."""
        with torch.no_grad():
            return (self._runner[0] if self._runner else self.teacher)(image)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        """One training step's logits and losses; see the class."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_train(image, target, **kwargs)")

    def forward_test(self, image: Tensor) -> Tensor:
        """The logits (B, C) that validation scores."""
        return self.student(image)[0]

    def forward_heads(self, image: Tensor) -> dict[str, Tensor]:
        """Every head's logits (B, C) by name. Validation and the choice of the best checkpoint use the first head."""
        return {"": self.forward_test(image)}

    def deployments(self) -> dict[str, nn.Module]:
        """The modules that can be deployed after training, by name. Each accepts an image; used to count their cost."""
        return {"student": self.student}

    def forward(self, **kwargs: Any) -> Any:
        """`forward_train` in training mode, else `forward_test` of `image`."""
        if not self.training:
            return self.forward_test(kwargs["image"])
        output = (self._compiled or self.forward_train)(**kwargs)
        if not self._output_checked:
            _check_output(type(self).__name__, output, kwargs["target"])
            self._output_checked = True
        return output


def _check_output(name: str, output: Any, target: Tensor) -> None:
    """Check what `forward_train` of a new method returned; called once, on the first step."""
    if not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(f"{name}.forward_train must return (logits, losses), it returned {type(output).__name__}")
    logits, losses = output
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(target):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name}.forward_train must return logits of shape ({len(target)}, classes), not {shape}")
    if not isinstance(losses, Mapping) or not losses:
        raise TypeError(f"{name}.forward_train must return a dict of named losses, not {losses!r}")
    for key, value in losses.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: loss {key!r} must be a tensor, it is {type(value).__name__}")


class FeatureDistiller(Distiller):
    """Cross-entropy with the labels and a loss between the features of the two networks.

    A subclass defines `feature_loss(feature_student, feature_teacher) -> ()`.

    Args:
        cfg: the method's own section, with LOSS.CE_WEIGHT and LOSS.FEAT_WEIGHT.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.LOSS.FEAT_WEIGHT

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} defines no feature_loss(feature_student, feature_teacher)")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, feature_student = self.student(image)
        _, feature_teacher = self.teacher_forward(image)
        return logits_student, {
            "loss_ce": self.ce_loss_weight * F.cross_entropy(logits_student, target),
            "loss_kd": self.feat_loss_weight * self.feature_loss(feature_student, feature_teacher),
        }


@register("NONE")
class Vanilla(Distiller):
    """The student alone, trained by cross-entropy: the baseline of every table."""

    needs_teacher = False
    teacher_outputs = ()

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, cfg: CN | None = None) -> None:
        super().__init__(student, teacher if teacher is not None else nn.Identity())

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, _ = self.student(image)
        return logits_student, {"ce": F.cross_entropy(logits_student, target)}
