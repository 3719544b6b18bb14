"""DATASET.AUGMENT: torchvision's transforms in memory and from files; the weak and the strong view; what is drawn."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mdistiller.dataset import get_dataset
from mdistiller.dataset._base import mix_seed
from mdistiller.dataset.augment import CropFlip, ResizedCrop, RotateFlip
from mdistiller.dataset.augmentation import FileView, OnTop, batch_augment, transform_of, view_by
from mdistiller.dataset.folders import ImageFiles, cpu_seed, labelled_files
from mdistiller.dataset.image_file import read_pixels
from mdistiller.dataset.in_memory import ImageArray
from mdistiller.dataset.policies import POLICIES, apply_drawn, apply_policy, draw_policy, policy_of
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
NAMES = ("crop_flip", "resized_crop", "randaugment", "trivialaugment", "fixmatch")
TORCHVISION = ("randaugment", "trivialaugment")  # the policies whose draws and operations are torchvision's


def smooth(count, size, generator=None):
    """Images with structure (N, size, size, 3) uint8: of noise, operations on colours can hardly be told."""
    generator = generator or torch.Generator().manual_seed(count)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    return F.interpolate(small, (size, size), mode="bilinear").mul(255).byte().permute(0, 2, 3, 1).contiguous()


def array(count=24, size=16, augment=None):
    own = {} if augment is None else {"augment": augment}
    return ImageArray(smooth(count, size), torch.arange(count) % 4, MEAN, STD, **own)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve files of 40 x 30 pixels, whose own view is a resized crop to 16."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(smooth(12, 40)):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image[:30].numpy()).save(folder / "ab"[i % 2] / f"{i:02}.png")
    view = FileView(read_pixels, transform_of("resized_crop", 16))
    return ImageFiles.of(labelled_files(folder, ["a", "b"]), view, view, MEAN, STD)


def batches(data, start=0, epoch=2, workers=0, views=False, size=4):
    loader = data.loader(size, workers, train=True, seed=5)
    loader = loader.with_views() if views else loader
    loader.set_epoch(epoch)
    return list(loader.iter_from(start))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y))


def pixels(image):
    """(B, 3, H, W) normalised -> (B, H, W, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((image * std + mean) * 255).round().byte().permute(0, 2, 3, 1)


def test_the_names_choose_torchvisions_transforms():
    assert batch_augment("crop_flip", CropFlip(1, False), 32) == CropFlip(padding=4, flip=True)
    assert batch_augment("crop_flip", CropFlip(), 224).padding == 28
    assert batch_augment("resized_crop", CropFlip(), 32) == ResizedCrop(32)
    own = RotateFlip(20, 64)
    assert batch_augment("randaugment", own, 64) == OnTop(own, "randaugment")
    assert batch_augment("trivialaugment", OnTop(own, "randaugment"), 64) == OnTop(own, "trivialaugment")
    crop = transform_of("crop_flip", 64).transform.transforms
    assert [type(t) for t in crop] == [v2.Resize, v2.RandomCrop, v2.RandomHorizontalFlip] and crop[1].padding == [8] * 4
    resized = transform_of("resized_crop", 64).transform.transforms
    assert [type(t) for t in resized] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip]
    for make in (lambda: batch_augment("crop_flp", own, 8), lambda: transform_of("crop_flp", 8)):
        with pytest.raises(UserError, match=r"DATASET.AUGMENT\) 'crop_flp'; did you mean crop_flip"):
            make()


@pytest.mark.parametrize("stored", [32, 48])
def test_resized_crops_are_torchvisions_within_a_level(stored):
    images, augment = smooth(60, stored), ResizedCrop(32)
    uniform, mirrored = augment.draw(60, torch.Generator().manual_seed(1))
    shown = augment.apply(images, uniform, mirrored)
    for row, (top, left, height, width) in enumerate(augment.boxes(uniform, stored, stored).tolist()):
        crop = TF.resized_crop(images[row].permute(2, 0, 1), top, left, height, width, [32, 32], antialias=True)
        crop = TF.hflip(crop) if mirrored[row] else crop
        assert (shown[row].int() - crop.permute(1, 2, 0).int()).abs().max() <= 1


def test_resized_crops_are_distributed_as_torchvisions():
    stats = pytest.importorskip("scipy.stats")
    augment = ResizedCrop(32)
    uniform, mirrored = augment.draw(4000, torch.Generator().manual_seed(1))
    ours = augment.boxes(uniform, 32, 32)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(32)
    theirs = [transform.make_params([torch.zeros(3, 32, 32)]) for _ in range(4000)]
    for place, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(ours[:, place], [p[name] for p in theirs]).pvalue > 0.001, name
    assert abs(mirrored.double().mean() - 0.5) < 0.04


def test_a_resized_crop_of_which_no_attempt_fits_is_the_largest_central_part():
    augment = ResizedCrop(8, area=(0.9, 1.0))  # of 10 x 40 pixels no such part is as much as 4 / 3 as wide as high
    assert augment.boxes(augment.draw(1, torch.Generator())[0], 10, 40).tolist() == [[0, 13, 10, 13]]


class Replayed:
    """In place of torch in torchvision's module: its draws are those of one of our images."""

    def __init__(self, policy, draws):
        self.bins = policy.num_magnitude_bins
        self.draws, self.current = iter(draws.tolist()), 0
        self.of_bin = not hasattr(policy, "magnitude")

    def randint(self, count, size):
        if count == self.bins and self.of_bin and self.begun:
            self.begun = False
            return torch.tensor(self.current // 2 % self.bins)
        self.current, self.begun = next(self.draws), True
        return torch.tensor(self.current // 2 // self.bins)

    def rand(self, size):
        return torch.tensor(0.0 if self.current % 2 else 1.0)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("name", TORCHVISION)
def test_policies_of_batches_are_torchvisions_on_the_same_draws(name, monkeypatch):
    images = smooth(150, 16)
    draws = draw_policy(name, 150, torch.Generator().manual_seed(1))
    shown = apply_drawn(name, images, draws)
    for image, own, result in zip(images, draws, shown):
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.transforms.v2._auto_augment.torch", Replayed(policy_of(name), own))
            assert torch.equal(result, apply_policy(name, image))
    assert (shown != images).flatten(1).any(1).double().mean() > 0.7


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_operation_and_sign_is_equally_likely(name):
    policy = policy_of(name)
    draws = draw_policy(name, 28_000, torch.Generator().manual_seed(1)).long()
    assert draws.shape == (28_000, 2 if name == "randaugment" else 1)
    for draw in draws.unbind(1):
        kinds = (draw // 2 // policy.num_magnitude_bins) * 2 + draw % 2
        counts = kinds.bincount(minlength=28).double()
        assert len(counts) == 28 and ((counts - 1000) ** 2 / 1000).sum() < 55.5  # 27 degrees of freedom: 99.9 %
        bins = (draw // 2 % policy.num_magnitude_bins).bincount(minlength=31)
        assert (bins > 0).sum() == (1 if name == "randaugment" else 31)


@pytest.mark.parametrize("name", NAMES)
def test_images_in_memory_come_as_drawn_for_their_index(name):
    data = array().augmented(name, 16)
    loader = data.loader(5, 0, train=True, seed=5)
    loader.set_epoch(2)
    _, *draws = loader.draw()
    for image, target, index in loader:
        assert torch.equal(target, data.targets[index])
        shown = data.augment.apply(data.images[index], *(drawn[index] for drawn in draws))
        assert torch.equal(pixels(image), shown)
    assert loader.variants == (2 * 25 if name == "crop_flip" else None)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_files_come_as_torchvision_transforms_them_with_their_own_seed(name, files):
    data = files.augmented(name, 16)
    for image, _, index in batches(data):
        for row, i in enumerate(index.tolist()):
            whole = read_pixels(files.paths[i].decode()).permute(2, 0, 1)
            with cpu_seed(mix_seed(5, 2, i + 1)):
                shown = transform_of("crop_flip" if name == "crop_flip" else "resized_crop", 16).transform(whole)
                shown = shown.permute(1, 2, 0)
                shown = apply_policy(name, shown) if name in POLICIES else shown
            assert torch.equal(pixels(image)[row], shown)


@pytest.mark.parametrize("name", ["", *NAMES])
@pytest.mark.parametrize("form", ["memory", "files"])
def test_an_epoch_is_resumed_with_the_same_images_and_views(form, name, files):
    data = array(12) if form == "memory" else files
    data = data.augmented(name, 16) if name else data
    whole = batches(data, views=True)
    assert same(whole[1:], batches(data, start=1, views=True))
    assert same([batch[:3] for batch in whole], batches(data))  # with and without the views
    assert not same(whole, batches(data, epoch=3, views=True))
    for image, _, _, weak, strong in whole:
        assert weak.shape == strong.shape == image.shape
        own, other = (strong, weak) if name in POLICIES else (weak, strong)
        assert torch.equal(own, image) and not torch.equal(other, image)


# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_number_of_workers_does_not_matter(files):
    data = files.augmented("randaugment", 16)
    assert same(batches(data, views=True), batches(data, workers=2, views=True))


@pytest.mark.parametrize("form", ["memory", "files"])
def test_ranks_see_the_images_and_views_of_one_process(form, files):
    data = (array(12) if form == "memory" else files).augmented("trivialaugment", 16)
    whole = batches(data, views=True)
    shares = []
    for rank in range(2):
        loader = data.loader(4, 0, train=True, seed=5).with_views().shard(rank, 2)
        loader.set_epoch(2)
        shares.append(list(loader))
    joined = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*shares)]
    assert same(whole, joined)


def test_the_views_have_crops_of_their_own_and_the_strong_one_a_policy():
    """A policy that does nothing would still leave another crop; of the weak view, the strong one's is not a part."""
    data = array(200)
    loader = data.loader(200, 0, train=True, seed=5).with_views()
    loader.set_epoch(2)
    ((_, _, index, weak, strong),) = loader
    own = CropFlip()
    _, *drawn = loader.draw()
    assert torch.equal(pixels(weak), own.apply(data.images[index], *(d[index] for d in drawn)))
    other = OnTop(own, "fixmatch").draw(200, torch.Generator().manual_seed(mix_seed(5, 2, 1)))
    assert not torch.equal(drawn[0], other[0])
    under = own.apply(data.images[index], *(d[index] for d in other[:3]))
    assert torch.equal(pixels(strong), apply_drawn("fixmatch", under, other[3][index]))


def test_the_views_of_a_file_are_of_one_reading(files):
    read = []

    def counted(path):
        read.append(path)
        return read_pixels(path)

    view = FileView(counted, files.train_view.transform)
    data = ImageFiles(files.paths, files.targets, view, view, MEAN, STD)
    assert same(batches(data, views=True), batches(files, views=True)) and len(read) == 12


class Steps:
    """A view of the user's own that tells its steps."""

    def __init__(self, view):
        self.read, self.transform = view.read, view.transform

    def __call__(self, path):
        return self.transform(self.read(path))


def test_a_view_of_the_users_own_may_tell_its_steps(files):
    view = Steps(FileView(lambda path: read_pixels(path).flip(1), files.train_view.transform))
    data = ImageFiles(files.paths, files.targets, view, view, MEAN, STD)
    assert not same(batches(data), batches(files))
    for name in NAMES:
        expected = FileView(view.read, transform_of("crop_flip" if name == "crop_flip" else "resized_crop", 16))
        changed = data.augmented(name, 16).train_view
        assert changed.read is expected.read and changed.policy == (name if name in POLICIES else "")


def test_a_view_of_the_users_own_gets_a_policy_on_top_and_crops_read_for_themselves(files):
    data = ImageFiles(files.paths, files.targets, lambda path: files.train_view(path), read_pixels, MEAN, STD)
    assert same(batches(data.augmented("randaugment", 16)), batches(files.augmented("randaugment", 16)))
    assert same(batches(data.augmented("crop_flip", 16)), batches(files.augmented("crop_flip", 16)))
    assert same(batches(data, views=True), batches(files, views=True))


@pytest.mark.parametrize("name", NAMES)
def test_views_can_be_sent_to_a_started_worker(name, files):
    view = view_by(name, files.train_view, 16)
    again = pickle.loads(pickle.dumps(view))
    path = files.paths[0].decode()
    with cpu_seed(1):
        shown = view(path)
    with cpu_seed(1):
        assert torch.equal(again(path), shown)


def test_images_held_larger_than_they_are_seen():
    data = array(12, size=24, augment=ResizedCrop(16))
    assert batches(data)[0][0].shape == (4, 3, 16, 16)
    assert batches(data.augmented("randaugment", 16), views=True)[0][3].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_the_setting_chooses_the_augmentation_of_a_data_set(name):
    cfg = load_cfg("configs/digits/vanilla.yaml", ["DATASET.AUGMENT", name, "DATASET.TRAIN_FRACTION", "0.1"])
    train, val, *_ = get_dataset(cfg)
    expected = batch_augment(name, CropFlip(flip=False), 32) if name else CropFlip(flip=False)
    assert train.augment == expected and train.augmentation == name and not val.train
