"""One method in one mode, in this process: trained through, and stopped after two of its three steps and resumed.

    torchrun --nproc_per_node=2 tests/reliability/alone.py FOLDER     # every method, over two ranks

FOLDER contains the `data` of small.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mdistiller.distillers import distiller_dict
from mdistiller.distributed.ranks import Ranks, joined_ranks
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.runtime.signals import Stopped
from mdistiller.engine.trainer import BaseTrainer
from tests.reliability import small
from tests.reliability.combinations import BASE
from tests.reliability.runs import differences
from tests.reliability.train_small import in_step


def trainer_of(method: str, settings: Mapping[str, object]) -> BaseTrainer:
    """The trainer of a run of three steps, the last one on a short batch, in the current folder."""
    chosen = BASE | {
        "DISTILLER.TYPE": method, "DISTILLER.STUDENT": "dropout", "DATASET.TYPE": "small_images",
        "SOLVER.BATCH_SIZE": "32", "SOLVER.EPOCHS": "1", **{key: str(value) for key, value in settings.items()},
    }  # fmt: skip
    Path("empty.yaml").touch()
    return build_trainer(load_cfg("empty.yaml", [word for pair in chosen.items() for word in pair]))


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Work in `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def stop_and_resume(name: str, method: str, settings: Mapping[str, object], folder: Path, ranks: Ranks) -> list[str]:
    """How a run that is stopped and resumed differs from one that is trained through.

    Args:
        name: the run's own, in `folder`, which holds the `data`.

    Raises:
        UserError: the run is refused.
    """
    paths = []
    for stopped in (False, True):
        with within(folder / f"{name} {'stopped' if stopped else 'whole'}"):
            trainer = trainer_of(method, settings)
            if stopped:
                stop_after_two_steps(trainer)
                trainer = trainer_of(method, settings)
            trainer.train(resume=stopped)
            paths.append(trainer.log_path.resolve())
    ranks.wait()
    # The stopped run has replaced a `latest`, the other one has written it once.
    return [found for found in differences(*paths) if found != "latest_previous"]


def stop_after_two_steps(trainer: BaseTrainer) -> None:
    """Train as if SIGTERM arrived in the second step."""
    with in_step(2, partial(setattr, trainer.stop, "signal", signal.SIGTERM)):
        try:
            trainer.train()
        except Stopped:
            return
    raise AssertionError("the run was not stopped")


def main() -> None:
    small.register()
    folder = Path(sys.argv[1]).resolve()
    failed = 0
    with joined_ranks("cpu") as ranks:
        for method in distiller_dict:
            for name, settings in {"alone": {}, "SYNC_BN": {"SOLVER.SYNC_BN": True}}.items():
                found = stop_and_resume(f"{method} {name}", method, settings, folder, ranks)
                failed += bool(found)
                if found and ranks.first:
                    print(f"{method}, {name}: {found[:3]}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
