"""What goes with what: the modes of a run, what methods and updates declare of themselves, and the pairs refused.

A pair that no rule names works: alone, over several ranks, with a short last batch, killed and resumed.
`tests/reliability/test_combinations.py` walks the table, and docs/modes.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from yacs.config import CfgNode as CN

from ..dataset import info_of
from ..dataset.batch import VIEWS
from ..distillers import Distiller
from ..errors import UserError
from ..models.outputs import feature_of
from .optimizers import optimizer_dict
from .overrides import setting
from .runtime.device import pick_device
from .split_update import AlignedUpdate, DeepKDUpdate, DotUpdate, MomentaUpdate, SplitUpdate
from .teacher.cache import cache_wanted
from .teacher.rows import OUTPUTS
from .update import SumUpdate

# A whole step that is recorded and replayed, see `graphed_step`.
GRAPH = "a step as one CUDA graph"
_NO_GRAPH = "set SOLVER.CUDA_GRAPH auto or never"
# Values of DATASET.AUGMENT that make more images of one than can be numbered.
_ENDLESS = ("resized_crop", "randaugment", "trivialaugment", "fixmatch")


@dataclass(frozen=True)
class Setup:
    """A run before it starts.

    Attributes:
        cfg: the whole configuration tree.
        method: the method, or its class while it is not built yet.
        update: the class of its update rule.
        world: number of processes.
        loader: of the training images; None while they are not loaded yet.
    """

    cfg: CN
    method: Distiller | type[Distiller]
    update: type[SumUpdate]
    world: int
    loader: Any = None

    @property
    def name(self) -> str:
        """The name of the method's class."""
        return (self.method if isinstance(self.method, type) else type(self.method)).__name__

    @property
    def trainer(self) -> str:
        """The name of the update rule."""
        return self.update.title

    @property
    def judged(self) -> Distiller | type[Distiller]:
        """What declares whether the method compares images or maps, and the mode of its teacher."""
        return self.method.judged_as(self.cfg) if isinstance(self.method, type) else self.method

    @property
    def share(self) -> int:
        """Images of a full batch on each process."""
        return self.cfg.SOLVER.BATCH_SIZE // self.world

    @property
    def endless(self) -> str:
        """What makes more images of one than can be numbered, in words; empty if nothing that is known yet does."""
        data = self.cfg.DATASET
        for key in ("MIXUP", "CUTMIX", "ERASING"):
            if data[key]:
                return f"DATASET.{key} {data[key]}"
        if data.AUGMENT in _ENDLESS:
            return f"DATASET.AUGMENT {data.AUGMENT}"
        of_loader = self.loader is not None and not getattr(self.loader, "variants", None)
        return f"DATASET.TYPE {data.TYPE}" if of_loader else ""

    @property
    def unfit_delta(self) -> str:
        """The change of a momentum that makes it no momentum, with its value; empty if none does."""
        solver = self.cfg.SOLVER
        deltas = {name: solver.DEEPKD[name] for name in ("DELTA_TOG", "DELTA_TCG", "DELTA_NCG")}
        return next((f"{k} {v}" for k, v in deltas.items() if not 0 <= solver.MOMENTUM + v < 1), "")

    @property
    def labelled(self) -> bool:
        """Whether the training images have labels."""
        return info_of(self.cfg).labelled if self.loader is None else getattr(self.loader, "labelled", True)

    @property
    def zeros(self) -> str:
        """What to set so that no loss of the method reads labels; empty if none does, or if one always does."""
        weights = self.method.label_weights(self.cfg) or ()
        return " and ".join(f"{key} 0" for key in weights if setting(self.cfg, key))

    @property
    def unstored(self) -> str:
        """What the method reads of its teacher and a cache does not store, in words; empty if nothing."""
        outputs: tuple[str, ...] | None
        if isinstance(self.method, type):
            outputs = self.method.teacher_outputs or ()  # a method may also declare them as it is built
        else:
            outputs = self.method.frozen["teacher"]
        if outputs is None:
            return "anything (it declares no teacher_outputs)"
        return ", ".join(dict.fromkeys(feature_of(output) for output in outputs if output not in OUTPUTS))


@dataclass(frozen=True)
class Side:
    """One side of a pair: a mode, or what a method, an update or a loader is like.

    Attributes:
        name: in `RULES` and on the page.
        holds: whether a run is like that.
        shown: how an error names it, with placeholders for attributes of the `Setup`.
    """

    name: str
    holds: Callable[[Setup], bool]
    shown: str


@dataclass(frozen=True)
class Mode(Side):
    """A side that settings switch on.

    Attributes:
        settings: values that switch it on, as the tests do; modes whose first setting is the same exclude each other.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A pair that is refused.

    Attributes:
        this, that: names of its sides.
        reason, remedy: why, and what to set instead; placeholders as in `Side.shown`.
    """

    this: str
    that: str
    reason: str
    remedy: str


def _equal(name: str, key: str, value: Any, **more: Any) -> Mode:
    """The mode that `key` switches on by this `value` alone."""
    return Mode(name, lambda run: setting(run.cfg, key) == value, f"{key} {{cfg.{key}}}", {key: value, **more})


def _unlike(name: str, key: str, off: Any, example: Any, **more: Any) -> Mode:
    """The mode that `key` switches on by every value but `off`."""
    return Mode(name, lambda run: setting(run.cfg, key) != off, f"{key} {{cfg.{key}}}", {key: example, **more})


def _trainer(name: str, rule: type[SumUpdate], trainer: str = "") -> Mode:
    """The mode that a trainer's update rule is; without its name, a trait of several rules."""
    holds: Callable[[Setup], bool] = lambda run: issubclass(run.update, rule)  # noqa: E731
    return Mode(name, holds, "{trainer} (SOLVER.TRAINER)", {"SOLVER.TRAINER": trainer} if trainer else {})


MODES = (
    _equal("bf16", "SOLVER.AMP", "bf16"),
    _equal("fp16", "SOLVER.AMP", "fp16"),
    _equal("teacher in bf16", "SOLVER.AMP", "bf16-teacher"),
    _equal("teacher in fp16", "SOLVER.AMP", "fp16-teacher"),
    _equal("compiled", "SOLVER.COMPILE", True),
    _equal("contiguous", "SOLVER.CHANNELS_LAST", False),
    _equal("deterministic", "EXPERIMENT.DETERMINISTIC", True),
    _unlike("micro-batches", "SOLVER.ACCUMULATE", 1, 3),
    _unlike("clipping", "SOLVER.CLIP_GRAD_NORM", 0, 1.0),
    _unlike("EMA", "SOLVER.EMA", 0, 0.9),
    _equal("steps skipped at NaN", "SOLVER.NAN_POLICY", "skip"),
    _equal("AdamW", "SOLVER.TYPE", "AdamW", **{"SOLVER.LR": 0.001}),
    _trainer("DOT", DotUpdate, "dot"),
    _trainer("DeepKD", DeepKDUpdate, "deepkd"),
    _trainer("aligned gradients", AlignedUpdate, "aligned"),
    _equal("cosine", "SOLVER.LR_SCHEDULE", "cosine"),
    _unlike("warm-up", "SOLVER.WARMUP_EPOCHS", 0, 1),
    _unlike("teacher cache", "DISTILLER.TEACHER_CACHE", "", "cache"),
    Mode(
        "teacher cache in fp32",
        lambda run: cache_wanted(run.cfg) and run.cfg.DISTILLER.TEACHER_CACHE_DTYPE == "fp32",
        "DISTILLER.TEACHER_CACHE_DTYPE fp32",
        {"DISTILLER.TEACHER_CACHE": "cache", "DISTILLER.TEACHER_CACHE_DTYPE": "fp32"},
    ),
    _equal("teacher cache in memory", "DISTILLER.TEACHER_CACHE_DEVICE", "device"),
    _unlike("chosen pairs of maps", "DISTILLER.PAIRS", [], [[1, 1]]),
    _unlike("held-out images", "DATASET.VAL_FRACTION", 0, 0.1),
    _equal("crops and mirroring", "DATASET.AUGMENT", "crop_flip"),
    _equal("resized crops", "DATASET.AUGMENT", "resized_crop"),
    _equal("RandAugment", "DATASET.AUGMENT", "randaugment"),
    _equal("TrivialAugment", "DATASET.AUGMENT", "trivialaugment"),
    _equal("FixMatch's augmentation", "DATASET.AUGMENT", "fixmatch"),
    _unlike("MixUp", "DATASET.MIXUP", 0, 0.8),
    _unlike("CutMix", "DATASET.CUTMIX", 0, 1.0),
    _unlike("erasing", "DATASET.ERASING", 0, 0.25),
    _unlike("label smoothing", "SOLVER.LABEL_SMOOTHING", 0, 0.1),
    _equal("standardised logits", "EXPERIMENT.LOGIT_STAND", True),
    _equal("broken images skipped", "DATASET.SKIP_BROKEN", True),
    _unlike("loader workers", "DATASET.NUM_WORKERS", 0, 2),
    _unlike("saving within epochs", "LOG.SAVE_CHECKPOINT_ITERS", 0, 1),
    _unlike("few checkpoints kept", "LOG.KEEP_CHECKPOINTS", 0, 1),
    _equal("failed saves survived", "LOG.SAVE_ERROR", "continue"),
    _equal("BatchNorm over all ranks", "SOLVER.SYNC_BN", True),
    Mode("several ranks", lambda run: run.world > 1, "{world} processes"),
)

# What methods, data and numbers are like.
TRAITS = (
    Side(
        "methods with `compares_images`", lambda run: run.judged.compares_images,
        "{name}, which compares the images of a batch with each other",
    ),
    Side(
        "methods without `compares_maps`", lambda run: not run.judged.compares_maps,
        "{name}, which compares no pairs of feature maps",
    ),
    Side(
        "methods without `distills`", lambda run: not run.method.distills, "{name}, which has not both kinds of loss",
    ),
    Side("methods without `decouples`", lambda run: not run.method.decouples, "{name}, which cannot be decoupled"),
    Side(
        "methods without `needs_teacher`", lambda run: not run.method.needs_teacher, "{name}, which has no teacher",
    ),
    Side(
        "methods with `teacher_in_train_mode`", lambda run: run.judged.teacher_in_train_mode,
        "{name}, which runs its teacher in training mode",
    ),
    Side(
        "methods without `soft_labels`", lambda run: not run.judged.soft_labels,
        "{name}, which does not take its cross-entropy from self.cross_entropy (`soft_labels`)",
    ),
    Side(
        "methods without `standardizes_logits`", lambda run: not run.method.standardizes_logits,
        "{name}, which softens no logits",
    ),
    Side(
        "methods with `reads_labels`", lambda run: run.judged.reads_labels,
        "{name}, whose loss reads the label or the index of each image",
    ),
    Side(
        "methods that need two views", lambda run: not {*VIEWS}.isdisjoint(run.judged.needs_batch),
        "{name}, which needs two views of each image",
    ),
    Side(
        "methods with other `teacher_outputs`", lambda run: run.method.needs_teacher and bool(run.unstored),
        "{name}, which reads {unstored} of its teacher",
    ),
    Side(
        "images without a finite number of crops",
        lambda run: bool(run.endless),
        "{endless}, whose images have no finite number of crops",
    ),
    Side(
        "optimizers of one gradient",
        lambda run: run.cfg.SOLVER.TYPE in optimizer_dict and run.cfg.SOLVER.TYPE not in run.update.optimizers,
        "SOLVER.TYPE {cfg.SOLVER.TYPE}",
    ),
    _trainer("trainers of several momenta", MomentaUpdate),
    _trainer("trainers of several gradients", SplitUpdate),
    Side(
        "`MOMENTUM` and `DEEPKD.DELTA_*` too large",
        lambda run: bool(run.unfit_delta),
        "SOLVER.DEEPKD.{unfit_delta} with SOLVER.MOMENTUM {cfg.SOLVER.MOMENTUM}",
    ),
    Side(
        "`MOMENTUM` and `DOT.DELTA` too large",
        lambda run: not abs(run.cfg.SOLVER.DOT.DELTA) <= run.cfg.SOLVER.MOMENTUM < 1 - abs(run.cfg.SOLVER.DOT.DELTA),
        "SOLVER.DOT.DELTA {cfg.SOLVER.DOT.DELTA} with SOLVER.MOMENTUM {cfg.SOLVER.MOMENTUM}",
    ),
    Side(
        "images without labels", lambda run: not run.labelled, "DATASET.TYPE {cfg.DATASET.TYPE}, which has no labels,",
    ),
    Side("a weighted loss of the labels", lambda run: bool(run.zeros), "{name}, whose loss reads labels"),
    Side(
        "a loss of the labels without a weight", lambda run: run.method.label_weights(run.cfg) is None,
        "{name}, whose loss reads labels",
    ),
    Side("the teacher's accuracy", lambda run: run.cfg.DISTILLER.SCORE_TEACHER, "DISTILLER.SCORE_TEACHER True"),
    Side(GRAPH, lambda run: run.cfg.SOLVER.CUDA_GRAPH == "always", "SOLVER.CUDA_GRAPH always"),
    Side(
        "a teacher cache in files alone",
        lambda run: bool(run.cfg.DISTILLER.TEACHER_CACHE) and run.cfg.DISTILLER.TEACHER_CACHE_DEVICE == "host",
        "DISTILLER.TEACHER_CACHE_DEVICE host",
    ),
    Side(
        "training on a CPU", lambda run: pick_device(run.cfg.EXPERIMENT.DEVICE).type != "cuda",
        "EXPERIMENT.DEVICE {cfg.EXPERIMENT.DEVICE}, which is no GPU here",
    ),
    Side(
        "a smaller `BATCH_SIZE` a process", lambda run: run.share < run.cfg.SOLVER.ACCUMULATE,
        "SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE}",
    ),
    Side(
        "a `BATCH_SIZE` that their number does not divide", lambda run: run.cfg.SOLVER.BATCH_SIZE % run.world > 0,
        "SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE}",
    ),
)  # fmt: skip

# What no cache takes, and the setting that switches each form of it off.
_CACHE_RULES = (
    Rule(cache, that, reason, remedy)
    for cache, remedy in (
        ("teacher cache", "leave DISTILLER.TEACHER_CACHE empty"),
        ("teacher cache in memory", "set DISTILLER.TEACHER_CACHE_DEVICE auto"),
    )
    for that, reason in (
        ("methods without `needs_teacher`", "there is nothing to store"),
        ("methods with `teacher_in_train_mode`", "its outputs depend on the whole batch"),
        ("methods with other `teacher_outputs`", "it stores logits and pooled features"),
        ("images without a finite number of crops", "it stores the outputs for every crop"),
        ("methods that need two views", "it stores the outputs for one image of each index"),
    )
)

# What labels of several classes do not go with.
_LABEL_RULES = (
    *(
        Rule(mixing, that, reason, f"set {key} 0")
        for mixing, key in (("MixUp", "DATASET.MIXUP"), ("CutMix", "DATASET.CUTMIX"))
        for that, reason in (
            ("methods without `soft_labels`", "it would learn one label of a mixed image alone"),
            ("methods with `reads_labels`", "a mixed image shows two of the training set"),
            ("methods that need two views", "the labels are of the mixed image, and the views are not mixed"),
        )
    ),
    *(
        Rule(mixing, "DeepKD", "its parts are those of one label, and a mixed image has two", f"set {key} 0")
        for mixing, key in (("MixUp", "DATASET.MIXUP"), ("CutMix", "DATASET.CUTMIX"))
    ),
    Rule(
        "label smoothing", "methods without `soft_labels`", "it would learn the label as it is",
        "set SOLVER.LABEL_SMOOTHING 0",
    ),
)  # fmt: skip

RULES = (
    Rule(
        "a `BATCH_SIZE` that their number does not divide", "several ranks", "they share the images of a batch evenly",
        "set SOLVER.BATCH_SIZE to a multiple of {world}",
    ),
    Rule(
        "micro-batches", "a smaller `BATCH_SIZE` a process",
        "it is more than the {share} images of a batch on each process",
        "set SOLVER.ACCUMULATE to {share} or less",
    ),
    Rule(
        "micro-batches", "methods with `compares_images`", "micro-batches would give a different loss",
        "set SOLVER.ACCUMULATE 1",
    ),
    Rule(
        "micro-batches", "trainers of several momenta",
        "it keeps the gradients of one batch apart and does not add those of micro-batches", "set SOLVER.ACCUMULATE 1",
    ),
    Rule(
        "clipping", "trainers of several momenta", "it has several gradients, and their common norm is not defined",
        "set SOLVER.CLIP_GRAD_NORM 0",
    ),
    Rule(
        "fp16", "trainers of several momenta", "fp16 scales one gradient, and it has several",
        "set SOLVER.AMP bf16 or fp16-teacher",
    ),
    Rule(
        "optimizers of one gradient", "trainers of several momenta", "it has a form of SGD alone",
        "set SOLVER.TYPE SGD",
    ),
    Rule(
        "`MOMENTUM` and `DOT.DELTA` too large", "DOT", "MOMENTUM minus and plus DELTA must both be in [0, 1)",
        "take a smaller SOLVER.DOT.DELTA",
    ),
    Rule(
        "`MOMENTUM` and `DEEPKD.DELTA_*` too large", "DeepKD", "MOMENTUM plus the change must be in [0, 1)",
        "take another SOLVER.MOMENTUM, or another change",
    ),
    Rule(
        "trainers of several gradients", "methods without `distills`",
        "it steps on the gradients of a task loss and of a distillation loss", "use SOLVER.TRAINER base",
    ),
    Rule(
        "DeepKD", "methods without `decouples`", "it trains on the target and the non-target part of a loss of logits",
        "take DISTILLER.TYPE KD or DKD, or SOLVER.TRAINER base",
    ),
    *_CACHE_RULES,
    *_LABEL_RULES,
    Rule(
        "images without labels", "DeepKD", "its target part is that of the label", "use SOLVER.TRAINER base",
    ),
    Rule("images without labels", "a weighted loss of the labels", "there are none to read", "set {run.zeros}"),
    Rule(
        "images without labels", "a loss of the labels without a weight", "there are none to read",
        "take a method that can do without, such as KD with KD.LOSS.CE_WEIGHT 0",
    ),
    Rule(
        "images without labels", "the teacher's accuracy", "there are no labels to score it by",
        "set DISTILLER.SCORE_TEACHER False",
    ),
    Rule(
        "images without labels", "label smoothing", "there are none to smooth", "set SOLVER.LABEL_SMOOTHING 0",
    ),
    Rule(
        "standardised logits", "methods without `standardizes_logits`", "it would ignore the setting",
        "set EXPERIMENT.LOGIT_STAND False",
    ),
    Rule(GRAPH, "several ranks", "they exchange gradients within the step", _NO_GRAPH),
    Rule(GRAPH, "steps skipped at NaN", "the host reads the losses before it lets the step go on", _NO_GRAPH),
    Rule(GRAPH, "a teacher cache in files alone", "the host reads them within the step", _NO_GRAPH),
    Rule(GRAPH, "training on a CPU", "only a GPU has them", _NO_GRAPH),
    Rule(
        "chosen pairs of maps", "methods without `compares_maps`", "it would ignore the pairs",
        "leave DISTILLER.PAIRS empty",
    ),
)  # fmt: skip

SIDES = {side.name: side for side in (*MODES, *TRAITS)}


def broken_rule(run: Setup) -> Rule | None:
    """The first rule of which both sides hold in `run`."""
    return next((rule for rule in RULES if all(SIDES[name].holds(run) for name in (rule.this, rule.that))), None)


def obstacle(name: str, run: Setup) -> str:
    """What the rules have against the side `name` in `run`, whether or not it holds, in words; empty if nothing."""
    for rule in RULES:
        other = {rule.this: rule.that, rule.that: rule.this}.get(name)
        if other is not None and SIDES[other].holds(run):
            return f"{_filled(SIDES[other].shown, run)}: {_filled(rule.reason, run)}"
    return ""


def _filled(text: str, run: Setup) -> str:
    """A text of the table for a run."""
    of_run = {name: getattr(run, name) for name in (
        "cfg", "name", "trainer", "world", "share", "unstored", "endless", "unfit_delta",
    )}
    return text.format(run=run, **of_run)


def check_modes(
    cfg: CN, method: Distiller | type[Distiller], update: type[SumUpdate], world: int, loader: Any = None
) -> None:
    """Refuse modes that do not go with each other, with the method or with the data; see `Setup` for the arguments.

    Raises:
        UserError: names both sides, why, and what to set.
    """
    run = Setup(cfg, method, update, world, loader)
    rule = broken_rule(run)
    if rule is not None:
        this, that, reason, remedy = (
            _filled(text, run) for text in (SIDES[rule.this].shown, SIDES[rule.that].shown, rule.reason, rule.remedy)
        )
        raise UserError(f"{this} does not go with {that}: {reason}; {remedy}")
