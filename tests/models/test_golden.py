"""Every row of golden/models.json: state names and shapes, logits, features, what distillers call on a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mdistiller.models import build_model, cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

from .. import _golden as golden

MODELS = {
    "cifar100": cifar_model_dict,
    "tiny_imagenet": tiny_imagenet_model_dict,
    "imagenet": imagenet_model_dict,
}
ROWS = {f"{row['dataset']}-{row['model']}": row for row in golden.load("models")}
TOLERANCE = 1e-6

# Entries that are wrong in the reference, and the right value.
BASIC_BLOCK_STAGES = [64, 128, 256, 512]  # the reference says [256, 512, 1024, 2048] for these nets too
MENDED: dict[tuple[str, str], Any] = {
    ("cifar100-ResNet18", "stage_channels"): BASIC_BLOCK_STAGES,
    ("tiny_imagenet-ResNet18", "stage_channels"): BASIC_BLOCK_STAGES,
    ("imagenet-ResNet18", "stage_channels"): BASIC_BLOCK_STAGES,
    ("imagenet-ResNet34", "stage_channels"): BASIC_BLOCK_STAGES,
    # The reference has no map before the activation here: it must have the feature's shape.
    ("cifar100-MobileNetV2", "preact_feats"): "shapes of feats",
    ("tiny_imagenet-MobileNetV2", "preact_feats"): "shapes of feats",
    # The reference raises.
    ("tiny_imagenet-MobileNetV2", "bn_before_relu"): [
        "stage2.1.residual.7",
        "stage3.2.residual.7",
        "stage4.3.residual.7",
        "conv1.1",
    ],
    ("tiny_imagenet-MobileNetV2", "stage_channels"): [32, 24, 32, 64, 1280],
    ("cifar100-ShuffleV1", "bn_before_relu"): ["layer1.3.bn3", "layer2.7.bn3", "layer3.3.bn3"],
    ("cifar100-ShuffleV1", "stage_channels"): [24, 240, 480, 960],
    # No single module: scale and shift of every channel.
    ("cifar100-ShuffleV2", "bn_before_relu"): "one (weight, bias) a channel",
    # The reference leaves (B, 1280, 1, 1).
    ("tiny_imagenet-MobileNetV2", "pooled_feat"): "flattened",
}


def run(name: str) -> tuple[torch.nn.Module, Tensor, dict[str, Any]]:
    """The pinned network `name`, its logits and features for the pinned images."""
    row = ROWS[name]
    # The logits of an ImageNet row are cut at 50; the classifier's bias has the number of classes.
    num_classes = list(row["state_dict"].values())[-1][0]
    model = build_model(MODELS[row["dataset"]], row["model"], num_classes)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == row["state_dict"]
    # The order as well: an optimizer's state in a checkpoint refers to the parameters by index.
    assert list(model.state_dict()) == list(row["state_dict"])
    golden.fill(model, "")
    model.double().eval()
    with torch.no_grad():
        logits, features = model(golden.images(row["seed"], 2, row["image_size"]))
    return model, logits, features


def check_map(actual: Tensor, pinned: dict[str, Any]) -> None:
    """Shape, sum and norm; the sum's error is measured against the norm, because sums may cancel."""
    assert list(actual.shape) == pinned["shape"]
    assert actual.norm().item() == pytest.approx(pinned["norm"], rel=TOLERANCE)
    assert actual.sum().item() == pytest.approx(pinned["sum"], rel=TOLERANCE, abs=TOLERANCE * pinned["norm"])


def check_maps(actual: list[Tensor], pinned: list[dict[str, Any]]) -> None:
    assert len(actual) == len(pinned)
    for a, p in zip(actual, pinned):
        check_map(a, p)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    row = ROWS[name]
    model, logits, features = run(name)

    def mended(cell: str) -> bool:
        return (name, cell) in MENDED

    pinned_logits = torch.tensor(row["logits"], dtype=torch.float64)
    error = (logits[:, : pinned_logits.shape[1]] - pinned_logits).norm() / pinned_logits.norm()
    assert error < TOLERANCE

    check_maps(features["feats"], row["feats"])
    if mended("preact_feats"):
        assert row["preact_feats"] == "missing"
        assert [f.shape for f in features["preact_feats"]] == [f.shape for f in features["feats"]]
    else:
        check_maps(features["preact_feats"], row["preact_feats"])

    pooled = row["pooled_feat"]
    if mended("pooled_feat"):
        assert len(pooled["shape"]) == 4
        pooled = {**pooled, "shape": pooled["shape"][:2]}
    check_map(features["pooled_feat"], pooled)

    if name == "cifar100-ShuffleV2":
        channels = [(len(norm.weight), len(norm.bias)) for norm in model.get_bn_before_relu()]
        assert channels == [(116, 116), (232, 232), (464, 464)]
    else:
        names = {id(module): key for key, module in model.named_modules()}
        actual = [names[id(bn)] for bn in model.get_bn_before_relu()]
        assert actual == MENDED.get((name, "bn_before_relu"), row["bn_before_relu"])

    assert model.get_stage_channels() == MENDED.get((name, "stage_channels"), row["stage_channels"])


def test_mended_cells_differ_from_the_reference() -> None:
    for (name, cell), right in MENDED.items():
        assert ROWS[name][cell] != right
