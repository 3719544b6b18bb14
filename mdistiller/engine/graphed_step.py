"""The step as one CUDA graph: recorded once, then replayed for every full batch (SOLVER.CUDA_GRAPH).

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
from yacs.config import CfgNode as CN

from ..console import note, one_line
from ..distillers import Distiller
from ..errors import UserError
from ..models.copies import has_hooks
from ..models.tensor_groups import by_kind
from .graph.host_state import HostSnapshot, changed, host_state
from .graph.recorder import GpuRecorder, Recorder
from .graph.snapshot import Snapshot
from .meters import Meters, Names
from .nan_watch import Outcome
from .step import METRICS, Batch, Step, StepResult

# Full batches that a process takes as usual first: they make what is made once, and choose the kernels.
WARM_UP_STEPS = 3
# Meters that a step's metrics are added to.
_METERS = 2
# Largest relative difference between a replayed loss and that of the step itself. Kernels that add in any order differ
# by less, also in half precision; what a graph does not follow differs by more.
_TOLERANCE = 0.02


def recorder_for(device: torch.device, cfg: CN, obstacle: str) -> Recorder | None:
    """What records the steps of a run on `device`; None if they are taken as usual.

    Args:
        obstacle: what the table of modes has against it, in words.
    """
    if device.type != "cuda" or cfg.SOLVER.CUDA_GRAPH == "never":
        return None
    if obstacle:
        note(f"steps are not recorded as a CUDA graph: {obstacle}")
        return None
    return GpuRecorder(device)


class CannotRecordError(Exception):
    """A step that no graph can hold; the message says why."""


class GraphedStep:
    """Takes the steps of a run: by a recorded graph where it can, else by `step`.

    Args:
        recorder: None: never record.
        required: refuse to train where no graph can be used, instead of taking the steps as usual.
    """

    def __init__(self, step: Step, recorder: Recorder | None, required: bool = False) -> None:
        self.step, self.recorder, self.required = step, recorder, required
        self.recording: Recording | None = None
        self._usual = 0  # full batches taken as usual

    def __call__(self, batch: Batch, epoch: int, number: int, meters: Sequence[Meters] = ()) -> StepResult | None:
        """See `Step`.

        Raises:
            UserError: no graph can hold the step, and one is required.
        """
        if self.recorder is not None and not self._usual and not self.step.update.host_reads():
            self.step.update.rates()  # a rate as a number may round otherwise than one on the device
        if self.recorder is None or len(batch["target"]) != self.step.full_batch:
            return self.step(batch, epoch, number, meters)
        # Within the step the networks cannot see for themselves what has changed.
        self.step.check_frozen(number, also_later=self.recording is not None)
        if self.recording is not None and self.recording.outdated(batch, number):
            self._drop(self.recording)
        if self.recording is None and self._ready():
            self.recording = self._recorded(batch, epoch, self.recorder)
        if self.recording is None:
            self._usual += 1
            return self.step(batch, epoch, number, meters)
        return self.recording.take(batch, epoch, number, meters)

    @property
    def words(self) -> str:
        """How the steps are taken, for the log; empty for a run that takes them as usual."""
        return f"one CUDA graph, recorded after {WARM_UP_STEPS} full batches" if self.recorder is not None else ""

    def _ready(self) -> bool:
        """Whether the next full batch may be recorded."""
        settled = self.step.distiller.settled() and self.step.update.ready_to_compile()
        return self.recorder is not None and self._usual >= WARM_UP_STEPS and settled

    def _recorded(self, batch: Batch, epoch: int, recorder: Recorder) -> Recording | None:
        """The recorded step; None, from now on, where it cannot be recorded."""
        try:
            return Recording(self.step, batch, epoch, recorder)
        except CannotRecordError as reason:
            self._go_without(str(reason))
            return None

    def _drop(self, recording: Recording) -> None:
        """Let it be recorded anew, unless it has been of no use."""
        self.recording = None
        if recording.replays <= 1:
            self._go_without("what a step reads on the host changes at every step")

    def _go_without(self, reason: str) -> None:
        if self.required:
            raise UserError(f"SOLVER.CUDA_GRAPH always: {reason}; set SOLVER.CUDA_GRAPH auto or never")
        note(f"steps are not recorded as a CUDA graph: {reason}")
        self.recorder = None


class Recording:
    """The recorded step, and the tensors that it reads and writes.

    Args:
        batch, epoch: of the step that is recorded, which is not taken yet.

    Attributes:
        replays: number of steps taken.

    Raises:
        CannotRecordError: the step cannot be recorded. Nothing has changed then, but in objects that are no modules.
    """

    def __init__(self, step: Step, batch: Batch, epoch: int, recorder: Recorder) -> None:
        self.step = step
        self.replays = 0
        self.batch = {name: field.clone() for name, field in batch.items()}
        self._epoch, self.epoch = epoch, torch.full((), epoch, device=step.device)
        self.names: Names = ()
        self.row = torch.empty(0)
        self.totals: list[Tensor] = []
        self._holders: list[Meters | None] = [None] * _METERS
        if reads := step.update.host_reads():
            raise CannotRecordError(reads)
        if _hooked(step.distiller):
            raise CannotRecordError(f"{type(step.distiller).__name__} or a network has hooks, which are Python code")
        cache = step.teacher_cache
        if cache is not None and cache.waits:
            raise CannotRecordError(f"the host reads the teacher's outputs from {cache.place} within a step")
        self.rates, self._settings = step.update.rates(), step.update.settings()
        self._parts = self._present_parts()
        self._host, self._values = host_state(step.distiller), _plain_values(step.distiller)
        self._replay = self._tried(recorder)

    def outdated(self, batch: Batch, number: int) -> bool:
        """Whether the recorded step is no longer what a step is now; at an epoch's start, in all that Python holds."""
        same = self._parts == self._present_parts() and self._settings == self.step.update.settings()
        same = same and self._values == _plain_values(self.step.distiller)
        forms = batch.keys() == self.batch.keys() and all(_form(batch[n]) == _form(t) for n, t in self.batch.items())
        return not (same and forms) or (number == 1 and self._host != host_state(self.step.distiller))

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
                former.let_go(names, total)
            if own is not None:
                own.hold(names, total)
            self._holders[place] = own

    def _fill(self, batch: Batch, epoch: int) -> None:
        """Put what is new in this step where the recorded one reads it."""
        for targets, sources in by_kind(list(self.batch.values()), [batch[name] for name in self.batch]):
            torch._foreach_copy_(targets, sources)
        if epoch != self._epoch:
            self._epoch = epoch
            self.epoch.fill_(epoch)
        for group, rate in zip(self.step.update.optimizer.param_groups, self.rates):
            if group["lr"] is not rate:  # a user's own schedule has set a number
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _present_parts(self) -> tuple[int, ...]:
        """Which objects a step calls."""
        frozen, optimizer = self.step.frozen, self.step.update.optimizer
        return (id(optimizer), id(frozen), *(id(run) for run in (frozen.runners if frozen else {}).values()))

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
            CannotRecordError: it does something else, or cannot be recorded.
        """
        before, python = Snapshot(self._tensors(), self.step.device), HostSnapshot(self.step.distiller)
        expected: list[Tensor] = []
        rehearsal = lambda: expected.append(self._whole())  # noqa: E731
        try:
            recorder.rehearse(rehearsal)
            self._check_host(before)
            recorder.rehearse(rehearsal)
            self.row, sums = torch.empty_like(expected[0]), self._split(expected[0])[0]
            self.totals = [torch.zeros_like(sums) for _ in range(_METERS)]
            replay = recorder.record(self._function)
            before.restore()
            _compare(expected, [self._replayed(replay) for _ in expected])
        except Exception as error:  # a read by the host, a kernel that cannot be recorded, too little memory
            python.restore()
            raise error if isinstance(error, CannotRecordError) else CannotRecordError(one_line(error, 200)) from error
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
        if kept := changed(self._host, host_state(self.step.distiller)):
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


def _hooked(distiller: Distiller) -> bool:
    """Whether modules or parameters have hooks."""
    own = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return has_hooks(distiller) or any(getattr(p, name, None) for p in distiller.parameters() for name in own)


def _plain_values(distiller: Distiller) -> list[Any]:
    """The numbers, flags and names that a method itself holds: a schedule may change them at any step."""
    methods = [distiller, *(part for part in distiller.children() if isinstance(part, Distiller))]
    return [value for method in methods for value in vars(method).values() if isinstance(value, (int, float, str))]


def _form(field: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return field.shape, field.dtype, field.device
