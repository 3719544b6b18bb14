"""Run by test_ranks.py, alone or under torchrun: the gradients of every method's first step on one global batch.

    python ranks_worker.py TEACHER GROUPS OUT
"""

import sys

import torch

from mdistiller.dataset import get_dataset
from mdistiller.dataset.batch import VIEWS
from mdistiller.distillers import RunFacts, distiller_dict
from mdistiller.distributed.ranks import joined_ranks
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.runtime.seeds import seed_everything
from mdistiller.engine.trainer import trainer_dict

# Methods under the trainers that take gradients apart.
SPLIT = [("KD", "dot"), ("CRD", "crd_dot"), ("KD", "deepkd"), ("DKD", "deepkd"), ("KD", "aligned"), ("DHKD", "aligned")]


def gradients(method, trainer_name, teacher, groups, branches="auto"):
    """Gradients of the first batch by parameter name, in float64.

    Also the mean loss, and buffers after the step: CRD's memory banks and the student's BatchNorm statistics.
    """
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        f"""DISTILLER.TYPE {method} SOLVER.TRAINER {trainer_name} DISTILLER.TEACHER resnet14 SOLVER.BATCH_SIZE 16
        DISTILLER.TEACHER_CKPT {teacher} DCGD.GROUPS {groups} DATASET.TRAIN_FRACTION 0.1 CRD.NCE.K 32
        DCGD.BRANCHES {branches} SOLVER.SYNC_BN True EXPERIMENT.DEVICE cpu EXPERIMENT.SEED 3""".split(),
    )
    seed_everything(cfg.EXPERIMENT.SEED)
    train_loader, val_loader, *_ = get_dataset(cfg)
    distiller = build_distiller(cfg, RunFacts.of(cfg, train_loader)).double()
    trainer = trainer_dict[trainer_name]("run", distiller, train_loader, val_loader, cfg)
    if method == "KD":  # although SYNC_BN converts BatchNorms
        assert trainer.step.frozen.words["teacher"] == "a copy with its BatchNorms folded"
    batch = trainer.prepare_batch(next(iter(trainer.train_loader)), epoch=1)
    batch |= {name: batch[name].double() for name in ("image", *VIEWS) if name in batch}
    trainer.distiller.train()
    assert branches == "auto" or trainer.distiller.student._together(batch["image"])

    grads = {}

    def note(norm):
        names = {p: name for name, p in trainer.distiller.named_parameters()}
        for p in trainer.update.parameters:
            kinds = getattr(trainer.optimizer, "kinds", ())
            of_kinds = (trainer.optimizer.gradient(kind, p) for kind in kinds)
            own = [g for g in (of_kinds if kinds else (p.grad,)) if g is not None]
            grads[names[p]] = torch.stack(own)

    trainer.update.step = note
    meters = Meters()
    trainer.train_iter(batch, 1, meters)
    grads["train_loss"] = torch.tensor(meters.over(trainer.ranks).means()["train_loss"])
    named = {f"buffer {name}": buffer.clone() for name, buffer in trainer.distiller.named_buffers()}
    return grads | {name: b for name, b in named.items() if "memory" in name or name.startswith("buffer student.")}


def main():
    teacher, groups, out = sys.argv[1:]
    torch.set_num_threads(1)
    with joined_ranks("cpu") as ranks:
        found = {}
        for method, trainer_name in [*((m, "base") for m in distiller_dict), *SPLIT]:
            found[f"{method}/{trainer_name}"] = gradients(method, trainer_name, teacher, groups)
        # What `auto` is on a GPU.
        found["DCGD/base/together"] = gradients("DCGD", "base", teacher, groups, "together")
        torch.save(found, f"{out}.{ranks.rank}")


if __name__ == "__main__":
    main()
