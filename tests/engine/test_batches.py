"""Named batches: by the loader's `fields`, by dictionaries, and the fields that the trainer adds."""

from contextlib import ExitStack
from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mdistiller.dataset import ImageArray
from mdistiller.dataset.batch import batch_on_device, host_index, with_host_index
from mdistiller.dataset.contrastive import ContrastiveSampler
from mdistiller.distillers import CRD, Distiller
from mdistiller.engine.batches import BatchReader, calling
from mdistiller.engine.cfg import CFG
from mdistiller.engine.graph.recorder import refusing_to_wait
from mdistiller.errors import UserError

CPU = torch.device("cpu")


class Needs:
    """Stands for a distiller: all that is read of it is what it needs."""

    def __init__(self, *names):
        self.needs_batch = names


class Images(Dataset):
    """Eight images in one form: as tuples of `count` items, or as dictionaries."""

    def __init__(self, count=3, named=False):
        self.count, self.named = count, named

    def __len__(self):
        return 8

    def __getitem__(self, i):
        items = (torch.full((3, 4, 4), float(i)), i % 2, i, torch.full((3, 4, 4), -float(i)))[: self.count]
        return dict(zip(("image", "target", "index", "image2"), items)) if self.named else items


def loader(fields=None, targets=None, **options):
    made = DataLoader(Images(**options), batch_size=4)
    if fields:
        made.fields = fields
    if targets is not None:
        made.targets = targets
    return made


def read(made, *needs, cfg=CFG):
    return BatchReader(Needs(*needs), made, CPU, cfg)(next(iter(made)), 1)


def test_tuples_hold_image_target_and_index():
    fields = read(loader())
    assert list(fields) == ["image", "target", "index"] and fields["index"].tolist() == [0, 1, 2, 3]
    assert list(read(loader(count=2))) == ["image", "target"]


def test_a_loader_names_its_fields():
    four = ("image", "target", "index", "image2")
    assert torch.equal(read(loader(fields=four, count=4), "image2")["image2"][1], torch.full((3, 4, 4), -1.0))
    other = ("image2", "target", "index", "image")  # no place has a meaning of its own
    assert read(loader(fields=other, count=4), "image2")["image"][1, 0, 0, 0] == -1


def test_a_fourth_item_without_a_name_is_refused():
    with pytest.raises(
        UserError, match=r"a batch has 4 items, but its loader names 3 \(image, target, index\).*`fields`"
    ):
        read(loader(count=4))


def test_dictionaries_need_no_names():
    fields = read(loader(count=4, named=True), "image2", "index")
    assert fields["image2"][2, 0, 0, 0] == -2 and fields["index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("named", [False, True])
def test_a_field_that_nobody_provides_is_refused_with_the_near_names(named):
    made = loader(count=3, named=named)
    with pytest.raises(
        UserError, match=r"unknown field of the batch \(Needs.needs_batch\) 'image2'; did you mean image"
    ):
        BatchReader(Needs("image2"), made, CPU, CFG)
    with pytest.raises(UserError, match="'contrastiv_index'; did you mean contrastive_index"):
        BatchReader(Needs("contrastiv_index"), made, CPU, CFG)


def test_a_batch_without_a_needed_field_is_refused_by_name():
    with pytest.raises(UserError, match=r"unknown field of the batch \(Needs.needs_batch\) 'index'"):
        BatchReader(Needs("index"), loader(count=2), CPU, CFG)  # as its first batch shows
    reader = BatchReader(Needs("index"), loader(), CPU, CFG)
    with pytest.raises(UserError, match=r"Needs needs the field 'index' of the batch .* has image, target"):
        reader(next(iter(loader(count=2))), 1)
    with pytest.raises(UserError, match=r"drawn for each image's index, but a batch has only image, target"):
        BatchReader(Needs("contrastive_index"), loader(count=2, targets=torch.zeros(8)), CPU, CFG)


def crd_config(k=3):
    cfg = CFG.clone()
    cfg.CRD.NCE.K = k
    return cfg


def test_contrastive_index_is_drawn_where_the_loader_has_none():
    targets = torch.arange(8) % 2
    drawn = read(loader(targets=targets), *CRD.needs_batch, cfg=crd_config())["contrastive_index"]
    assert drawn.shape == (4, 4) and drawn[:, 0].tolist() == [0, 1, 2, 3]
    assert all((targets[row[1:]] != targets[row[0]]).all() for row in drawn)


def test_contrastive_index_of_the_loader_is_kept():
    made = loader(fields=("image", "target", "index", "contrastive_index"), count=4)
    assert read(made, *CRD.needs_batch)["contrastive_index"].shape == (4, 3, 4, 4)


def test_contrastive_index_needs_the_labels_of_all_images():
    with pytest.raises(UserError, match="DataLoader has no `targets`"):
        BatchReader(Needs("contrastive_index"), loader(), CPU, CFG)


def test_a_distiller_needs_image_and_target_alone():
    assert Distiller.needs_batch == ()


class Recorded(ContrastiveSampler):
    """Notes for which images draws are begun."""

    begun: ClassVar[list[list[int]]] = []

    def begin(self, index, epoch):
        self.begun.append(index.tolist())
        return super().begin(index, epoch)


def ours(count=20):
    data = ImageArray(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), torch.arange(count) % 4, [0.5] * 3, [0.25] * 3)
    return data.loader(8, 0, train=True)


def negatives_of(made):
    """What draws the negatives of the batches of a loader, and a sampler that draws the same."""
    draw = BatchReader(Needs("contrastive_index"), made, CPU, crd_config()).added["contrastive_index"]
    return draw, ContrastiveSampler(made.targets, 3)


def unreadable(index):
    """The indices on a device from which nothing can be read; the CPU knows what they carry."""
    return with_host_index(index.to("meta"), host_index(index))


@pytest.mark.parametrize("start", [0, 1])
def test_negatives_are_drawn_a_batch_ahead_without_reading_the_device(monkeypatch, start):
    monkeypatch.setattr("mdistiller.engine.batches.ContrastiveSampler", Recorded)
    made = ours()
    draw, plain = negatives_of(made)
    for epoch in (1, 2):
        made.set_epoch(epoch)
        order = [index.tolist() for *_, index in made.iter_from(start)]
        for number, (*_, index) in enumerate(made.iter_from(start)):
            Recorded.begun.clear()
            drawn = draw({"index": unreadable(index)}, epoch)
            assert torch.equal(drawn, plain(index, epoch))
            first = [order[0]] if number == 0 else []
            assert Recorded.begun == first + order[number + 1 : number + 2]


def test_negatives_of_other_images_than_foreseen_are_drawn_anew():
    """As where a broken image file is replaced, or a pass is given up and another epoch begins."""
    made = ours()
    draw, plain = negatives_of(made)
    (*_, first), (*_, second), _ = made
    draw({"index": first}, 1)
    other = second.flip(0)
    assert torch.equal(draw({"index": other}, 1), plain(other, 1))
    draw({"index": first}, 1)
    assert torch.equal(draw({"index": second}, 2), plain(second, 2))


def test_an_index_on_the_cpu_is_not_read_back_from_the_device():
    index = torch.tensor([3, 1])
    batch = {"image": torch.zeros(2, 3, 4, 4), "index": index, "name": ["a", "b"]}
    fields = batch_on_device(batch, torch.device("meta"))
    assert list(fields) == ["image", "index"] and all(field.is_meta for field in fields.values())
    assert host_index(fields["index"]).now is index


@pytest.mark.parametrize("rounds", [None, 0, 2, 3, 5])
def test_ranks_with_fewer_batches_call_equally_often(rounds):
    calls = []
    for number, batch in enumerate(calling("abc", lambda: calls.append(1), rounds), start=1):
        assert batch == "abc"[number - 1] and len(calls) == min(number, 3 if rounds is None else rounds)
    assert len(calls) == (3 if rounds is None else rounds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["memory", "files", "a worker", "DataLoader"])
def test_no_batch_waits_for_the_gpu(form, tmp_path):
    gpu = torch.device("cuda")
    if form == "memory":
        made = ours(200).to(gpu)
    elif form == "DataLoader":
        made = loader(targets=torch.arange(8) % 2)
    else:
        from tests.reliability import train_on_files

        train_on_files.write_images(tmp_path)
        made = train_on_files.read(tmp_path, True).loader(16, int(form == "a worker"), train=True).to(gpu)
    reader = BatchReader(Needs("contrastive_index"), made, gpu, crd_config())
    plain = ContrastiveSampler(made.targets, 3)
    for _ in range(2):  # in the first pass, constants are made and pinned memory is allocated
        with ExitStack() as after_the_first:
            for number, batch in enumerate(made):
                fields = reader(batch, 1)
                if not number:
                    after_the_first.enter_context(refusing_to_wait())
    assert fields["image"].is_cuda
    assert torch.equal(fields["contrastive_index"].cpu(), plain(fields["index"].cpu(), 1))
