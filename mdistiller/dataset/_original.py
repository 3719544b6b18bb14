"""What the original's data modules offer besides loaders: transforms, loaders with CRD's negatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torchvision import transforms

from ._base import Loader, get_dataloaders
from .contrastive import ContrastiveSampler


class LoaderWithNegatives:
    """A training loader whose batches end with contrastive_index (B, K + 1), as the original's `_sample` loaders.

    In all else it is the loader that it wraps.
    """

    def __init__(self, loader: Loader, sampler: ContrastiveSampler) -> None:
        self.loader, self.sampler = loader, sampler
        self.fields = (*loader.fields, "contrastive_index")

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[tuple[Tensor, ...]]:
        """The rest of an epoch, see `Loader.iter_from`."""
        batches = self.loader.iter_from(batch)
        epoch = self.loader.epoch
        return ((*fields, self.sampler(fields[2], epoch)) for fields in batches)

    def to(self, device: Any) -> LoaderWithNegatives:
        """Yield the batches on `device` from now on; returns self."""
        self.loader.to(device)
        self.sampler.to(device)
        return self

    def shard(self, rank: int, world: int) -> LoaderWithNegatives:
        """Yield only the share of process `rank` of `world` from now on; returns self."""
        self.loader.shard(rank, world)
        return self


def dataloaders_with_negatives(
    name: str, batch_size: int, val_batch_size: int, num_workers: int, k: int = 4096, mode: str = "exact",
    **options: Any,
) -> tuple[LoaderWithNegatives, Loader, int]:  # fmt: skip
    """`get_dataloaders`, with K = `k` negatives for each training image; `mode` is CRD.MODE.

    The trainer needs no such loader: it draws the negatives itself where the method needs them.

    Args:
        options: other arguments of `get_dataloaders`.
    """
    train, val, count = get_dataloaders(name, batch_size, val_batch_size, num_workers, **options)
    sampler = ContrastiveSampler(train.targets, k, mode, options.get("seed", 0))
    return LoaderWithNegatives(train, sampler), val, count


def to_normalized(mean: Sequence[float], std: Sequence[float], *before: Any) -> transforms.Compose:
    """A transform from PIL images to normalised tensors (3, H, W), after the transforms `before`."""
    return transforms.Compose([*before, transforms.ToTensor(), transforms.Normalize(mean, std)])
