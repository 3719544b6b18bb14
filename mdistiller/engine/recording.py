"""A recorded step, the tensors that it reads and writes, and the trial that it passes before it is used.

A graph does what the step did when it was recorded, on the same addresses. So what changes from step to step lies in
tensors that stay where they are: the batch, the epoch, the learning rates, the meters. What a graph cannot follow is
looked for before it is used, and a first replay is compared with the step itself; then the steps are taken as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.tensor_groups import by_kind
from .graph.host_state import HostSnapshot, HostState, Watch, attributes, changed, host_state
from .graph.recorder import Recorder
from .graph.snapshot import Snapshot
from .meters import Meters, Names
from .nan_watch import Outcome
from .step import METRICS, Batch, Step, StepResult

# Meters that a step's metrics are added to.
_METERS = 2
# Largest relative difference between a replayed loss and that of the step itself. Kernels that add in any order differ
# by less, also in half precision; what a graph does not follow differs by more.
_TOLERANCE = 0.02


class CannotRecordError(Exception):
    """A step that no graph can hold; the message says why."""


class NewStateError(CannotRecordError):
    """The optimizer does not remember anything yet of a parameter, and would begin to in the trial."""


class Recording:
    """The recorded step, and the tensors that it reads and writes.

    Args:
        batch, epoch: of the step that is recorded, which is not taken yet.

    Attributes:
        replays: number of steps taken.

    Raises:
        CannotRecordError, Exception: the step cannot be recorded. Nothing has changed then, but in objects of the
            method that are no modules.
    """

    def __init__(self, step: Step, batch: Batch, epoch: int, recorder: Recorder) -> None:
        self.step = step
        self.replays = 0
        self.batch = {name: field.clone() for name, field in batch.items()}
        self._seen = self._epoch = epoch
        self.epoch = torch.full((), epoch, device=step.device)
        self.names: Names = ()
        self.row = torch.empty(0)
        self.totals: list[Tensor] = []
        self._holders: list[Meters | None] = [None] * _METERS
        if reads := step.update.host_reads():
            raise CannotRecordError(reads)
        cache = step.teacher_cache
        if cache is not None and cache.waits:
            raise CannotRecordError(f"the host reads the teacher's outputs from {cache.place} within a step")
        self.rates, self._settings = step.update.rates(), step.update.settings()
        self._parts = self._present_parts()
        self._host, self._watch = self._host_now(), Watch(step.distiller)
        if self._watch.hooks() or any(map(_hooks_of, (step.update.optimizer, *step.update.parameters))):
            raise CannotRecordError("a network, a parameter or the optimizer has hooks, which are Python code")
        self._replay = self._tried(recorder)

    def outdated(self, batch: Batch, epoch: int, number: int) -> bool:
        """Whether the recorded step is no longer what a step is now. At an epoch's start, also by the host's state."""
        same = self._parts == self._present_parts() and self._settings == self.step.update.settings()
        same = same and not self._watch.changed()
        begins, self._seen = number == 1 or epoch != self._seen, epoch
        forms = batch.keys() == self.batch.keys() and all(_form(batch[n]) == _form(t) for n, t in self.batch.items())
        return not (same and forms) or (begins and self._host != self._host_now())

    def take(self, batch: Batch, epoch: int, number: int, meters: Sequence[Meters]) -> StepResult:
        """Take a step.

        Raises:
            NonFiniteLossError: see `Step`.
        """
        self._fill(batch, epoch)
        names = (*METRICS, *(f"loss/{name}" for name in self.names))
        self._lend(names, meters)
        self._replay()
        self.replays += 1
        images = len(batch["target"])
        for own in meters:
            own.count += images
        sums, losses, (norm, unexplained) = self._split(self.row.clone())  # the next step writes there
        index = batch.get("index", batch["target"][:0])
        self.step.nan_policy.drops(Outcome(epoch, number, self.names, losses, unexplained, index))
        return StepResult(images, names, sums, norm)

    def _lend(self, names: Names, meters: Sequence[Meters]) -> None:
        """Let the sums that the recorded step adds to be those of `meters`, and no longer of those before."""
        for place, total in enumerate(self.totals):
            own, former = (meters[place] if place < len(meters) else None), self._holders[place]
            if former is not None and former is not own:
                former.release(total)
            if own is not None:
                own.hold(names, total)
            self._holders[place] = own

    def _fill(self, batch: Batch, epoch: int) -> None:
        """Put what is new in this step where the recorded one reads it."""
        for targets, sources in by_kind(list(self.batch.values()), [batch[name] for name in self.batch]):
            torch._foreach_copy_(targets, sources)
        if self.step.teacher_cache is not None:
            self.step.teacher_cache.look_up(batch["index"])  # which turns to a new epoch, also in a loop of one's own
        if epoch != self._epoch:
            self._epoch = epoch
            self.epoch.fill_(epoch)
        for group, rate in zip(self.step.update.optimizer.param_groups, self.rates):
            if group["lr"] is not rate:  # a user's own schedule has set a number
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _present_parts(self) -> tuple[Any, ...]:
        """Which objects a step calls, and which tensors the optimizer has."""
        frozen, optimizer = self.step.frozen, self.step.update.optimizer
        runners = (id(run) for run in (frozen.runners if frozen else {}).values())
        remembered = (id(value) for own in optimizer.state.values() for value in own.values())
        trained = (id(p) for group in optimizer.param_groups for p in group["params"])
        hooks, largest = _hooks_of(optimizer), self.step.update.max_norm
        return id(optimizer), id(frozen), largest, hooks, *runners, *remembered, *trained

    def _host_now(self) -> HostState:
        """What Python holds of the method, the update rule and the optimizer."""
        update = self.step.update
        others = attributes("update", update, {"optimizer", "scaler", "parameters"})
        own = attributes("optimizer", update.optimizer, {"state", "param_groups", "defaults"})
        return host_state(self.step.distiller) | others | own

    def _whole(self) -> Tensor:
        """One step; returns its row: the metrics' sums, the loss terms' means, the two norms. See `Step.whole`."""
        self.names, sums, norms = self.step.whole(self.batch, self.epoch)
        return torch.cat([sums, sums[len(METRICS) :] / len(self.batch["target"]), norms])

    def _split(self, row: Tensor) -> tuple[Tensor, ...]:
        return row.split([len(METRICS) + len(self.names), len(self.names), 2])

    def _function(self) -> None:
        """What is recorded."""
        row = self._whole()
        self.row.copy_(row)
        for total in self.totals:
            total += row[: len(total)]

    def _tried(self, recorder: Recorder) -> Callable[[], None]:
        """The replay of the recorded step, which has done in two steps what the step itself does.

        Raises:
            CannotRecordError, Exception: it does something else, or cannot be recorded.
        """
        before, python = Snapshot(self._tensors(), self.step.device), HostSnapshot(self.step.distiller)
        others = [(own, dict(vars(own))) for own in (self.step.update, self.step.update.optimizer)]
        remembered = {p: dict(own) for p, own in self.step.update.optimizer.state.items()}
        expected: list[Tensor] = []
        rehearsal = lambda: expected.append(self._whole())  # noqa: E731
        try:
            recorder.rehearse(rehearsal)
            self._check_host(before)
            if self._parts != self._present_parts():
                raise NewStateError("the optimizer makes new tensors at every step")
            recorder.rehearse(rehearsal)
            self.row, sums = torch.empty_like(expected[0]), self._split(expected[0])[0]
            self.totals = [torch.zeros_like(sums) for _ in range(_METERS)]
            replay = recorder.record(self._function)
            before.restore()
            _compare(expected, [self._replayed(replay) for _ in expected])
        except Exception:  # a read by the host, a kernel that cannot be recorded, too little memory
            python.restore()
            for own, held in others:
                vars(own).clear()
                vars(own).update(held)
            self.step.update.optimizer.state.clear()
            self.step.update.optimizer.state.update(remembered)
            raise
        finally:
            self.step.update.skip()
            before.restore()
        return replay

    def _tensors(self) -> list[Tensor]:
        """All that a step may change."""
        distiller, ema, frozen = self.step.distiller, self.step.ema, self.step.frozen
        own = [*distiller.parameters(), *distiller.buffers(), *self.step.update.tensors()]
        still = frozen.unchanging() if frozen is not None else set()
        return [tensor for tensor in own if tensor not in still] + (ema.tensors() if ema is not None else [])

    def _check_host(self, before: Snapshot) -> None:
        """Refuse a step that draws numbers, or keeps something, where a graph does not.

        Raises:
            CannotRecordError: naming it.
        """
        if drawn := before.drawn_on_host():
            raise CannotRecordError(f"a step draws random numbers on the host ({', '.join(drawn)})")
        if kept := changed(self._host, self._host_now()):
            few = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
            raise CannotRecordError(f"a step changes what Python holds of {type(self.step.distiller).__name__}: {few}")

    def _replayed(self, replay: Callable[[], None]) -> Tensor:
        replay()
        return self.row.clone()


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Compare the rows of replayed steps with those of the step itself; the accuracies may differ by an image.

    Raises:
        CannotRecordError: they differ.
    """
    own, replayed = (torch.stack(list(rows))[:, METRICS.index("train_loss") :] for rows in (expected, found))
    if not torch.allclose(replayed, own, rtol=_TOLERANCE, atol=1e-6, equal_nan=True):
        worst = int((replayed - own).abs().nan_to_num(math.inf).argmax())
        one, other = replayed.flatten()[worst].item(), own.flatten()[worst].item()
        raise CannotRecordError(f"replayed, it computes other numbers ({one:g}, not {other:g})")


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_backward_hooks", "_post_accumulate_grad_hooks")


def _hooks_of(value: Any) -> int:
    """Number of hooks of an optimizer's step, or of a parameter's gradient."""
    return sum(len(getattr(value, name, None) or ()) for name in _HOOKS)


def _form(field: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return field.shape, field.dtype, field.device
