"""The step as one CUDA graph: recorded once, then replayed for every full batch (SOLVER.CUDA_GRAPH)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from yacs.config import CfgNode as CN

from ..console import note, one_line
from ..distributed.ranks import current_ranks
from ..errors import UserError
from .graph.recorder import GpuRecorder, Recorder
from .meters import Meters
from .recording import NewStateError, Recording
from .step import Batch, Step, StepResult

# Full batches that a process takes as usual first: they make what is made once, and choose the kernels.
WARM_UP_STEPS = 3
# Recordings in a row that may be out of date at once; then steps are no longer recorded.
USELESS_RECORDINGS = 3


def recorder_for(device: torch.device, cfg: CN, obstacle: str) -> Recorder | None:
    """What records the steps of a run on `device`; None if they are taken as usual.

    Args:
        obstacle: what the table of modes has against it, in words.
    """
    if device.type != "cuda" or cfg.SOLVER.CUDA_GRAPH == "never":
        return None
    if obstacle:
        if current_ranks().first:
            note(f"steps are not recorded as a CUDA graph: {obstacle}")
        return None
    return GpuRecorder(device)


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
        self._useless = 0  # recordings in a row that served for one step at most
        self._waited = False  # once, for an optimizer to make what it remembers

    def __call__(self, batch: Batch, epoch: int, number: int, meters: Sequence[Meters] = ()) -> StepResult | None:
        """See `Step`.

        Raises:
            UserError: no graph can hold the step, and one is required.
        """
        if self.recorder is not None and not self._usual and not self.step.update.host_reads():
            self.step.update.rates()  # a rate as a number may round otherwise than one on the device
        if self.recorder is None or len(batch["target"]) != self.step.full_batch:
            return self.step(batch, epoch, number, meters)
        if self.recording is not None or self._ready():
            # Within a replay the networks cannot see for themselves what has changed.
            self.step.check_frozen(number, also_later=True)
        if self.recording is not None and self.recording.outdated(batch, epoch, number):
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
        except NewStateError as reason:
            self._usual = 0
            if self._waited:
                self._go_without(str(reason))
            self._waited = True
        except Exception as error:  # whatever it is, the steps can be taken as usual
            self._go_without(one_line(error, 200))
        return None

    def _drop(self, recording: Recording) -> None:
        """Let it be recorded anew, unless it has been of no use."""
        self.recording, self._usual, self._waited = None, 0, False
        self._useless = self._useless + 1 if recording.replays <= 1 else 0
        if self._useless == USELESS_RECORDINGS:
            self._go_without("what a step reads on the host changes at every step")

    def _go_without(self, reason: str) -> None:
        if self.required:
            raise UserError(f"SOLVER.CUDA_GRAPH always: {reason}; set SOLVER.CUDA_GRAPH auto or never")
        note(f"steps are not recorded as a CUDA graph: {reason}")
        self.recorder = None
        self.step.leave_graph()
