"""The original's `engine/utils.py`: every name in it works as in the original."""

import pytest
import torch

from mdistiller.engine import utils


def test_it_holds_the_originals_names():
    assert set(utils.__all__) == {
        "AverageMeter", "accuracy", "adjust_learning_rate", "load_checkpoint", "log_msg", "save_checkpoint", "validate",
    }  # fmt: skip
    assert all(callable(getattr(utils, name)) for name in utils.__all__)


def test_the_average_meter_computes_a_weighted_mean():
    meter = utils.AverageMeter()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)
    meter.update(2.0, n=3)
    meter.update(6.0)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (6.0, 3.0, 12.0, 4)
    meter.reset()
    assert (meter.val, meter.avg, meter.sum, meter.count) == (0, 0, 0, 0)


@pytest.mark.parametrize("mode, colour", [("INFO", 36), ("TRAIN", 32), ("EVAL", 31)])
def test_messages_get_the_colour_of_their_mode(mode, colour):
    assert utils.log_msg("epoch 1", mode) == f"\033[{colour}m[{mode}] epoch 1\033[0m"


def test_accuracy_of_a_batch():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 3.0, 1.0]])
    top1, top2 = utils.accuracy(logits, torch.tensor([0, 2, 1, 2]), topk=(1, 2))
    assert (top1.item(), top2.item()) == (50.0, 75.0)


def test_accuracies_are_indexed_as_in_the_original():
    (top1,) = utils.accuracy(torch.eye(3), torch.tensor([0, 1, 0]))
    assert top1.shape == (1,) and float(top1[0]) == pytest.approx(200 / 3)


def test_the_average_meter_leaves_a_tensor_that_it_was_given_alone():
    meter, value = utils.AverageMeter(), torch.tensor(2.0)
    meter.update(value)
    total = meter.sum
    meter.update(value)
    assert (float(value), float(total), float(meter.sum), float(meter.avg)) == (2.0, 2.0, 4.0, 2.0)
