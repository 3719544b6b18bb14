"""The detectors against values measured on the reference: names, shapes, feature maps, fusion, context loss."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.modeling import build_model

from detection import HERE
from detection.model.config import load_cfg
from mdistiller.distillers.ReviewKD import hcl_loss, review
from tests import _golden

ROWS = {row["config"]: row for row in _golden.load("detection")}


def agrees(tensor, expected):
    assert list(tensor.shape) == expected["shape"]
    for name in expected.keys() - {"shape"}:
        assert getattr(tensor, name)().item() == pytest.approx(expected[name], rel=1e-8)


@pytest.mark.parametrize("config", ROWS)
def test_detector(config):
    row = ROWS[config]
    model = build_model(load_cfg(HERE / config, ["MODEL.DEVICE", "cpu"]))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == row["state_dict"]
    _golden.fill(model, "", {n for n, v in model.state_dict().items() if v.is_floating_point() and "anchor" not in n})
    model.double().eval()
    image = torch.from_numpy(np.random.RandomState(row["seed"]).standard_normal((1, 3, 64, 96)))
    with torch.no_grad():
        maps = {"student": model.backbone(image), "teacher": model.teacher.backbone(image)}
        for whose in maps:
            assert maps[whose].keys() == row[whose].keys()
            for name, expected in row[whose].items():
                agrees(maps[whose][name], expected)
        if "fused" in row:
            student, teacher = ([maps[whose][name] for name in row[whose]] for whose in maps)
            fused = review(model.kd_trans.train().abfs, student, [m.shape[-2:] for m in teacher])
            for level, expected in zip(fused, row["fused"], strict=True):
                agrees(level, expected)
            assert hcl_loss(fused, teacher).item() == pytest.approx(row["context_loss"], rel=1e-8)
