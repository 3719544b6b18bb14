"""One step: its micro-batches, and when the ranks average their gradients."""

from contextlib import contextmanager

import pytest
import torch

from mdistiller.distillers import distiller_dict
from mdistiller.distributed.ranks import Ranks
from mdistiller.engine import step as module
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.nan_watch import nan_policy_dict
from mdistiller.engine.step import Step, split_batch
from mdistiller.engine.update import SumUpdate
from mdistiller.models import build_model, cifar_model_dict


@pytest.mark.parametrize("images, parts, sizes", [(8, 4, [2, 2, 2, 2]), (9, 6, [2, 2, 2, 3]), (2, 4, [1, 1])])
def test_a_batch_is_split_in_order_and_loses_no_image(images, parts, sizes):
    batch = {"target": torch.arange(images), "image": torch.rand(images, 1)}
    pieces = split_batch(batch, parts)
    assert [len(piece["target"]) for piece in pieces] == sizes
    for name, whole in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), whole)


@pytest.mark.parametrize(
    ("images", "parts", "full", "sizes"),
    [
        (13, 4, 16, [4, 4, 5]),  # not 4, 4, 4, 1
        (4, 4, 16, [2, 2]),  # not four single ones
        (3, 4, 16, [3]),
        (2, 4, 16, [2]),
        (1, 4, 16, [1]),
        (3, 4, 5, [3]),  # a full batch of five: 2, 3
        (3, 4, 4, [1, 1, 1]),  # a full batch gives single images too
        (4, 4, 4, [1, 1, 1, 1]),
        (5, 1, 8, [5]),
    ],
)
def test_no_micro_batch_is_a_single_image_unless_those_of_a_full_batch_are(images, parts, full, sizes):
    target = torch.arange(images)
    pieces = split_batch({"target": target}, parts, full)
    assert [len(piece["target"]) for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece["target"] for piece in pieces]), target)


def test_micro_batches_of_every_size():
    for full in range(1, 40):
        for parts in range(1, full + 1):
            for images in range(1, full + 1):
                pieces = split_batch({"target": torch.arange(images)}, parts, full)
                sizes = [len(piece["target"]) for piece in pieces]
                assert sum(sizes) == images and len(sizes) <= parts
                assert min(sizes) > 1 or images == 1 or full == parts, (images, parts, full)


def test_items_that_are_no_tensors_are_split_too():
    batch = {"target": torch.arange(5), "name": list("abcde")}
    assert [piece["name"] for piece in split_batch(batch, 2)] == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("images, count", [(8, 4), (6, 3), (2, 2)])
def test_gradients_are_averaged_in_the_last_micro_batch_alone(images, count, monkeypatch, tmp_path):
    """Also where a batch gives fewer micro-batches than ACCUMULATE: two images in four, six in three."""
    averaged = []

    @contextmanager
    def spy(_, now):
        averaged.append(now)
        yield

    monkeypatch.setattr(module, "averaging", spy)
    cfg = load_cfg("configs/digits/vanilla.yaml", ["SOLVER.ACCUMULATE", "4", "SOLVER.BATCH_SIZE", "4"])
    distiller = distiller_dict["NONE"](build_model(cifar_model_dict, "resnet8", 10))
    device, ranks = torch.device("cpu"), Ranks()
    policy = nan_policy_dict["stop"](tmp_path, distiller, device, ranks, cfg)
    update = SumUpdate(distiller.get_learnable_parameters(), cfg)
    step = Step(distiller, update, policy, None, None, device, ranks, cfg)
    result = step({"image": torch.rand(images, 3, 32, 32), "target": torch.arange(images) % 10}, epoch=1, number=1)
    assert averaged == [False] * (count - 1) + [True]
    assert result is not None and result.images == images and dict(zip(result.names, result.sums))["train_loss"] > 0


def test_fields_that_are_not_by_image_go_whole_into_every_micro_batch():
    batch = {"target": torch.arange(4), "scale": torch.tensor(2.0), "prototypes": torch.eye(3)}
    for piece in split_batch(batch, 2):
        assert len(piece["target"]) == 2 and piece["scale"] == 2.0 and piece["prototypes"].shape == (3, 3)
