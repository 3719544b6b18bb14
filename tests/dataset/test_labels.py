"""Labels of a registered data set, and of a loader: checked where they are read."""

import pytest
import torch

from mdistiller.dataset import ImageArray, dataset_dict, get_dataloaders, get_val_loader
from mdistiller.dataset._base import register
from mdistiller.errors import UserError

IMAGES = torch.zeros(12, 8, 8, 3, dtype=torch.uint8)


def read(targets):
    """Registers the data set "mine", of three classes; the names of its reader are those of any."""

    @register("mine", num_classes=3, image_size=8, model_family="cifar")
    def reader(root, train, skip_broken=False):
        return ImageArray(IMAGES, targets, (0.5,) * 3, (0.5,) * 3)

    try:
        return get_dataloaders("mine", 4, 4, 0), get_val_loader("mine")
    finally:
        del dataset_dict["mine"]


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.arange(12) % 3 + 1, "labels of mine go from 1 to 3, but a label is 0 to 2: 4 of 12 .*subtract 1"),
        (torch.arange(12) % 3 - 1, "go from -1 to 1.*leave out the images without a label"),
        (torch.arange(12), "go from 0 to 11.*more than 3 classes"),
        (torch.arange(12.0) % 3, r"are float32 \(12,\); .*labels.long"),
        (torch.eye(12)[:, :3], r"are float32 \(12, 3\); .*argmax"),
        ([0] * 12, r"are a list; .*torch.as_tensor"),
    ],
)
def test_labels_of_a_registered_data_set(targets, message):
    with pytest.raises(UserError, match=message):
        read(targets)


def test_labels_of_another_whole_type():
    (train, _, count), val = read((torch.arange(12) % 3).int())
    assert count == 12 and sorted(train.targets.tolist()) == [0] * 4 + [1] * 4 + [2] * 4 and len(val) == 1


def test_a_loader_without_a_data_set_refuses_what_are_no_labels():
    with pytest.raises(UserError, match="the targets of InMemoryLoader are a list"):
        ImageArray(IMAGES, [0] * 12, (0.5,) * 3, (0.5,) * 3).loader(4, 0, train=True)
