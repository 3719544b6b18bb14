"""What a run trains in which of its epochs: the stages of its method, then the training itself.

The epochs of the training are 1 to SOLVER.EPOCHS, whatever comes before. Those of the stages are numbered up to 0, so
that a run's epochs have one order: a stage of three epochs has -2, -1 and 0. Methods, loaders and schedules do not see
these numbers: for them, the epochs of each stage count from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from yacs.config import CfgNode as CN

from ..distillers import Distiller, Stage
from ..distillers.contract import learnable_parameters
from .graphed_step import GraphedStep
from .nan_watch import NonFiniteLossError
from .step import Step
from .update import SumUpdate

# (update rule of a stage, its configuration) -> what takes its steps.
StepMaker = Callable[[SumUpdate, CN], GraphedStep]


@dataclass(frozen=True)
class Phase:
    """The epochs that one update rule trains.

    Attributes:
        before: the run's epoch before its first one.
        epochs: how many it has.
        cfg: the configuration of its update rule and its schedule.
        take_step: takes its steps.
        stage: None for the training itself.
    """

    before: int
    epochs: int
    cfg: CN
    take_step: GraphedStep
    stage: Stage | None = None

    @property
    def step(self) -> Step:
        """The step as it is without a graph."""
        return self.take_step.step

    @property
    def update(self) -> SumUpdate:
        """The update rule."""
        return self.step.update

    @property
    def name(self) -> str:
        """The name of the stage; empty for the training itself."""
        return "" if self.stage is None else self.stage.name

    def own(self, epoch: int) -> int:
        """The number, from 1, that an epoch of the run has in this phase."""
        return epoch - self.before

    def words(self, epoch: int) -> str:
        """What a message calls an epoch of the run: `epoch 3` or `paraphraser, epoch 3`."""
        return f"{self.name}, epoch {self.own(epoch)}" if self.name else f"epoch {epoch}"


class Phases:
    """The phases of a run, of which one is on.

    A stage's update rule is made when the stage begins, and let go when it ends, with what its optimizer remembers.

    Args:
        distiller: on its device.
        training: the phase of the training itself.
        make: makes what takes the steps of a stage.

    Attributes:
        now: the phase that is on; at first the training.
        stages: those with an epoch or more, in their order.
    """

    def __init__(self, distiller: Distiller, training: Phase, make: StepMaker) -> None:
        self.distiller, self.training, self._make = distiller, training, make
        self.stages = [stage for stage in distiller.stages() if stage.epochs]
        self.now = training

    @property
    def first(self) -> int:
        """The run's first epoch: 1, or 0 and below where stages come first."""
        return 1 - sum(stage.epochs for stage in self.stages)

    def turn_to(self, epoch: int) -> Phase:
        """The phase of an epoch of the run, which is on from now on."""
        stage, before = self._at(epoch)
        if stage is not self.now.stage:
            frozen, self.now.step.frozen = self.now.step.frozen, None
            self.now.step.close()
            self.distiller.turn_to(stage)
            self.now = self.training if stage is None else self._begun(stage, before)
            self.now.step.frozen = frozen
        return self.now

    def words(self, epoch: int) -> str:
        """What a message calls an epoch of the run."""
        stage, before = self._at(epoch)
        return f"{stage.name}, epoch {epoch - before}" if stage is not None else f"epoch {epoch}"

    def begins_anew(self, epoch: int) -> bool:
        """Whether an epoch of the run is the first of its phase, so that the optimizer before it is not its own."""
        return epoch > self.first and self._at(epoch)[0] is not self._at(epoch - 1)[0]

    @contextmanager
    def naming(self, epoch: int) -> Iterator[None]:
        """Put the name of the stage of an epoch in front of what stops the run."""
        stage, _ = self._at(epoch)
        try:
            yield
        except NonFiniteLossError as error:
            if stage is None:
                raise
            raise NonFiniteLossError(f"{stage.name}, {error}") from None

    def _at(self, epoch: int) -> tuple[Stage | None, int]:
        """The stage of an epoch of the run, and the epoch before its first one."""
        before = self.first - 1
        for stage in self.stages:
            if epoch <= before + stage.epochs:
                return stage, before
            before += stage.epochs
        return None, 0

    def _begun(self, stage: Stage, before: int) -> Phase:
        cfg = _of_stage(self.training.cfg, stage)
        update = SumUpdate(learnable_parameters(self.distiller), cfg)
        return Phase(before, stage.epochs, cfg, self._make(update, cfg), stage)


def _of_stage(cfg: CN, stage: Stage) -> CN:
    """The configuration of a stage: that of the run, with a learning rate that stays the same."""
    own = cfg.clone()
    own.defrost()
    own.SOLVER.LR = stage.lr or cfg.SOLVER.LR
    own.SOLVER.LR_SCHEDULE, own.SOLVER.LR_DECAY_STAGES, own.SOLVER.WARMUP_EPOCHS = "step", [], 0
    own.freeze()
    return own
