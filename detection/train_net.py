#!/usr/bin/env python
"""Train or evaluate a detector, with or without a teacher, as configured by a YAML file.

    python detection/train_net.py --config-file detection/configs/DKD/DKD-R18-R101.yaml --num-gpus 4
    cd detection; python3 train_net.py --config-file configs/DKD/DKD-R18-R101.yaml --num-gpus 4
    ... --resume                                      continue from OUTPUT_DIR's last checkpoint
    ... --eval-only MODEL.WEIGHTS output/DKD-R18-R101/model_final.pth
    ... SOLVER.AMP.ENABLED True TEST.AUG.ENABLED True VIS_PERIOD 100 MODEL.DEVICE cpu
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.console import one_line_errors
from mdistiller.errors import UserError
from mdistiller.paths import expanded

with one_line_errors():
    import detection  # noqa: F401  (reports how to install detectron2 if it is missing)

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from detection.model.annotations import register_own, use_classes
from detection.model.config import load_cfg
from detection.model.files import check_data, check_objects, find_weights
from detection.model.trainer import Trainer
from detection.model.weights import NO_STUDENT, NO_TEACHER, Checkpointer


def read_cfg(args: argparse.Namespace) -> CfgNode:
    """Read the configuration, and check that it names a teacher's weights, and that GPUs, data and weights exist.

    The classes are those of the annotations.
    """
    cfg = load_cfg(args.config_file, args.opts)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    if cuda and args.num_gpus > torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise UserError(f"--num-gpus {args.num_gpus}, but torch sees {seen} GPUs; set MODEL.DEVICE cpu to use the CPU")
    names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if not (cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN):
        raise UserError(f"DATASETS.{'TEST' if args.eval_only else 'TRAIN'} names no data set")
    register_own(cfg)
    check_data(names)
    use_classes(cfg, names)
    if not args.eval_only:
        check_objects(cfg)
    cfg.defrost()
    resumes = args.resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
    if args.eval_only and not (cfg.MODEL.WEIGHTS or resumes):
        raise UserError(NO_STUDENT)
    from_scratch = not (cfg.MODEL.WEIGHTS or resumes or args.eval_only)
    if from_scratch and cfg.MODEL.META_ARCHITECTURE == "RCNNKD" and not cfg.KD.RANDOM_TEACHER:
        raise UserError(NO_TEACHER)
    cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS if resumes else find_weights(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    return cfg


def evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluate the weights that `cfg` names, or if `resume` the last checkpoint in OUTPUT_DIR."""
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.whole_student = True
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate, in each process."""
    with one_line_errors():
        cfg = read_cfg(args)
        default_setup(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args.resume)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def main() -> None:
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    with one_line_errors():
        args.config_file = expanded(args.config_file)  # detectron2 opens it too
        read_cfg(args)
    try:
        launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
    except ProcessExitedException as ended:
        if ended.exit_code != 2:
            raise
        raise SystemExit(2) from None  # the process has said why, in one line


if __name__ == "__main__":
    main()
