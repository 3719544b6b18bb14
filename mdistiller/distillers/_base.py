"""`Distiller`, the base class of every distillation method."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import one_line
from ..errors import UserError
from ..models.parameters import Group
from ._compiled import CompiledForward
from ._declared import declared
from ._inferred import infer, sections_read
from .facts import RunFacts
from .registration import register
from .stages import Stage, train_layers

Features = dict[str, Any]
Losses = dict[str, Tensor]


@overload
def warm_up(epoch: int, epochs: int) -> float: ...
@overload
def warm_up(epoch: Tensor, epochs: int) -> Tensor: ...
def warm_up(epoch: int | Tensor, epochs: int) -> float | Tensor:
    """The factor in (0, 1] of a loss weight that grows linearly over the first `epochs` epochs; 1 for `epochs` 0.

    A number for a number, a tensor () for the tensor () that a compiled step gets as its epoch.
    """
    if isinstance(epoch, Tensor):
        return (epoch / max(epochs, 1)).clamp(max=1.0)
    return min(epoch / epochs, 1.0) if epochs > 0 else 1.0


@overload
def cosine_fall(epoch: int, first: int, last: int) -> float: ...
@overload
def cosine_fall(epoch: Tensor, first: int, last: int) -> Tensor: ...
def cosine_fall(epoch: int | Tensor, first: int, last: int) -> float | Tensor:
    """The factor in [0, 1] that falls by half a cosine from 1, up to epoch `first`, to 0, from epoch `last` on.

        (1 + cos(pi (epoch - first) / (last - first))) / 2

    A number for a number, a tensor () for the tensor () that a compiled step gets as its epoch.
    """
    passed = (epoch - first) / max(last - first, 1)
    if isinstance(passed, Tensor):
        return (1 + torch.cos(math.pi * passed.clamp(0.0, 1.0))) / 2
    return (1 + math.cos(math.pi * min(max(passed, 0.0), 1.0))) / 2


class Distiller(nn.Module):
    """A student, frozen networks (the teacher) and the loss between them; docs/methods.md is the guide.

    A subclass defines `forward_train(image, target, **kwargs)`, which returns the student's logits (B, C) and a
    dict of named scalar losses; the trainer minimises their sum. `kwargs` holds `epoch` (int, from 1; a tensor () in a
    compiled step) and the other fields of the batch: `index` (B,) int64, each image's index in the training set, and
    those that `needs_batch` names. `after_step` changes what a step changes besides the parameters: a memory bank.

    A method with additional layers adds their parameters to `get_learnable_parameters()` and their number to
    `get_extra_parameters()`. `contract.check_distiller` checks a method when its trainer is built.
    """

    # The section of the config tree that holds its hyper-parameters; `register` sets it.
    config_section: ClassVar[str] = ""
    # Facts of the run that the constructor needs as keyword arguments after (student, teacher, cfg); see `RunFacts`.
    needs_run: ClassVar[tuple[str, ...]] = ()
    # Fields of the batch that it needs in addition to image and target, such as "index" or "contrastive_index". Those
    # that `forward_train` names need no declaration.
    needs_batch: ClassVar[tuple[str, ...]] = ()
    # False for Vanilla: no teacher is built and no teacher checkpoint is needed.
    needs_teacher: ClassVar[bool] = True
    # OFD keeps its teacher in training mode, as its paper's code does; every other frozen network is in eval mode.
    teacher_in_train_mode: ClassVar[bool] = False
    # What the method reads of the teacher: "logits" and names of features ("feats", "preact_feats", "last_map",
    # "pooled_feat"), or of single maps ("feats[3]"). Then a faster copy of the teacher runs, which returns just that.
    # None: the teacher itself runs. Not inherited, as a subclass may read more than its parent class, in other ways.
    teacher_outputs: tuple[str, ...] | None = None
    # The loss compares the images of a batch with each other, so SOLVER.ACCUMULATE cannot split it into micro-batches.
    compares_images: ClassVar[bool] = False
    # False for Vanilla: it has not both a task loss and a distillation loss, so DOT cannot train it.
    distills: ClassVar[bool] = True
    # It defines `forward_decoupled`, which DeepKD trains on. Not inherited by a class with a forward_train of its own.
    decouples: ClassVar[bool] = False
    # It compares the feature maps that DISTILLER.PAIRS names.
    compares_maps: ClassVar[bool] = False
    # Its cross-entropy with the labels is `self.cross_entropy(logits, target, **kwargs)`, which knows labels that are
    # smoothed or mixed. Not inherited by a class with a forward_train of its own, which may compute it in another way.
    soft_labels: ClassVar[bool] = False
    # It softens logits, and does so by `_logits.softened`, which knows EXPERIMENT.LOGIT_STAND. A method that reads that
    # setting itself need not say so.
    standardizes_logits: ClassVar[bool] = False
    # Beside the cross-entropy, its loss needs the one class, or the one image of the training set, that an image shows.
    # So mixed images (DATASET.MIXUP, CUTMIX) are refused.
    reads_labels: ClassVar[bool] = False
    # SOLVER.LABEL_SMOOTHING; `smooth_labels` sets it.
    label_smoothing: float = 0.0
    # The setting of its section that weighs its use of the labels, such as "LOSS.CE_WEIGHT": with 0 it needs none.
    # Empty: it always needs them. Not inherited by a class with its own forward_train, which may read them otherwise.
    label_weight: ClassVar[str] = ""
    # Names of parameters, or of modules, that require gradients but are not to be trained.
    untrained: tuple[str, ...] = ()

    student: nn.Module
    teacher: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "teacher_outputs" not in cls.__dict__:
            cls.teacher_outputs = None
        if "forward_train" in cls.__dict__ and "soft_labels" not in cls.__dict__:
            cls.soft_labels = False
        if "forward_train" in cls.__dict__ and "label_weight" not in cls.__dict__:
            cls.label_weight = ""
        if "forward_train" in cls.__dict__ and "decouples" not in cls.__dict__:
            cls.decouples = False
        for name in ("needs_run", "needs_batch", "teacher_outputs", "untrained"):
            value = getattr(cls, name)
            if not (isinstance(value, (tuple, list)) or (value is None and name == "teacher_outputs")):
                raise TypeError(f'{cls.__name__}.{name} must be a tuple of names, such as ("index",), not {value!r}')
        infer(cls)

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        _check_networks(type(self).__name__, student, teacher)
        # Frozen network -> what the method reads of it; see `add_frozen`.
        self.frozen: dict[str, tuple[str, ...] | None] = {}
        # Frozen network -> what is called instead of it. In a dict, so that a runner that is a module becomes no
        # submodule and is not saved in checkpoints.
        self._runners: dict[str, Callable[[Tensor], Any]] = {}
        self._compiled: CompiledForward | None = None
        # The stage before training that is on, and the parameters whose requires_grad it has changed.
        self.stage_on: Stage | None = None
        self._set_aside: list[nn.Parameter] = []
        self._in_step = False
        self._output_checked = False
        self._without_labels = False
        self._decoupled_top: int | None = None
        self.student = student
        self.add_frozen("teacher", teacher, self.teacher_outputs)

    def add_frozen(self, name: str, network: nn.Module, outputs: Sequence[str] | None = None) -> None:
        """Add a network that is not trained by gradients: an assistant, or a moving average of the student.

        It becomes the submodule `name`, without gradients, in eval mode, and outside of what ranks average and
        SOLVER.SYNC_BN converts. `frozen_forward(name, image)` runs it.

        Args:
            network: image (B, 3, H, W) -> (logits (B, C), features by name).
            outputs: what the method reads of it, as in `teacher_outputs`; None if it may read anything, or if the
                network changes during training.
        """
        self.add_module(name, network.requires_grad_(False))
        self.frozen[name] = None if outputs is None else tuple(outputs)

    def reads_only(self, name: str, outputs: Sequence[str]) -> None:
        """Declare less of a frozen network than at first: once a method knows which maps it compares.

        Without effect where nothing was declared, as for a subclass that may read more.
        """
        if self.frozen[name] is not None:
            self.frozen[name] = tuple(outputs)

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for everything but the frozen networks, see `evaluated`; in a stage, for what it trains."""
        super().train(mode)
        if mode and self.stage_on is not None:
            train_layers(self, set(map(id, self.stage_on.parameters)))
        for name in self.evaluated:
            self.get_submodule(name).eval()
        return self

    @property
    def evaluated(self) -> list[str]:
        """The frozen networks that are always in eval mode: all, but for OFD's teacher (`teacher_in_train_mode`)."""
        return [name for name in self.frozen if not (name == "teacher" and self.teacher_in_train_mode)]

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        """What the optimizer updates: the student's parameters and those of the method's layers.

        Parameters, and groups as torch.optim takes them: {"params": [...], "weight_decay": 0.0}. A group's own "lr"
        follows the schedule in proportion to SOLVER.LR.
        """
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """How many parameters the method adds to the student while training."""
        return 0

    def stages(self) -> tuple[Stage, ...]:
        """The stages before training, in their order; by default there are none. See `Stage`."""
        return ()

    def turn_to(self, stage: Stage | None) -> None:
        """Be in one of the `stages` from now on, or in none: its losses instead of `forward_train`'s, its parameters.

        The trainer does it, and a training loop of one's own may; `train()` comes after it.
        """
        for p in self._set_aside:
            p.requires_grad_(not p.requires_grad)
        trained = set() if stage is None else set(map(id, stage.parameters))
        others = [] if stage is None else [p for p in self.parameters() if p.requires_grad != (id(p) in trained)]
        for p in others:
            p.requires_grad_(not p.requires_grad)
        self.stage_on, self._set_aside = stage, others
        self._compiled, self._output_checked = None, False

    @classmethod
    def from_run(cls, student: nn.Module, teacher: nn.Module | None, cfg: CN, facts: RunFacts) -> Distiller:
        """Build the method for a run, with those of the run's facts that `needs_run` names."""
        return cls(student, teacher, cfg, **facts.named(cls.needs_run, cls.__name__))  # type: ignore[call-arg, arg-type]

    @classmethod
    def facts_needed(cls, cfg: CN) -> set[str]:
        """Names of the run's facts that `from_run` reads."""
        return set(cls.needs_run)

    @classmethod
    def judged_as(cls, cfg: CN) -> type[Distiller]:
        """The class that declares what the loss compares and reads, and the teacher's mode, for a run of `cfg`."""
        return cls

    @classmethod
    def config_sections(cls, cfg: CN) -> set[str]:
        """The sections of the config tree that the method reads; of one that is not registered, those that it names."""
        return {cls.config_section} if cls.config_section else sections_read(cls, cfg)

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...] | None:
        """The settings that weigh its use of the labels; None if it always needs them. See `label_weight`."""
        return (f"{cls.config_section}.{cls.label_weight}",) if cls.label_weight else None

    def train_without_labels(self) -> None:
        """The training images have no labels from now on: `cross_entropy` is 0, as its weight is."""
        self._without_labels = True

    @property
    def module(self) -> Distiller:
        """The distiller itself: the original wraps it in DataParallel, and its trainers read `distiller.module`."""
        return self

    def borrow_networks(self) -> None:
        """Turn student and teacher into plain attributes: they are submodules of another distiller."""
        for name in ("student", "teacher"):
            network = getattr(self, name)
            delattr(self, name)
            object.__setattr__(self, name, network)  # in no state dict or module list; train() leaves it alone

    def compile_training(self, sizes: Collection[int], *args: Any, **options: Any) -> None:
        """Run the steps' forward passes of batches of these sizes through torch.compile from now on.

        See `CompiledForward` for the arguments.
        """
        self._compiled = CompiledForward(self._trained_by(), sizes, *args, **options)

    def _trained_by(self) -> Callable[..., Any]:
        """What a step calls: the losses of the stage, or `forward_train`, or `forward_decoupled`."""
        if self.stage_on is not None:
            return self.stage_on.losses
        if self._decoupled_top is not None:
            return partial(self.forward_decoupled, top=self._decoupled_top)
        return self.forward_train

    def settled(self) -> bool:
        """Whether `forward_train` computes what it will compute from now on, so that it can be compiled.

        False while a first step sets what depends on the data, as CRD's does.
        """
        return True

    def after_step(self) -> None:
        """Called without gradients once the parameters have been updated.

        Not after a step that SOLVER.NAN_POLICY skips; but also after one that fp16's search for its scale drops.

        Here a method changes what is neither a parameter nor a layer's own buffer: a memory bank, a moving average of
        the student. In `forward_train` that would happen also where the step is skipped, and once for each micro-batch,
        and a compiled step would compute gradients with the changed values. `forward_train` keeps what this needs in
        plain attributes.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the method itself, each a tensor of one element, such as a learnt temperature.

        They are read and logged at the end of each epoch, on every rank.
        """
        return {}

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """A context in which the caller calls `after_step`. Outside of it, `forward` does, after each `forward_train`.

        So a training loop that knows nothing of `after_step` still trains the method as it is.
        """
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def run_frozen_by(self, name: str, runner: Callable[[Tensor], Any] | None) -> None:
        """Call `runner`, a faster implementation of the same function, instead of a frozen network; None: no longer."""
        if runner is None:
            self._runners.pop(name, None)
        else:
            self._runners[name] = runner

    def frozen_forward(self, name: str, image: Tensor) -> tuple[Tensor, Features]:
        """The logits (B, C) and the features of a frozen network for `image` (B, 3, H, W), without gradients.

        Raises:
            UndeclaredOutputError: on reading an output that the network has but `add_frozen` did not declare.
        """
        run = self._runners.get(name) or getattr(self, name)
        with torch.no_grad():
            output = run(image)
        outputs = self.frozen[name]
        return output if outputs is None else declared(output, outputs, f"{type(self).__name__}'s {name}")

    def teacher_forward(self, image: Tensor) -> tuple[Tensor, Features]:
        """`frozen_forward` of the teacher."""
        return self.frozen_forward("teacher", image)

    def smooth_labels(self, share: float) -> None:
        """Let `cross_entropy` spread this share of each label over all classes, here and in a base method."""
        for part in self.modules():
            if isinstance(part, Distiller):
                part.label_smoothing = share

    def cross_entropy(self, logits: Tensor, target: Tensor, **batch: Any) -> Tensor:
        """Cross-entropy with the labels, averaged over the batch: () in nats.

            loss = mean_B[ s * CE(z, y) + (1 - s) * CE(z, y') ]

        where the second label y' and the share s of the first come from mixed images; without them s = 1. Each CE is
        smoothed by SOLVER.LABEL_SMOOTHING e: with the distribution 1 - e on the label, plus e / C on every class.
        It is 0 for images without labels; see `train_without_labels`.

        Args:
            logits: (B, C), before softmax.
            target: (B,) int64.
            batch: the other fields of the batch, of which `mixed_target` (B,) int64 and `target_share` (B,) are read.
        """
        if self._without_labels:
            return 0.0 * logits.float().sum()
        other, smoothing = batch.get("mixed_target"), self.label_smoothing
        if other is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        first, second = (
            F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing) for label in (target, other)
        )
        share = batch["target_share"].to(first.dtype)
        return (share * first + (1 - share) * second).mean()

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        """One training step's logits and losses; see the class."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_train(image, target, **kwargs)")

    def decouple(self, top: int) -> None:
        """Train on the losses of `forward_decoupled` from now on; see there for `top`."""
        self._decoupled_top = top

    def forward_decoupled(
        self, image: Tensor, target: Tensor, top: int = 0, **kwargs: Any
    ) -> tuple[Tensor, Losses]:
        """`forward_train` with the distillation loss in two parts: of the target, and of the other classes.

        A method that declares `decouples` defines it.

        Args:
            top: the part of the other classes is over the teacher's `top` largest ones alone; 0: over all.

        Returns:
            The logits (B, C), and the losses () "loss_task", "loss_tckd" and "loss_nckd".
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward_decoupled(image, target, top, **kwargs)")

    def deployments(self) -> dict[str, nn.Module]:
        """The networks that can be deployed after training, by name; the main one first.

        They are what is scored, saved as `student_*`, averaged by SOLVER.EMA and counted in cost. Each returns the
        logits (B, C), or (logits, features), for `image`, and is the same object at every call. A method that deploys
        another network than the student alone, say with a projector and the teacher's classifier, returns it here.
        """
        return {"student": self.student}

    def network_to_save(self, name: str) -> nn.Module:
        """The network whose weights the files of the deployment `name` hold: by default, the deployment itself."""
        return self.deployments()[name]

    def merge(self) -> None:
        """Let `deployments()` return networks with fewer layers and equal logits from now on, where there are such.

        For `mdistiller convert --merge`. Training does not go on after it.
        """

    def main_network(self) -> nn.Module:
        """The network whose weights `student_best` holds."""
        return self.network_to_save(next(iter(self.deployments())))

    def forward_test(self, image: Tensor) -> Tensor:
        """The logits (B, C) that validation scores: the main deployment's."""
        return logits_of(next(iter(self.deployments().values()))(image))

    def forward_heads(self, image: Tensor) -> dict[str, Tensor]:
        """Every head's logits (B, C) by name: those of the deployments, or under "" if there is one.

        Validation and the choice of the best checkpoint use the first head. A method may override this to compute
        several deployments at once, or to add heads.
        """
        networks = self.deployments()
        if len(networks) == 1:
            return {"": self.forward_test(image)}
        return {name: logits_of(network(image)) for name, network in networks.items()}

    def forward(self, **kwargs: Any) -> Any:
        """`forward_train` in training mode, else `forward_test` of `image`. See `one_step`.

        In a stage, its losses beside logits that say nothing: no classifier is trained there.
        """
        if not self.training:
            return self.forward_test(kwargs["image"])
        compiled = self._compiled
        if compiled is not None and compiled.takes(kwargs) and (self.stage_on is not None or self.settled()):
            output = compiled(kwargs)
        else:
            output = self._trained_by()(**kwargs)
        if self.stage_on is not None:
            output = kwargs["image"].new_zeros(len(kwargs["target"]), 1), output
        if not self._output_checked:
            _check_output(type(self).__name__, output, kwargs["target"])
            self._output_checked = True
        if not self._in_step and self.stage_on is None:
            with torch.no_grad():
                self.after_step()
        return output


def _check_networks(name: str, student: Any, teacher: Any) -> None:
    for role, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{name}(student, teacher, ...) takes two networks (torch.nn.Module), its {role} is "
                f"{one_line(network, 60)}; give it one, or train without a teacher by NONE (Vanilla)"
            )


def logits_of(output: Any) -> Tensor:
    """The logits of a network's output: (logits, features), or the logits alone."""
    return output[0] if isinstance(output, (tuple, list)) else output


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


class LogitDistiller(Distiller):
    """Cross-entropy with the labels and a loss between the logits of the two networks.

    A subclass defines `logit_loss`, and sets `ce_loss_weight`; it declares `teacher_outputs = ("logits",)`.
    """

    soft_labels = True
    ce_loss_weight: float

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        """The distillation loss (), with its weight.

        Args:
            logits_student, logits_teacher: (B, C).
            target: (B,) int64.
            kwargs: as `forward_train` has them.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no logit_loss(student, teacher, target)")

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, _ = self.student(image)
        logits_teacher, _ = self.teacher_forward(image)
        return logits_student, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": self.logit_loss(logits_student, logits_teacher, target, **kwargs),
        }


class FeatureDistiller(Distiller):
    """Cross-entropy with the labels and a loss between the features of the two networks.

    A subclass defines `feature_loss(feature_student, feature_teacher) -> ()`.

    Args:
        cfg: the method's own section, with LOSS.CE_WEIGHT and LOSS.FEAT_WEIGHT.
    """

    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"

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
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": self.feat_loss_weight * self.feature_loss(feature_student, feature_teacher),
        }


@register("NONE")
class Vanilla(Distiller):
    """The student alone, trained by cross-entropy: the baseline of every table."""

    needs_teacher = False
    distills = False
    soft_labels = True
    teacher_outputs = ()

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, cfg: CN | None = None) -> None:
        super().__init__(student, teacher if teacher is not None else nn.Identity())

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, _ = self.student(image)
        return logits_student, {"ce": self.cross_entropy(logits_student, target, **kwargs)}
