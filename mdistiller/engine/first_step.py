"""The first step of a process: the parts of the run are checked before it, and the run's files are opened after it.

So a run that is refused leaves nothing, and what `--overwrite` replaces stands until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..dataset import Loader
from .batches import BatchReader
from .epoch_state import Clock
from .nan_watch import NonFiniteLossError
from .parts import Parts


class FirstStep:
    """Stands around every step, and does something around the first one.

    Args:
        parts: those of the run.
        reader: of the training batches, which is told the number of classes if their loader is a user's own.

    Attributes:
        open_files: opens the run's files, or goes on with them; set it before the step.
    """

    def __init__(self, parts: Parts, reader: BatchReader) -> None:
        self._parts, self._reader = parts, reader
        self._to_check = True
        self.open_files: Callable[[], None] | None = None

    @contextmanager
    def around(self, batch: Mapping[str, Any], clock: Clock) -> Iterator[None]:
        """Around a step on `batch`; the clock of training stands still meanwhile, but for the step.

        Raises:
            UserError: the parts do not fit; see `Parts`.
        """
        if not self._to_check:
            yield
            return
        self._to_check = False
        with clock.stopped():
            self._parts.check(batch)
        if not isinstance(self._parts.train_loader, Loader):  # of ours, all labels have been checked
            self._reader.classes = self._parts.classes
        try:
            with self._parts.explaining(batch):
                yield
        except NonFiniteLossError:  # the parts fit, and the run has begun
            self.open(clock)
            raise
        self.open(clock)

    def open(self, clock: Clock) -> None:
        """Open the run's files, unless they are open."""
        if self.open_files is not None:
            with clock.stopped():
                self.open_files()
            self.open_files = None
