"""detectron2's trainer with reproducible batches for resumed runs, on GPUs or CPUs, in full or mixed precision."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from mdistiller.engine.overrides import flat_settings
from mdistiller.errors import UserError

from .data import build_test_loader, build_train_loader, seed_of
from .weights import Checkpointer

LOG = logging.getLogger("detectron2.trainer")


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


# detectron2's loop logs the traceback of everything that ends it; a UserError becomes one line in `train_net.py`.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)


class CPUAMPTrainer(SimpleTrainer):
    """A step under bfloat16 autocast on the CPU; detectron2's AMPTrainer requires CUDA."""

    def run_step(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            super().run_step()


def step_trainer(cfg: CfgNode) -> type[SimpleTrainer]:
    """The class that runs one step, for the precision and device of `cfg`."""
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer
    return CPUAMPTrainer if cfg.MODEL.DEVICE == "cpu" else AMPTrainer


class Trainer(DefaultTrainer):
    """Trains what `cfg` describes; on a CPU, equal configurations give equal weights, with or without an interruption.

    All randomness derives from SEED (-1: a new seed each time) and the iteration number.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = build_train_loader(cfg, self.seed)
        # On the CPU, DistributedDataParallel must get no device ids; detectron2 would pass one.
        devices = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = step_trainer(cfg)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        # The configuration of a detector alone, as `student_cfg` writes it, has no KD.
        self.checkpointer.whole_teacher = not ("KD" in cfg and cfg.KD.RANDOM_TEACHER)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """detectron2's hooks, and an evaluation with TEST.AUG before the hook that writes the results."""
        found = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            writer = next((i for i, hook in enumerate(found) if isinstance(hook, hooks.PeriodicWriter)), len(found))
            found.insert(writer, hooks.EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model)))
        return found

    def resume_or_load(self, resume: bool = True) -> None:
        """If `resume`, continue from OUTPUT_DIR's last checkpoint where there is one; else start from MODEL.WEIGHTS.

        Raises:
            UserError: the teacher, or a part of it, is in neither, unless KD.RANDOM_TEACHER.
        """
        super().resume_or_load(resume)
        self.data_loader.batch_sampler.start = self.start_iter

    def state_dict(self) -> dict[str, Any]:
        """As detectron2's, and the solver's settings."""
        return {**super().state_dict(), "solver": flat_settings(self.cfg.SOLVER, "SOLVER.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As detectron2's, but with the solver's settings of this configuration instead of the checkpoint's.

        Raises:
            UserError: the settings divide the parameters into other groups than the checkpoint's did.
        """
        settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        base_lrs = self.scheduler.base_lrs
        inner = state_dict["_trainer"]
        if isinstance(self._trainer, AMPTrainer):  # it may have been switched on since
            inner = {"grad_scaler": self._trainer.grad_scaler.state_dict(), **inner}
        _check_groups(inner["optimizer"]["param_groups"], self.optimizer.param_groups)
        super().load_state_dict({**state_dict, "_trainer": inner})
        self.scheduler.base_lrs = base_lrs
        for group, own, lr in zip(self.optimizer.param_groups, settings, self.scheduler.get_lr()):
            group.update({**own, "lr": lr})
        changed = _changes(state_dict.get("solver", {}), flat_settings(self.cfg.SOLVER, "SOLVER."))
        if changed:
            LOG.info("from iteration %d on: %s", self.iter + 1, ", ".join(changed))

    def run_step(self) -> None:
        """One iteration, seeded by its number."""
        torch.manual_seed(seed_of(self.seed, self.iter, comm.get_rank()))
        super().run_step()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches for detectron2's PreciseBN hook."""
        return build_train_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """The images of a data set, one a batch."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "inference") -> COCOEvaluator:
        """COCO's box AP, and mask AP where there are masks; details go to `folder` in OUTPUT_DIR.

        Raises:
            UserError: a data set in another format than COCO's.
        """
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind != "coco":
            raise UserError(f"{dataset_name!r} is evaluated as {kind!r}; only data sets in COCO's format are supported")
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / folder))

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
        """The results of `test` on resized and flipped images, as `TEST.AUG` says; their names end in _TTA."""
        LOG.info("Evaluation with test-time augmentation")
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())


def _check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint whose optimizer has its parameters in other groups, of equal settings each."""
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if sizes != own_sizes:
        raise UserError(
            f"the checkpoint's optimizer has groups of {sizes} parameters, this configuration makes groups of "
            f"{own_sizes}: resume with the run's own network and SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS and "
            "BIAS_LR_FACTOR"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, in words; tuples and lists of the same items are the same."""
    return [
        f"{key} {value} instead of {before[key]}"
        for key, value in now.items()
        if key in before and str(before[key]) != str(value)
    ]
