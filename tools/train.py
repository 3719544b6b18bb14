#!/usr/bin/env python
"""Train a student, by itself or from a teacher, as a YAML file says.

    python tools/train.py --cfg configs/digits/kd.yaml
    python tools/train.py --cfg configs/cifar100/dkd/res56_res20.yaml SOLVER.BATCH_SIZE 128 EXPERIMENT.SEED 1
    torchrun --nproc_per_node=4 tools/train.py --cfg configs/imagenet/r34_r18/dkd.yaml
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.analysis.plots.curves import draw_run
from mdistiller.console import one_line_errors, outlive_terminal
from mdistiller.distributed.ranks import joined_ranks
from mdistiller.engine.build import build_trainer, deployment_lines
from mdistiller.engine.cfg import load_cfg, show_cfg
from mdistiller.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="the experiment's YAML file; configs/ holds the published ones")
    parser.add_argument("--resume", action="store_true", help="go on from the run's `latest` checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="train anew where a run of this name is already")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over those of the file: SOLVER.LR 0.1")
    return parser.parse_intermixed_args()


def main() -> None:
    outlive_terminal()
    args = parse_args()
    with one_line_errors():
        cfg = load_cfg(args.cfg, args.opts)
    with one_line_errors(UserError), joined_ranks(cfg.EXPERIMENT.DEVICE) as ranks:
        with one_line_errors():
            trainer = build_trainer(cfg, args.opts)
            first = trainer.begin(resume=args.resume, overwrite=args.overwrite)
        if ranks.first:
            print(show_cfg(cfg), *deployment_lines(trainer), sep="\n", flush=True)
        trainer.run(first)
        if ranks.first:
            draw_run(trainer.log_path)


if __name__ == "__main__":
    main()
