"""The cost of a method's networks, computed from its configuration alone: no weights are read."""

from __future__ import annotations

from functools import cache

import yaml
from yacs.config import CfgNode as CN

from ..dataset import dataset_info, get_dataset
from ..distillers import Distiller, distiller_dict
from ..engine.build import model_dict
from ..errors import UserError
from ..models import build_model
from ..models.cost import Cost, network_cost


@cache
def _costs(dumped: str) -> tuple[dict[str, Cost], int | None]:
    cfg = CN(yaml.safe_load(dumped))
    distiller, known = _untrained(cfg)
    size = dataset_info[cfg.DATASET.TYPE].image_size
    costs = {name: network_cost(net, size) for name, net in distiller.deployments().items()}
    return costs, distiller.get_extra_parameters() if known else None


def method_costs(cfg: CN) -> tuple[dict[str, Cost], int | None]:
    """Cost of each network that a run of `cfg` may deploy, by name; number of parameters that its method adds to train.

    The number is None where it depends on the size of a data set that is not on this machine (CRD).
    """
    plain = cfg.clone()
    plain.defrost()
    plain.EXPERIMENT.SEED = 0  # the cost does not depend on the seed
    plain.EXPERIMENT.NAME = plain.EXPERIMENT.PROJECT = ""
    return _costs(plain.dump())


def _untrained(cfg: CN) -> tuple[Distiller, bool]:
    """The method with randomly initialised networks, and whether all facts in its `needs_run` are known."""
    models, classes = model_dict(cfg.DATASET.TYPE), dataset_info[cfg.DATASET.TYPE].num_classes
    method = distiller_dict[cfg.DISTILLER.TYPE]
    student = build_model(models, cfg.DISTILLER.STUDENT, classes)
    teacher = build_model(models, cfg.DISTILLER.TEACHER, classes) if method.needs_teacher else None
    known, facts = True, {"num_data": 1}
    if "num_data" in method.needs_run:
        try:
            facts["num_data"] = get_dataset(cfg)[2]
        except (UserError, OSError):
            known = False
    return method.from_run(student, teacher, cfg, facts), known
