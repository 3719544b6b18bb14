"""Batches by name: the original's loaders, loaders that name their items, loaders of dictionaries."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mdistiller.analysis.outputs import collect
from mdistiller.commands.group_classes import _run
from mdistiller.dataset import ImageArray, InMemoryLoader, fields_of, named_batch
from mdistiller.dataset.batch import FIELDS, check_fields, labelled
from mdistiller.engine.scores import evaluate
from mdistiller.errors import UserError

IMAGES = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([2, 0, 1, 2, 2, 0, 1])


class Net(nn.Module):
    """The image's three channel means are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        pooled = image.mean(dim=(2, 3)) * self.weight
        return pooled, {"pooled_feat": pooled, "feats": [image]}


class Dictionaries(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Items whose image and target stand in no particular place."""

    def __len__(self) -> int:
        return len(TARGETS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"name": torch.tensor(i), "target": TARGETS[i], "image": IMAGES[i]}


def tuples(*tensors: Tensor, fields: tuple[str, ...] | None = None) -> DataLoader[Any]:
    """A plain DataLoader of these tensors; it yields lists."""
    loader: DataLoader[Any] = DataLoader(TensorDataset(*tensors), batch_size=3)
    if fields:
        loader.fields = fields  # type: ignore[attr-defined]
    return loader


LOADERS: dict[str, Callable[[], Any]] = {
    "(image, target)": lambda: tuples(IMAGES, TARGETS),
    "(image, target, index)": lambda: tuples(IMAGES, TARGETS, torch.arange(7)),
    "a list of tuples": lambda: [(IMAGES[:5], TARGETS[:5]), (IMAGES[5:], TARGETS[5:], torch.arange(2))],
    "dictionaries": lambda: DataLoader(Dictionaries(), batch_size=3),
    "four named items": lambda: tuples(
        torch.arange(7), TARGETS, torch.zeros(7, 2), IMAGES, fields=("index", "target", "box", "image")
    ),
    "fewer items than names": lambda: tuples(TARGETS, IMAGES, fields=("target", "image", "index")),
}


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> Any:
    return LOADERS[request.param]()


def test_image_and_target_are_read_by_name(loader: Any) -> None:
    images, targets = zip(*labelled(loader))
    assert torch.equal(torch.cat(images), IMAGES) and torch.equal(torch.cat(targets), TARGETS)


def test_every_consumer_reads_by_name(loader: Any) -> None:
    net = Net().eval()
    logits = IMAGES.double().mean(dim=(2, 3)).numpy()
    right = 100 * float(np.mean([row.argmax() == t for row, t in zip(logits, TARGETS.tolist())]))
    score = evaluate(loader, lambda image: {"": net(image)[0]}, torch.device("cpu"))[""]
    assert score.top1 == pytest.approx(right)
    outputs = collect(net, loader)
    assert outputs.logits == pytest.approx(logits, abs=1e-6) and outputs.targets.tolist() == TARGETS.tolist()
    pooled, targets = _run(net, loader, "pooled_feat")
    assert pooled.numpy() == pytest.approx(logits, abs=1e-6) and targets.tolist() == TARGETS.tolist()


def consumers() -> dict[str, Callable[[Any], Any]]:
    net = Net().eval()
    return {
        "evaluate": lambda loader: evaluate(loader, lambda image: {"": net(image)[0]}, torch.device("cpu")),
        "collect": lambda loader: collect(net, loader),
        "group_classes": lambda loader: _run(net, loader, "logits"),
    }


@pytest.mark.parametrize("consumer", consumers())
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: tuples(IMAGES), r"a batch has no 'target', but 'image'; set the loader's `fields`"),
        (
            lambda: tuples(IMAGES, TARGETS, fields=("pixels", "label")),
            r"a batch has no 'image' and no 'target', but 'pixels', 'label'; set the loader's `fields` .* a dictionary",
        ),
        (lambda: [{"image": IMAGES}], r"a batch has no 'target', but 'image'"),
        (lambda: [{}], r"a batch has no 'image' and no 'target', but nothing"),
        (
            lambda: tuples(IMAGES, TARGETS, torch.arange(7), torch.zeros(7, 5)),
            r"a batch has 4 items, but its loader names 3 \(image, target, index\); set the loader's `fields`",
        ),
        (lambda: [IMAGES], r"a batch is a Tensor; a loader must yield tuples \(image, target, index\) or dictionaries"),
    ],
)
def test_a_batch_without_them_is_refused_by_name(consumer: str, made: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        consumers()[consumer](made())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_keeps_its_own_names(kind: type) -> None:
    batch = named_batch(kind({"target": TARGETS, "box": IMAGES}), ("image", "target"))
    assert type(batch) is dict and list(batch) == ["target", "box"] and batch["target"] is TARGETS


def test_a_fourth_item_is_known_only_by_its_name() -> None:
    batch = [IMAGES, TARGETS, torch.arange(7), torch.ones(7, 5)]
    with pytest.raises(UserError, match="4 items, but its loader names 3"):
        named_batch(batch, FIELDS)
    named = named_batch(batch, (*FIELDS, "contrastive_index"))
    assert list(named) == ["image", "target", "index", "contrastive_index"] and named["contrastive_index"] is batch[3]


def test_needed_items_are_checked() -> None:
    check_fields({"image": 0, "target": 1}, ("image", "target"))
    with pytest.raises(UserError, match="no 'index' and no 'mask', but 'image'"):
        check_fields({"image": 0}, ("image", "index", "mask"))


def test_a_loader_without_fields_has_the_originals() -> None:
    assert fields_of(tuples(IMAGES)) == fields_of([]) == fields_of(iter([])) == ("image", "target", "index")
    assert fields_of(tuples(IMAGES, fields=("image", "mask"))) == ("image", "mask")


@pytest.mark.parametrize("fields", ["image", (), ("image", "image"), ("image", 1), None, {"image": 0}])
def test_odd_fields_are_refused(fields: Any) -> None:
    class Odd:
        pass

    odd = Odd()
    odd.fields = fields  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"`fields` must be a tuple of different names, such as .*, not ") as error:
        fields_of(odd)
    assert repr(fields) in str(error.value)


@pytest.mark.parametrize(("train", "names"), [(True, ("image", "target", "index")), (False, ("image", "target"))])
def test_our_loaders_name_what_they_yield(train: bool, names: tuple[str, ...]) -> None:
    data = ImageArray(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(6), (0.5,) * 3, (0.25,) * 3)
    loader = data.loader(3, 0, train)
    assert loader.fields == fields_of(loader) == names and all(len(batch) == len(names) for batch in loader)


def test_a_subclass_or_its_instance_names_more() -> None:
    class Weighted(InMemoryLoader):
        fields = (*FIELDS, "weight")

        def iter_from(self, batch: int) -> Iterator[tuple[Tensor, ...]]:
            for image, target, index in super().iter_from(batch):
                yield image, target, index, index / 10

    data = ImageArray(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(6), (0.5,) * 3, (0.25,) * 3)
    loader = Weighted(data, 3, train=True)
    for batch in loader:
        named = named_batch(batch, fields_of(loader))
        assert torch.equal(named["weight"], named["index"] / 10)
    plain = data.loader(3, 0, train=True)
    plain.fields = ("image", "label", "index")
    assert fields_of(plain) == ("image", "label", "index")
