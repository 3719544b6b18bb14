"""DCGD: divide-and-conquer grouping distillation. Any method on a plain network, plus group branches on its trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name
from ..dataset.batch import VIEWS
from ..errors import UserError
from ..grouping import load_groups
from ..models.eval_mode import eval_mode
from ..models.grouped import GroupedStudent
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, PATH, TEMPERATURE
from ..registry import unknown_name
from ._base import Distiller, Losses, register
from ._logits import logit_stand
from .facts import RunFacts
from .KD import kd_loss
from .registration import distiller_dict
from .stages import Stage

DEFAULTS = CN(
    {
        # The method of the plain head, by its name in `distiller_dict`. DCGD_CE, DCGD_KD and DCGD_DKD ignore it.
        "BASE": "KD",
        # For a plain student: a JSON file (tools/group_classes.py), or the name of a published grouping: res56, res110,
        # wrn_40_2. Empty for a student that is grouped already (res56_M_r20).
        "GROUPS": "",
        # The head that validation scores and that decides `student_best`: grouped, single or mean.
        "EVAL_HEAD": "grouped",
        # How the branches are computed: auto, loop or together.
        "BRANCHES": "auto",
        # The temperature of the KD loss of the grouped logits.
        "TEMPERATURE": 20.0,
        "LOSS": CN({"CE_WEIGHT": 0.3, "KD_WEIGHT": 1.0}),
    }
)


# The names, BASE, EVAL_HEAD and BRANCHES, are checked where they are looked up, with the names that resemble them.
RANGES = {
    "GROUPS": PATH,
    "TEMPERATURE": TEMPERATURE,
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.KD_WEIGHT": NOT_NEGATIVE,
}


@register("DCGD", DEFAULTS, ranges=RANGES)
class DCGD(Distiller):
    """A base method on the plain network and, for the grouped student's branches on the same trunk, the losses

        loss_multi_kd = KD_WEIGHT * kd_loss(z, z_teacher, TEMPERATURE),   loss_multi_ce = CE_WEIGHT * CE(z, y)

    where z (B, C) are the grouped logits in class order. Trunk and teacher run once per step; under a base method whose
    teacher is in training mode (OFD), the branches learn from the teacher in eval mode. Under a base method that needs
    two views of each image, they see the weak one. The training accuracy is the plain head's.

    EXPERIMENT.LOGIT_STAND standardises the logits of `loss_multi_kd`, and those of a base method that softens logits.

    Args:
        student: a `GroupedStudent`, or a plain network, which is grouped by `cfg.DCGD.GROUPS`.
        facts: of the run, for a base method that needs some; None: it is built by hand like DCGD.

    Raises:
        UserError: a plain student has no groups or no last stage to split off, a grouped student's groups differ from
            `cfg.DCGD.GROUPS`, or the base method, the head or the branch mode is unknown.
    """

    soft_labels = True
    standardizes_logits = True
    student: GroupedStudent
    # The base method, if the subclass fixes it; None: `cfg.DCGD.BASE`.
    base: ClassVar[str | None] = None

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, facts: RunFacts | None = None) -> None:
        grouped = group_student(student, cfg)
        super().__init__(grouped, teacher)
        if cfg.DCGD.EVAL_HEAD not in grouped.head_names:
            raise unknown_name("head (DCGD.EVAL_HEAD)", cfg.DCGD.EVAL_HEAD, grouped.head_names)
        self.eval_head = cfg.DCGD.EVAL_HEAD
        self.temperature = cfg.DCGD.TEMPERATURE
        self.ce_loss_weight = cfg.DCGD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DCGD.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

        method = self.base_method(cfg)
        if facts is None:
            self.method: Distiller = method(grouped.base, teacher, cfg)  # type: ignore[call-arg]
        else:
            self.method = method.from_run(grouped.base, teacher, cfg, facts)
        self._take_over(self.method)

    def _take_over(self, method: Distiller) -> None:
        """Share the networks with the base method, and make its needs those of DCGD.

        Raises:
            UserError: the base method deploys another network than its student, which is then not DCGD's plain head.
        """
        if method.main_network() is not method.student:
            name, deployed = type(method).__name__, type(method.main_network()).__name__
            raise UserError(f"DCGD.BASE: {name} deploys a {deployed}, not its student, which is DCGD's plain head")
        method.borrow_networks()  # so that each network is in the state dict once
        # The branches take their trunk's maps from the base method's forward pass.
        self._student_kept = _Kept(self.student.base)
        object.__setattr__(method, "student", self._student_kept)
        # The base method and the branches share one forward pass of the teacher.
        self._teacher_kept = _Kept(self.teacher)
        method.run_frozen_by("teacher", self._teacher_kept.of)
        of_loss = "compares_images", "compares_maps", "soft_labels", "reads_labels"
        for attribute in ("needs_batch", "teacher_in_train_mode", *of_loss):
            setattr(self, attribute, getattr(method, attribute))
        self.untrained = tuple(map(_name_in_dcgd, method.untrained))
        outputs = method.frozen["teacher"]
        self.teacher_outputs = None if outputs is None else tuple(dict.fromkeys(("logits", *outputs)))
        others = {_name_in_dcgd(name): own for name, own in method.frozen.items() if name != "teacher"}
        self.frozen = {"teacher": self.teacher_outputs, **others}
        # In a tuple, as it has no weights of its own.
        self._mean_head = (_MeanHead(self.student),)

    @classmethod
    def base_method(cls, cfg: CN) -> type[Distiller]:
        """The class of the base method.

        Raises:
            UserError: there is none of that name, or it is DCGD itself.
        """
        method = distiller_dict[cls.base or cfg.DCGD.BASE]
        if issubclass(method, DCGD):
            raise UserError(f"DCGD.BASE {cfg.DCGD.BASE} is DCGD itself; name the plain head's method, such as KD")
        return method

    @classmethod
    def from_run(cls, student: nn.Module, teacher: nn.Module | None, cfg: CN, facts: RunFacts) -> Distiller:
        """Pass the facts on to the base method."""
        return cls(student, teacher, cfg, facts)  # type: ignore[arg-type]

    @classmethod
    def facts_needed(cls, cfg: CN) -> set[str]:
        """Those of the base method."""
        return cls.base_method(cfg).facts_needed(cfg)

    @classmethod
    def judged_as(cls, cfg: CN) -> type[Distiller]:
        """The base method."""
        return cls.base_method(cfg).judged_as(cfg)

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...] | None:
        """Those of the base method, and its own."""
        of_base = cls.base_method(cfg).label_weights(cfg)
        return None if of_base is None else (*of_base, "DCGD.LOSS.CE_WEIGHT")

    def train_without_labels(self) -> None:
        super().train_without_labels()
        self.method.train_without_labels()

    def run_frozen_by(self, name: str, runner: Callable[[Tensor], Any] | None) -> None:
        own, _, of_method = name.partition("method.")
        if own:
            self._teacher_kept.function = runner or self.teacher
        else:
            self.method.run_frozen_by(of_method, runner)

    def _branches_teacher(self, image: Tensor) -> Tensor:
        """The teacher's logits (B, C) in eval mode; the base method's, if its teacher is in eval mode."""
        if self.teacher_in_train_mode:
            with eval_mode(self.teacher):
                return self.teacher(image)[0]
        with torch.no_grad():
            return self._teacher_kept.of(image)[0]

    @classmethod
    def config_sections(cls, cfg: CN) -> set[str]:
        """DCGD's own and those of the base method."""
        base = distiller_dict[cls.base or cfg.DCGD.BASE]
        return {"DCGD"} if issubclass(base, DCGD) else {"DCGD", *base.config_sections(cfg)}

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        """The base method's, which include the plain network's, and the branches'."""
        branches = [*self.student.branches.parameters(), *self.student.heads.parameters()]
        return [*self.method.get_learnable_parameters(), *branches]

    def get_extra_parameters(self) -> int:
        """Those of the base method; the branches are part of the student."""
        return self.method.get_extra_parameters()

    def stages(self) -> tuple[Stage, ...]:
        """Those of the base method, in which the branches do not learn."""
        return tuple(replace(stage, losses=self._in_one_pass(stage.losses)) for stage in self.method.stages())

    def _in_one_pass(self, losses: Callable[..., Losses]) -> Callable[..., Losses]:
        def kept(image: Tensor, target: Tensor, **kwargs: Any) -> Losses:
            with self._student_kept, self._teacher_kept:
                return losses(image, target, **kwargs)

        return kept

    def settled(self) -> bool:
        return self.method.settled()

    def after_step(self) -> None:
        self.method.after_step()

    def metrics(self) -> dict[str, Tensor]:
        return self.method.metrics()

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        weak = VIEWS[0]
        seen = kwargs[weak] if weak in self.needs_batch else image
        with self._student_kept, self._teacher_kept:
            logits_single, losses = self.method.forward_train(image=image, target=target, **kwargs)
            logits_teacher = self._branches_teacher(seen)
            _, features = self._student_kept.of(seen)
        logits_grouped = self.student.forward_grouped(features)
        loss_kd = kd_loss(logits_grouped, logits_teacher.detach(), self.temperature, self.logit_stand)
        return logits_single, {
            **losses,
            "loss_multi_kd": self.kd_loss_weight * loss_kd,
            "loss_multi_ce": self.ce_loss_weight * self.cross_entropy(logits_grouped, target, **kwargs),
        }

    def forward_heads(self, image: Tensor) -> dict[str, Tensor]:
        """First the head that DCGD.EVAL_HEAD names, then the grouped and the single one."""
        heads = self.student.forward_heads(image)
        return {name: heads[name] for name in dict.fromkeys((self.eval_head, "grouped", "single"))}

    def deployments(self) -> dict[str, nn.Module]:
        """First the head that DCGD.EVAL_HEAD names; "grouped" is the whole student, "single" the plain network."""
        networks = {"grouped": self.student, "single": self.student.base, "mean": self._mean_head[0]}
        return {name: networks[name] for name in dict.fromkeys((self.eval_head, "grouped", "single"))}

    def network_to_save(self, name: str) -> nn.Module:
        """The whole student: tools/eval.py scores each of its heads, tools/export_head.py writes the plain one."""
        return self.student


def _name_in_dcgd(name: str) -> str:
    """The name within DCGD of a submodule or parameter of its base method."""
    first, dot, rest = name.partition(".")
    return {"student": "student.base", "teacher": "teacher"}.get(first, f"method.{first}") + dot + rest


class _MeanHead(nn.Module):
    """The mean of the grouped and the plain logits: image -> (B, C)."""

    def __init__(self, student: GroupedStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        return self.student.forward_heads(image)["mean"]


@register("DCGD_CE")
class DCGD_CE(DCGD):
    """DCGD whose plain head learns by cross-entropy alone."""

    base = "NONE"


@register("DCGD_KD")
class DCGD_KD(DCGD):
    """DCGD whose plain head learns by KD."""

    base = "KD"


@register("DCGD_DKD")
class DCGD_DKD(DCGD):
    """DCGD whose plain head learns by DKD."""

    base = "DKD"


def group_student(student: nn.Module, cfg: CN) -> GroupedStudent:
    """`student` with the groups of `cfg.DCGD.GROUPS`; a student that is already grouped keeps its groups.

    Raises:
        UserError: see `DCGD`.
    """
    source = cfg.DCGD.GROUPS
    if isinstance(student, GroupedStudent):
        if source and load_groups(source) != student.groups:
            raise UserError(
                f"the student is already grouped, and its groups differ from those of DCGD.GROUPS {source}; "
                "leave DCGD.GROUPS empty, or name a plain student"
            )
        student.set_branch_mode(cfg.DCGD.BRANCHES)
        return student
    if not source:
        raise UserError(
            f"DCGD needs groups for the plain student {network_name(student)}: set DCGD.GROUPS to a file that "
            "tools/group_classes.py wrote, or to the name of a published grouping"
        )
    return GroupedStudent(student, load_groups(source), cfg.DCGD.BRANCHES)


class _Kept:
    """A function of images, such as a network, whose attributes it has; inside a `with` block it keeps each output."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._open = False
        # A tuple, of which a traced step leaves nothing behind; a list would keep the outputs beyond it.
        self._kept: tuple[tuple[Tensor, Any], ...] = ()

    def __enter__(self) -> None:
        self._open = True

    def __exit__(self, *_: object) -> None:
        self._open, self._kept = False, ()

    def __call__(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.function(image, *args, **kwargs)
        if self._open:
            self._kept = (*self._kept, (image, output))
        return output

    def of(self, image: Tensor) -> Any:
        """The first output for this `image` (the same tensor, not an equal one), which is computed if none is kept."""
        for own, output in self._kept:
            if own is image:
                return output
        return self(image)

    def __getattr__(self, name: str) -> Any:
        if name == "function":  # of a copy that is not filled in yet
            raise AttributeError(name)
        return getattr(self.function, name)
