"""Whole trainings side by side on one device, through tools/train.py, and their accuracies against the published ones.

    python benchmarks/trainings.py --folder output/gpu/runs --data data

Each is a process of its own. Where the time is up before they end, the epochs that were trained count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed

import torch
from stages import last_line

from mdistiller.console import tool
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError
from mdistiller.experiments.launch import visible_gpus
from mdistiller.experiments.mps import gpu_environments
from mdistiller.experiments.runs import Run, read_run
from mdistiller.models import build_model, cifar_model_dict, teacher_checkpoint
from mdistiller.system import usable_cpus

REPOSITORY = Path(__file__).resolve().parents[1]
# Seconds that the trainings have to save their checkpoints, once they are asked to end.
_PATIENCE = 8.0


@dataclass(frozen=True)
class Training:
    """A training of resnet20, with resnet56 as the teacher.

    Attributes:
        config: a shipped file.
        published: top-1 on CIFAR-100 after 240 epochs, in percent.
        settings: over the file's and `EVERYWHERE`.
    """

    config: str
    published: float
    settings: tuple[str, ...] = ()


# What is run, by name, and with which settings: those that are fastest on a GPU and change no accuracy.
EVERYWHERE = ("SOLVER.CUDA_GRAPH", "auto", "LOG.WANDB", "False", "LOG.SAVE_CHECKPOINT_FREQ", "240")
TRAININGS = {
    "plain": Training("configs/cifar100/vanilla.yaml", 69.06),
    "KD": Training("configs/cifar100/kd.yaml", 70.66),
    "DKD": Training("configs/cifar100/dkd/res56_res20.yaml", 71.97),
}
TEACHER, STUDENT, EPOCHS = "resnet56", "resnet20", 240
# A rehearsal: the same processes on a tenth of scikit-learn's digits, with an untrained teacher.
QUICK = {"plain": "configs/digits/vanilla.yaml", "KD": "configs/digits/kd.yaml", "DKD": "configs/digits/dkd.yaml"}


def missing(data: Path, quick: bool) -> dict[str, str]:
    """The trainings that cannot run here, and in words what to fetch."""
    if quick:
        return {}
    if not (data / "cifar-100-python" / "train").is_file():
        why = f"no CIFAR-100 in {data}; put cifar-100-python there (data/README.md), or name its folder with --data"
        return dict.fromkeys(TRAININGS, why)
    try:
        teacher_checkpoint(cifar_model_dict[TEACHER][1], TEACHER)
    except UserError as error:
        why = f"{error}; download_ckpts/README.md says where it is published"
        return {name: why for name, own in TRAININGS.items() if load_cfg(own.config).DISTILLER.TYPE != "NONE"}
    return {}


def command(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of a training, which writes below `args.folder`/`name`."""
    training = TRAININGS[name]
    settings = [*EVERYWHERE, *training.settings, "SOLVER.AMP", args.amp, "EXPERIMENT.DEVICE", args.device]
    settings += ["EXPERIMENT.PROJECT", name, "EXPERIMENT.NAME", "run", "LOG.PREFIX", str(args.folder)]
    if args.quick:
        settings += ["DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]"]
        settings += ["DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(args.folder / "teacher.pth")]
    else:
        settings += ["DISTILLER.TEACHER", TEACHER, "DISTILLER.STUDENT", STUDENT, "DATASET.ROOT", str(args.data)]
        settings += ["SOLVER.EPOCHS", str(args.epochs)]
    config = QUICK[name] if args.quick else training.config
    return [sys.executable, str(REPOSITORY / "tools" / "train.py"), "--cfg", config, *settings]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What each training below `folder` has reached so far, by name; what it said last, if that is nothing."""
    return {name: result(name, folder) for name in TRAININGS if (folder / f"{name}.txt").exists()}


def result(name: str, folder: Path) -> dict[str, Any]:
    """The epochs of a training, its accuracies and its speed."""
    try:
        (metrics,) = (folder / name).glob("*/metrics.csv")
        run = read_run(metrics.parent)
    except (ValueError, UserError):
        return {"epochs": 0, "said": last_line(folder / f"{name}.txt")}
    found = {
        "epochs": int(run.epochs[-1]["epoch"]), "of": run.cfg.SOLVER.EPOCHS, "top1_last": run.last,
        "top1_best": run.best, "seconds": run.seconds, "images_per_second": median(run.column("images_per_second")),
        "peak_memory_mib": run.column("peak_memory_mib")[-1], "seed": run.cfg.EXPERIMENT.SEED,
        "said": last_line(folder / f"{name}.txt"),
    }  # fmt: skip
    return found | ({"published": TRAININGS[name].published} if _is_published(run) else {})


def _is_published(run: Run) -> bool:
    """Whether the run is, once it has finished, the one whose accuracy is published."""
    return (run.cfg.DATASET.TYPE, run.cfg.SOLVER.EPOCHS) == ("cifar100", EPOCHS)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "output" / "gpu" / "runs", help="is emptied first")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="has cifar-100-python")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="none", help="SOLVER.AMP of all of them")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--quick", action="store_true", help="a rehearsal of seconds, on a few digits")
    return parser.parse_args(arguments)


def end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the trainings that still run. The daemon of MPS waits for them when it is ended."""
    until = time.monotonic() + _PATIENCE
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@tool()
def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left at a time limit
    lacking = missing(args.data, args.quick)
    names = [name for name in TRAININGS if name not in lacking]
    for why in dict.fromkeys(lacking.values()):
        print(f"{', '.join(name for name in lacking if lacking[name] == why)}: {why}", flush=True)
    if args.folder.exists():
        shutil.rmtree(args.folder)
    args.folder.mkdir(parents=True)
    if args.quick:
        torch.save({"model": build_model(cifar_model_dict, "resnet8", 10).state_dict()}, args.folder / "teacher.pth")
    with gpu_environments([] if args.device == "cpu" else visible_gpus(), len(names)) as environments:
        running: dict[str, subprocess.Popen[bytes]] = {}
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // len(names)))}
        try:
            for place, name in enumerate(names):
                environment = threads | os.environ | (environments[place % len(environments)] if environments else {})
                with (args.folder / f"{name}.txt").open("wb") as log:
                    running[name] = subprocess.Popen(
                        command(name, args), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                    )
            while any(process.poll() is None for process in running.values()):
                time.sleep(0.5)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            end(running.values())
    for name in names:
        print(f"{name}: exit status {running[name].returncode}, {results(args.folder)[name]}", flush=True)
    if any(process.returncode for process in running.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
