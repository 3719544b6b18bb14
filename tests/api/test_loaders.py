"""Loaders of a user's own: indices and labels are added, and nothing else changes."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from mdistiller.api.loaders import batch_size_of, first_batch, image_size_of, targets_of, with_index
from mdistiller.errors import UserError

from ._parts import Listed, data, loaders


def batches(loader, seed=0):
    torch.manual_seed(seed)
    return list(loader)


@pytest.mark.parametrize(
    "make",
    [
        lambda image, target: (image, target),
        lambda image, target: [image, int(target)],
        lambda image, target: {"image": image, "target": int(target), "name": "x"},
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"drop_last": True}])
def test_batches_get_the_place_of_each_image(make, options):
    own = DataLoader(Listed(make, count=20), batch_size=8, shuffle=True, **options)
    indexed, plain = batches(with_index(own)), batches(own)
    assert len(indexed) == len(plain) == len(own)
    for batch, before in zip(indexed, plain):
        image, target = (before["image"], before["target"]) if isinstance(before, dict) else before
        assert torch.equal(batch["image"], image) and torch.equal(batch["target"], target)
        assert torch.equal(own.dataset.base.tensors[0][batch["index"]], image)
        assert batch["index"].dtype == torch.int64


def test_the_loaders_own_sampler_collation_and_reading_at_once_are_kept():
    class AtOnce(Dataset):
        asked = []

        def __len__(self):
            return 9

        def __getitem__(self, index):
            raise AssertionError("one by one")

        def __getitems__(self, indices):
            self.asked.append(indices)
            return [(torch.full((3, 2, 2), float(i)), i) for i in indices]

    def collate(items):
        return torch.stack([image for image, _ in items]), torch.tensor([target for _, target in items])

    own = DataLoader(AtOnce(), batch_sampler=[[3, 1], [8, 0]], collate_fn=collate)
    assert [batch["index"].tolist() for batch in with_index(own)] == [[3, 1], [8, 0]]
    assert AtOnce.asked == [[3, 1], [8, 0]]


def test_a_loader_of_ones_own_class_stays_one():
    class Doubling(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                yield batch

    own = Doubling(data(4), batch_size=2)
    assert [batch["index"].tolist() for batch in with_index(own)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data(4))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(Stream(), batch_size=2), "a stream (Stream) has none"),
        (DataLoader(data(4), batch_size=None), "with batch_size=None batches elsewhere"),
    ],
)
def test_where_no_index_can_be_added_one_line_says_so(loader, words):
    with pytest.raises(UserError) as refused:
        with_index(loader)
    assert words in str(refused.value) and "'index'" in str(refused.value) and "\n" not in str(refused.value)


class Told(Dataset):
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(3, 2, 2), [3, 1, 4, 1][index]


LABELS = [3, 1, 4, 1]


@pytest.mark.parametrize(
    ("items", "labels"),
    [
        (Told(targets=LABELS), LABELS),
        (Told(labels=np.array(LABELS)), LABELS),
        (Told(), LABELS),  # read
        (Told(targets=["a", "b", "c", "d"]), LABELS),
        (Told(targets=[0, 0, 0, 0], target_transform=lambda target: target + 1), LABELS),
        (TensorDataset(torch.zeros(4, 3, 2, 2), torch.tensor(LABELS)), LABELS),
        (Subset(Told(targets=LABELS), [2, 0]), [4, 3]),
        (ConcatDataset([Told(targets=LABELS), Told(labels=[5, 6, 7, 8])]), [*LABELS, 5, 6, 7, 8]),
    ],
)
def test_the_labels_of_all_images_are_found(items, labels):
    loader = DataLoader(items, batch_size=3, shuffle=True)
    assert targets_of(loader).tolist() == targets_of(with_index(loader)).tolist() == labels


def test_looking_at_the_first_batch_draws_nothing_from_the_loaders_generator():
    train, _ = loaders(generator=torch.Generator().manual_seed(3))
    first = first_batch(train)
    assert torch.equal(next(iter(train))[0], first["image"])
    assert batch_size_of(train, first) == 8 and image_size_of(first) == 8
    assert batch_size_of(DataLoader(data(6), batch_sampler=[[1, 2], [0, 3]]), {"target": torch.zeros(2)}) == 2


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "yields no batch"),
        (3, "is a int; give a loader"),
        (iter([(1, 2)]), "can be gone through once only"),
        ([{"img": torch.zeros(2, 3, 4, 4), "label": torch.zeros(2)}], "has no 'image' and no 'target', but 'img'"),
    ],
)
def test_a_loader_that_is_none_is_refused_in_one_line(loader, words):
    with pytest.raises(UserError) as refused:
        first_batch(loader)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 4)])
def test_images_that_are_not_square_are_refused(shape):
    with pytest.raises(UserError, match=r"square|\(B, 3, H, W\)"):
        image_size_of({"image": torch.zeros(shape)})
