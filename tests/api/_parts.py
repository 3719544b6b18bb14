"""What a user brings: two small bare networks, and loaders of random images of five classes."""

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES, SIZE = 5, 8


def net(width=4, seed=0):
    """images (B, 3, H, W) -> logits (B, 5); no features."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES),
    )  # fmt: skip


class Featured(nn.Module):
    """A network that already returns (logits, features by name)."""

    def __init__(self, width=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, CLASSES)

    def forward(self, image):
        maps = self.conv(image)
        pooled = maps.relu().mean((2, 3))
        feats, preacts = [image, maps.relu()], [image, maps]
        return self.fc(pooled), {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}


def data(count=24, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    images = torch.randn(count, 3, size, size, generator=generator) + targets[:, None, None, None] / 2
    return TensorDataset(images, targets)


def loaders(count=24, batch_size=8, size=SIZE, **options):
    both = data(count, size)
    return DataLoader(both, batch_size, shuffle=True, **options), DataLoader(both, 12)


class Listed(Dataset):
    """Items as a function of (image, target) makes them."""

    def __init__(self, make, count=24):
        self.base, self.make = data(count), make

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        return self.make(*self.base[index])


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
