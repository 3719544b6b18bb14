"""Train a student, with or without a teacher, as a YAML file describes.

    mdistiller train --cfg configs/digits/kd.yaml
    mdistiller train --cfg configs/cifar100/dkd/res56_res20.yaml SOLVER.BATCH_SIZE 128 EXPERIMENT.SEED 1
    torchrun --nproc_per_node=4 -m mdistiller train --cfg configs/imagenet/r34_r18/dkd.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..analysis.plots.curves import draw_run
from ..console import outlive_terminal, tool
from ..distributed.ranks import joined_ranks
from ..engine.build import build_trainer, deployment_lines, frozen_lines, step_lines
from ..engine.cfg import cfg_text, load_cfg
from ..engine.overrides import note_repeats
from ..engine.resumed_run import run_to_resume
from ..errors import UserError
from ._arguments import command_parser, local_rank_argument, override_arguments


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("--cfg", required=True, help="the experiment's YAML file; configs/ holds the published ones")
    parser.add_argument("--resume", action="store_true", help="continue from the run's `latest` checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="train from the start, and replace an existing run of this name"
    )
    local_rank_argument(parser)
    override_arguments(parser, "overrides of the file's settings, such as SOLVER.LR 0.1")
    return parser.parse_intermixed_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    outlive_terminal()
    args = parse_args(arguments, prog)
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    cfg = load_cfg(args.cfg, args.opts)
    with joined_ranks(cfg.EXPERIMENT.DEVICE) as ranks:
        if ranks.first:
            note_repeats(args.opts)
        name = run_to_resume(cfg, args.opts, ranks) if args.resume else None
        trainer = build_trainer(cfg, args.opts, name)
        trainer.overwrite = args.overwrite
        if ranks.first:
            trainer.when_begun = lambda: print(
                cfg_text(cfg), *deployment_lines(trainer), *frozen_lines(trainer), *step_lines(trainer),
                sep="\n", flush=True,
            )  # fmt: skip
        trainer.train(resume=args.resume)
        if ranks.first:
            draw_run(trainer.log_path)
