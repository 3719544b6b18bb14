"""Meters: weighted means, one operation a step, resumed as they were."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdistiller.distributed.ranks import Ranks
from mdistiller.engine.meters import Meters

NAMES = ("train_acc", "loss/kd")


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_means_are_weighted_by_images_and_tensors_are_shared_unharmed():
    one, other, sums = Meters(), Meters(), vector(30.0, 3.0)
    for meters in (one, other):
        meters.add(3, NAMES, sums)
    one.add(1, NAMES, vector(2.0, 5.0))
    assert one.means() == {"train_acc": 8.0, "loss/kd": 2.0}
    assert other.means() == {"train_acc": 10.0, "loss/kd": 1.0} and sums.tolist() == [30.0, 3.0]
    assert Meters().means() == {} and Meters().over(Ranks()).count == 0


def test_a_mean_of_its_own_is_weighted_by_all_images():
    """The norm of a step's gradients is the mean of what was added so far, whatever the number of images."""
    meters = Meters()
    meters.add(3, NAMES, vector(30.0, 3.0))
    meters.add(5, NAMES, vector(10.0, 5.0))
    meters.set_mean("grad_norm", torch.tensor(0.5))
    assert meters.means() == {"train_acc": 5.0, "loss/kd": 1.0, "grad_norm": 0.5}
    assert meters.sums()["grad_norm"].item() == 0.5 * 8  # over several ranks, each counts by its images


def test_a_method_may_return_other_losses_later():
    meters = Meters()
    meters.add(2, NAMES, vector(4.0, 2.0))
    meters.add(2, ("train_acc", "loss/ce"), vector(8.0, 6.0))
    assert meters.means() == {"train_acc": 3.0, "loss/kd": 0.5, "loss/ce": 1.5}


def test_the_state_resumes_and_over_keeps_the_sums():
    meters = Meters()
    meters.add(2, NAMES, vector(4.0, 1.0))
    meters.set_mean("grad_norm", torch.tensor(2.0))
    again = Meters()
    again.load_state_dict(meters.over(Ranks()).state_dict(), torch.device("cpu"))
    for each in (meters, again):
        each.add(1, NAMES, vector(1.0, 1.0))
    assert again.means() == meters.means() and again.count == 3
    again.clear()
    again.add(1, NAMES, vector(1.0, 1.0))
    assert again.means() == {"train_acc": 1.0, "loss/kd": 1.0, "grad_norm": 0.0}
    empty = Meters()
    empty.load_state_dict({"count": 0, "sums": {}}, torch.device("cpu"))
    assert empty.means() == {}


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("terms", [2, 6])
def test_adding_is_one_operation(terms):
    meters, names = Meters(), tuple(map(str, range(terms)))
    sums = vector(*range(terms))
    meters.add(1, names, sums)
    with Operations() as operations:
        meters.add(1, names, sums)
    assert operations.count == 1
