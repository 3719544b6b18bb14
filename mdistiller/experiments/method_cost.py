"""The cost of a method's networks, computed from its configuration alone: no weights are read."""

from __future__ import annotations

from functools import cache

import yaml
from yacs.config import CfgNode as CN

from ..dataset import get_dataset
from ..distillers import RunFacts, distiller_dict
from ..engine.build import build_distiller, facts_without_data
from ..errors import UserError
from ..models.cost import Cost, network_cost


@cache
def _costs(dumped: str) -> tuple[dict[str, Cost], int | None]:
    cfg = CN(yaml.safe_load(dumped))
    facts, known = _facts(cfg)
    distiller = build_distiller(cfg, facts, trained=False)
    costs = {name: network_cost(net, facts.image_size) for name, net in distiller.deployments().items()}
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


def _facts(cfg: CN) -> tuple[RunFacts, bool]:
    """The facts of the run, and whether the size of its data is known if its method needs it; else no data is read."""
    if "num_data" not in distiller_dict[cfg.DISTILLER.TYPE].facts_needed(cfg):
        return facts_without_data(cfg), True
    try:
        return RunFacts.of(cfg, get_dataset(cfg)[0]), True
    except UserError:
        return facts_without_data(cfg), False
