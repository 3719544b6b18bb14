"""A trainer that a user wrote for the original: which of the methods that it overrides work here, and how.

`init_optimizer(cfg)` and `log(lr, epoch, log_dict)` work as they are, and so does setting `self.optimizer`.
`train_iter(data, epoch, train_meters)` takes the whole step itself, as in the original, so settings that it cannot obey
are refused. `train` and `train_epoch` must call the inherited ones.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..console import warn
from ..distillers.contract import learnable_parameters
from ..errors import UserError
from ..models.parameters import flat_parameters
from ..models.tensor_groups import all_finite
from .lr_schedule import LR_SCALE
from .meters import Meters
from .nan_watch import NonFiniteLossError
from .overrides import setting
from .split_update import MomentaUpdate
from .utils import AverageMeter

# Methods that must call the inherited one, and what to do otherwise.
_CALLS_INHERITED = {
    "train": "call super().train(resume) in it",
    "train_epoch": "call super().train_epoch(epoch) in it, or override train_iter, log or init_optimizer",
}
# Attributes of the original's trainer that are not here, and what to use.
_GONE = {"tf_writer": "let log(lr, epoch, log_dict) pass what is to be logged to super().log(lr, epoch, log_dict)"}
# Settings that a train_iter in the original's manner would not obey: the values that ask nothing of it.
_OBEYED_BY_OUR_STEP = {
    "DATASET.MIXUP": (0,),
    "DATASET.CUTMIX": (0,),
    "SOLVER.AMP": ("none", "bf16-teacher", "fp16-teacher"),
    "SOLVER.ACCUMULATE": (1,),
    "SOLVER.CLIP_GRAD_NORM": (0,),
    "SOLVER.COMPILE": (False,),
    "SOLVER.CUDA_GRAPH": ("auto", "never"),
    "SOLVER.EMA": (0,),
    "SOLVER.NAN_POLICY": ("stop",),
    "DISTILLER.TEACHER_CACHE": ("",),
    "DISTILLER.TEACHER_CACHE_DEVICE": ("auto", "host"),
}
# Our name of a metric -> its name in the original's train_meters.
_METRICS = {"train_acc": "top1", "train_acc_top5": "top5", "train_loss": "losses"}
_OTHERS = ("training_time", "data_time")


def adopt_overrides(trainer: Any, base: type) -> None:
    """Check what the class of `trainer`, a subclass of `base`, overrides, and let its `train_iter` take the steps.

    Raises:
        UserError: a method would not be called, would not work, or would leave a setting without effect.
    """
    for cls, name, method in _own_methods(type(trainer), base):
        used = _names_in(method)
        for gone in sorted(_GONE.keys() & used):
            raise UserError(f"{cls.__name__}.{name} uses {gone}, which this trainer does not have; {_GONE[gone]}")
        if name in _CALLS_INHERITED and not _calls_inherited(method, name, type(trainer)):
            raise UserError(
                f"{cls.__name__} overrides {name} without calling the inherited one, which also resumes, saves and "
                f"handles signals; {_CALLS_INHERITED[name]}"
            )
    if _takes_original_step(type(trainer), base):
        _check_settings(trainer)
        trainer.train_iter = OwnStep(trainer)


def adopt_optimizer(trainer: Any, own: Any, must: str) -> None:
    """Let `own`, a subclass's optimizer, take the steps of `trainer`. A group's own "lr" keeps its ratio to SOLVER.LR.

    Args:
        must: "init_optimizer must return", for the message.

    Raises:
        UserError: it is no optimizer that the trainer's update rule can use.
    """
    update = trainer.update
    if own is update.optimizer:
        return
    kind = update.optimizer_class if isinstance(update, MomentaUpdate) else Optimizer
    if not isinstance(own, kind):
        raise UserError(f"{type(trainer).__name__}.{must} a {kind.__name__}, not a {type(own).__name__}")
    if update.scaler and isinstance(own, torch.optim.SGD) and any(group["fused"] for group in own.param_groups):
        raise UserError(
            f"{type(trainer).__name__}'s own SGD is fused, and would lose its momentum where the scale of SOLVER.AMP "
            "fp16 is too large; make it with fused=False, or set SOLVER.AMP bf16"
        )
    for group in own.param_groups:
        group["lr"] = float(group["lr"])  # a tensor may be that of several groups, and lie on the host
        if LR_SCALE not in group and group["lr"] != trainer.cfg.SOLVER.LR:
            group[LR_SCALE] = group["lr"] / trainer.cfg.SOLVER.LR
    update.optimizer, update.parameters = own, flat_parameters(own.param_groups)
    if trainer.ranks.first:
        _say_what_is_left_out(trainer)


def _say_what_is_left_out(trainer: Any) -> None:
    """Warn of learnable parameters that the optimizer does not have."""
    names = {id(p): name for name, p in trainer.distiller.named_parameters()}
    trained = set(map(id, trainer.update.parameters))
    learnable = [id(p) for p in flat_parameters(learnable_parameters(trainer.distiller))]
    left_out = [names.get(p, "one without a name") for p in learnable if p not in trained]
    if left_out:
        few = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        warn(
            f"{type(trainer).__name__}'s own optimizer lacks {len(left_out)} of {len(learnable)} learnable parameters "
            f"({few}), which keep their values; give it self.distiller.get_learnable_parameters() to train them"
        )


def check_knows_stages(trainer: Any) -> None:
    """Refuse a subclass whose `train_iter` takes the whole step, for a method with stages before training.

    Raises:
        UserError: it would train by `forward_train` with its own optimizer in the stages too.
    """
    if isinstance(trainer.train_iter, OwnStep):
        stages = ", ".join(stage.name for stage in trainer.phases.stages)
        raise UserError(
            f"{type(trainer).__name__}.train_iter(data, epoch, train_meters) takes the whole step itself, which does "
            f"not go with {type(trainer.distiller).__name__}'s stages before training ({stages}); take SOLVER.TRAINER "
            "base, or leave the stages out"
        )


class OwnStep:
    """Calls a subclass's `train_iter(data, epoch, train_meters)`, with the arguments of the original.

    data: the items of the batch in order, with those that the method needs besides, such as CRD's contrastive_index.
    train_meters: an `AverageMeter` for each of losses, top1, top5, training_time and data_time, of the epoch so far.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._epoch, self._meters = 0, dict[str, AverageMeter]()

    def __call__(
        self, batch: dict[str, Tensor], epoch: int, meters: Meters, recent: Meters | None = None, step: int = 0,
        measure: bool = False,
    ) -> None:  # fmt: skip
        """One step; see `BaseTrainer.train_iter`. Its gradients are not measured.

        Raises:
            UserError: it did not update the meters.
            NonFiniteLossError: the loss, or a weight after the step, is NaN or infinite.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._meters = {name: AverageMeter() for name in (*_METRICS.values(), *_OTHERS)}
        before = {name: (float(meter.sum), meter.count) for name, meter in self._meters.items()}
        type(self.trainer).train_iter(self.trainer, tuple(batch.values()), epoch, self._meters)
        sums = {ours: self._added(theirs, *before[theirs]) for ours, theirs in _METRICS.items()}
        at, kept = f"epoch {epoch}, iteration {step}", "earlier checkpoints are kept; try a lower SOLVER.LR"
        if not math.isfinite(sums["train_loss"]):
            raise NonFiniteLossError(f"{at}: the loss is {sums['train_loss']}, {kept}")
        # Not the gradients: those that a GradScaler of the user's own drops may be infinite.
        if not all_finite([p.detach() for p in self.trainer.distiller.parameters() if p.requires_grad]):
            raise NonFiniteLossError(f"{at}: the step has left weights that are NaN or infinite, {kept}")
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.trainer.device)
        for of in (meters, recent):
            if of is not None:
                of.add(len(batch["target"]), tuple(sums), totals)

    def _added(self, name: str, total: float, count: float) -> float:
        """What the step has added to a meter's sum."""
        meter = self._meters[name]
        if meter.count <= count:
            raise UserError(
                f"{type(self.trainer).__name__}.train_iter did not update train_meters[{name!r}]; update it with the "
                "mean over the batch and the number of images"
            )
        return float(meter.sum) - total


def _own_methods(cls: type, base: type) -> Iterator[tuple[type, str, Any]]:
    """(class, name, function) of the methods in the classes between `cls` and `base`."""
    for one in cls.__mro__[: cls.__mro__.index(base)]:
        yield from ((one, name, method) for name, method in vars(one).items() if inspect.isfunction(method))


def _names_in(method: Any) -> set[str]:
    """The names of attributes and of globals that a function reads or calls."""
    return {name for code in _codes(inspect.unwrap(method).__code__) for name in code.co_names}


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions within it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _calls_inherited(method: Any, name: str, cls: type) -> bool:
    """Whether a method of `cls` reads `super().NAME`, or `Base.NAME` of a class that `cls` inherits from.

    `self.distiller.train()` is no call of the inherited `train`.
    """
    origins = {"super", *(one.__name__ for one in cls.__mro__)}
    for code in _codes(inspect.unwrap(method).__code__):
        inherited = False  # whether the next attribute is one of super() or of a class
        for instruction in dis.get_instructions(code):
            if not instruction.opname.startswith("LOAD_") or not isinstance(instruction.argval, str):
                continue
            if instruction.argval in origins:
                inherited = True
            elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
                if inherited and instruction.argval == name:
                    return True
                inherited = False
    return False


def _takes_original_step(cls: type, base: Any) -> bool:
    """Whether the `train_iter` of `cls` has the original's parameters, and not those of `base`.

    Raises:
        UserError: it has neither; or it, or one that it calls, calls an inherited one that takes other arguments.
    """
    steps = [vars(one)["train_iter"] for one in cls.__mro__[: cls.__mro__.index(base) + 1] if "train_iter" in vars(one)]
    for own, inherited in itertools.pairwise(steps):
        if not _calls_inherited(own, "train_iter", cls):
            break
        if _is_of_original(own, base) != _is_of_original(inherited, base):
            raise UserError(
                f"{own.__qualname__}{inspect.signature(own)} calls the inherited train_iter, which has other "
                f"parameters; give it the same: train_iter{inspect.signature(inherited)}"
            )
    return _is_of_original(steps[0], base)


def _is_of_original(method: Any, base: Any) -> bool:
    """Whether a `train_iter` has the original's parameters.

    Raises:
        UserError: it has neither these nor those of `base`.
    """
    signature = inspect.signature(method)
    try:
        signature.bind(None, {}, 1, None, None, 1, measure=False)
        return False
    except TypeError:
        pass
    try:
        signature.bind(None, (), 1, {})
    except TypeError:
        ours = f"train_iter{inspect.signature(base.train_iter)}"
        raise UserError(f"train_iter must take (data, epoch, train_meters), or as here {ours}") from None
    return True


def _check_settings(trainer: Any) -> None:
    name = f"{type(trainer).__name__}.train_iter(data, epoch, train_meters) takes the whole step itself"
    if trainer.ranks.world > 1:
        raise UserError(f"{name}, which does not average gradients over processes; start one process")
    for key, neutral in _OBEYED_BY_OUR_STEP.items():
        value = setting(trainer.cfg, key)
        if value not in neutral:
            raise UserError(f"{name}, so that {key} {value} would have no effect; set it to {neutral[0]!r}")
