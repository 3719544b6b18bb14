"""What the original's data modules offer besides loaders."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from mdistiller.dataset import cifar100, imagenet, in_memory, tiny_imagenet
from mdistiller.dataset._original import dataloaders_with_negatives


def picture(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("transform, size, shape", [
    (cifar100.get_cifar100_train_transform(), 32, (3, 32, 32)),
    (cifar100.get_cifar100_test_transform(), 32, (3, 32, 32)),
    (imagenet.get_imagenet_train_transform([0.5] * 3, [0.25] * 3), 300, (3, 224, 224)),
    (imagenet.get_imagenet_test_transform(), 300, (3, 224, 224)),
])  # fmt: skip
def test_transforms_take_pil_images(transform, size, shape):
    image = transform(picture(size))
    assert image.shape == shape and image.dtype == torch.float32


def test_the_test_transform_gives_what_the_loader_gives():
    image = picture(32)
    normalize = in_memory.Normalize(cifar100.MEAN, cifar100.STD, pixels=32 * 32)
    ours = normalize(torch.from_numpy(np.array(image))[None])[0]
    assert torch.equal(cifar100.get_cifar100_test_transform()(image), ours)


def test_imagenets_test_transform_is_pillows():
    to_input = (T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = T.Compose([T.Resize(256), T.CenterCrop(224), *to_input])(picture(300))
    torch.testing.assert_close(imagenet.get_imagenet_test_transform()(picture(300)), expected)


def test_loaders_with_negatives_yield_the_image_itself_then_images_of_other_classes():
    train, val, count = dataloaders_with_negatives("digits", 50, 100, 0, 7)
    assert count == len(train.targets) and len(train) == -(-count // 50)
    seen = []
    for image, target, index, contrastive in train:
        assert image.shape[1:] == (3, 32, 32) and contrastive.shape == (len(index), 8)
        assert torch.equal(contrastive[:, 0], index)
        assert (train.targets[contrastive[:, 1:]] != target[:, None]).all()
        seen += index.tolist()
    assert sorted(seen) == list(range(count))
    assert len(next(iter(val))) == 2


def test_negatives_continue_from_any_batch():
    train, *_ = dataloaders_with_negatives("digits", 50, 100, 0, k=7, mode="relax")
    train.set_epoch(2)
    whole = list(train)
    rest = list(train.iter_from(20))
    assert len(rest) == len(whole) - 20
    assert all(torch.equal(a, b) for one, other in zip(rest, whole[20:]) for a, b in zip(one, other))


def test_every_data_set_has_them():
    assert cifar100.get_cifar100_dataloaders_sample.args == ("cifar100",)
    assert imagenet.get_imagenet_dataloaders_sample.args == ("imagenet",)
    assert tiny_imagenet.get_tinyimagenet_dataloader_sample.args == ("tiny_imagenet",)
