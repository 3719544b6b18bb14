"""tools/train.py with the networks and data of small.py, which may stop itself at a given step.

The environment's STOP="NUMBER SIGNAL" sends SIGNAL in the training step of that number: SIGKILL to this process,
another one to its whole process group, as torchrun and batch systems do.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.optim import Optimizer

from mdistiller.commands.train import main
from tests.reliability import small


@contextmanager
def in_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` near the end of the training step of this number, from 1; a step that changes no weight counts too."""
    plain, done = Optimizer.zero_grad, 0

    def zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
        nonlocal done
        plain(optimizer, set_to_none)  # which ends each step, also one that fp16's scaler or the NaN policy skips
        done += 1
        if done == number:
            act()

    Optimizer.zero_grad = zero_grad
    try:
        yield
    finally:
        Optimizer.zero_grad = plain


def send(number: int) -> None:
    """Send a signal to this process, or to its whole group.

    To the group from another process, as from outside: loader workers obey a SIGTERM of their own training process.
    """
    if number == signal.SIGKILL:
        os.kill(os.getpid(), number)
    child = os.fork()
    if not child:
        os.killpg(0, number)
        os._exit(0)
    os.waitpid(child, 0)


compiled = torch.compile


def traced(function: Callable[..., Any], *, mode: str | None = None, **options: Any) -> Callable[..., Any]:
    """torch.compile that traces and differentiates, but builds no kernels, which takes long."""
    return compiled(function, backend="aot_eager", **options)


if __name__ == "__main__":
    small.register()
    torch.compile = traced
    step, to_send = map(int, os.environ.get("STOP", "0 0").split())
    with in_step(step, partial(send, to_send)):
        main()
