"""The data set "loader", whose images a caller brings: its facts are settings, and no command reads it."""

import pytest

from mdistiller.dataset import get_dataset, info_of
from mdistiller.distillers import RunFacts
from mdistiller.engine.cfg import cfg_of
from mdistiller.errors import UserError

FACTS = {"TYPE": "loader", "NUM_CLASSES": 7, "IMAGE_SIZE": 48, "MEAN": [0.5, 0.5, 0.5], "STD": [0.2, 0.2, 0.2]}


def test_its_facts_are_settings():
    cfg = cfg_of([{"DATASET": FACTS}])
    info, facts = info_of(cfg), RunFacts.of(cfg)
    assert (info.num_classes, info.image_size, info.model_family) == (7, 48, "any")
    assert (facts.num_classes, facts.image_size, facts.mean, facts.num_data) == (7, 48, (0.5, 0.5, 0.5), None)


def test_its_images_are_not_read():
    with pytest.raises(UserError, match=r"mdistiller\.distill"):
        get_dataset(cfg_of([{"DATASET": FACTS}]))
