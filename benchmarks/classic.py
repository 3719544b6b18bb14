"""The classic path: a distillation trainer as usually written, the baseline of the benchmarks.

A DataLoader augments image by image with PIL; tensors are NCHW; everything runs eagerly in float32; the teacher is not
folded; the host reads loss and accuracy at every step. The losses are the package's own, so that the ratio compares
only the code around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from mdistiller.dataset.in_memory import ImageArray

FIELDS = ("image", "target", "index", "contrastive_index")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ClassicImages(Dataset[tuple[Any, ...]]):
    """Images in memory, augmented one by one with PIL; with `negatives` > 0 also CRD's negatives, drawn per image."""

    def __init__(self, data: ImageArray, negatives: int = 0) -> None:
        self.images, self.targets = data.images.numpy(), data.targets.numpy()
        self.transform = T.Compose(
            [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(data.mean, data.std)]
        )
        self.negatives = negatives
        classes = range(int(self.targets.max()) + 1)
        self.others = [np.flatnonzero(self.targets != c) for c in classes] if negatives else []

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.transform(Image.fromarray(self.images[index]))
        target = int(self.targets[index])
        if not self.negatives:
            return image, target, index
        others = self.others[target]
        drawn = np.random.choice(others, self.negatives, replace=self.negatives > len(others))
        return image, target, index, np.hstack(([index], drawn))


def cifar_loader(data: ImageArray, batch: int, workers: int, negatives: int = 0) -> DataLoader[Any]:
    """Training batches (image, target, index), with `negatives` also (contrastive_index)."""
    return DataLoader(ClassicImages(data, negatives), batch, shuffle=True, num_workers=workers)


def imagenet_loader(folder: Path, images: int, batch: int, workers: int, train: bool) -> DataLoader[Any]:
    """Batches (image, target) of the first `images` images below the class folders in `folder`."""
    to_input = T.ToTensor(), T.Normalize(*IMAGENET)
    if train:
        transform = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *to_input])
    else:
        transform = T.Compose([T.Resize(256), T.CenterCrop(224), *to_input])
    data = Subset(ImageFolder(str(folder), transform), range(images))
    return DataLoader(data, batch, shuffle=train, num_workers=workers, pin_memory=torch.cuda.is_available())


class ClassicTrainer:
    """Runs training steps, with the meters on the host.

    Args:
        distiller: student, teacher and loss, used as built.
        lr, momentum, weight_decay: of plain SGD.
    """

    def __init__(
        self, distiller: nn.Module, lr: float, momentum: float, weight_decay: float, device: torch.device
    ) -> None:
        self.distiller: Any = distiller.to(device)
        self.device = device
        self.optimizer = torch.optim.SGD(
            self.distiller.get_learnable_parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        self.losses: list[float] = []
        self.top1: list[float] = []
        self.top5: list[float] = []
        self.distiller.train()

    def train_iter(self, batch: Sequence[Tensor], epoch: int) -> None:
        """One step on a batch of the loader."""
        fields = {name: tensor.to(self.device, non_blocking=True) for name, tensor in zip(FIELDS, batch)}
        self.optimizer.zero_grad()
        logits, losses = self.distiller(**fields, epoch=epoch)
        loss = sum(term.mean() for term in losses.values())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        for k, meter in ((1, self.top1), (5, self.top5)):
            meter.append(accuracy(logits, fields["target"], k))


def accuracy(logits: Tensor, target: Tensor, k: int) -> float:
    """Percent of the targets among the k highest logits."""
    hits = logits.topk(k, 1).indices.t().eq(target.view(1, -1))
    return hits.reshape(-1).float().sum().item() * 100 / len(target)
