"""What a method's networks cost, told from its configuration alone: no weights are read."""

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
    """Cost of each network that a run of `cfg` may deploy, by name, and the parameters that its method adds to train.

    The latter is None where it hangs on the size of a data set that is not here (CRD).
    """
    plain = cfg.clone()
    plain.defrost()
    plain.EXPERIMENT.SEED = 0  # seeds have one cost
    plain.EXPERIMENT.NAME = plain.EXPERIMENT.PROJECT = ""
    return _costs(plain.dump())


def _untrained(cfg: CN) -> tuple[Distiller, bool]:
    """The method around networks with random weights, and whether it was told all that it asks of the run."""
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
