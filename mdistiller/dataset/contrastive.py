"""Positives and negatives for contrastive distillation, on any data set whose labels are known."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..registry import unknown_name
from .batch import to_device

MODES = ("exact", "relax")


class ContrastiveSampler:
    """Draws, for each image of a batch, one positive and K negatives among the training images.

    The positive is the image itself (mode "exact") or a uniform draw from the images of its class, itself included
    ("relax"). The negatives are drawn uniformly from the images of the other classes, without replacement; with
    replacement where there are fewer than K of them. Their order within a row carries no meaning.

    Every row is drawn from its own generator, seeded by (seed, epoch, index): rows are independent, a row does not
    depend on its batch, and a resumed run draws the same as an uninterrupted one without saved state (within one NumPy
    release: its streams may change between releases).

    Args:
        targets: (N,) integers, the class of each training image; a tensor, an array or a list.
        k: K >= 1.
        mode: "exact" or "relax".
        seed: of all the draws, >= 0.

    Raises:
        UserError: an unknown mode, K < 1, or targets of fewer than two classes.

    Cost: O(N) memory. A batch of 64 at K = 16384 takes 13 ms on two threads of an AMD EPYC at N = 50,000, 20 ms at
    1,281,167. An `index` on a GPU forces a synchronisation; `batch.host_index` gives one on the CPU.
    """

    def __init__(self, targets: Tensor | np.ndarray | list[int], k: int, mode: str = "exact", seed: int = 0) -> None:
        if mode not in MODES:
            raise unknown_name("CRD.MODE", mode, MODES)
        if k < 1:
            raise UserError(f"CRD.NCE.K must be a whole number >= 1, not {k!r}")
        known = np.asarray(targets)
        if known.ndim != 1:
            raise UserError(f"the training loader's targets must be (N,) labels, their shape is {known.shape}")
        classes, labels, sizes = np.unique(known, return_inverse=True, return_counts=True)
        if len(classes) < 2:
            raise UserError(f"CRD draws negatives from other classes, but the training set has {len(classes)}")
        self.k, self.mode, self.seed = k, mode, seed
        self.device = torch.device("cpu")
        self._labels = labels.astype(np.min_scalar_type(len(classes)))
        self._sizes = sizes
        # Images sorted by class, repeated twice: those of class c are order[starts[c] : starts[c] + sizes[c]], and
        # those of all other classes follow them.
        self._order = np.tile(np.argsort(labels, kind="stable"), 2)
        self._starts = np.cumsum(sizes) - sizes

    def to(self, device: torch.device | str) -> ContrastiveSampler:
        """Return the draws on `device` from now on; they are still made on the CPU. Returns self."""
        self.device = torch.device(device)
        return self

    def __call__(self, index: Tensor, epoch: int) -> Tensor:
        """contrastive_index (B, K + 1) int64 of the images `index` (B,): the positive, then the negatives."""
        return self.begin(index, epoch)()

    def begin(self, index: Tensor, epoch: int) -> Callable[[], Tensor]:
        """Draw in other threads from now on; the returned function waits for the draws and returns them."""
        images = index.tolist()
        if images and not 0 <= min(images) <= max(images) < len(self._labels):
            raise UserError(
                f"a batch's index goes from {min(images)} to {max(images)}, but negatives are drawn from the labels of "
                f"{len(self._labels)} images; let the loader's `targets` be those of all images, as `index` counts them"
            )
        drawn = torch.empty((len(images), self.k + 1), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        rows = drawn.numpy()
        # NumPy releases the GIL while it draws, so the threads run in parallel.
        threads = max(1, min(torch.get_num_threads(), len(images)))
        pool = ThreadPoolExecutor(threads)
        shares = [pool.submit(self._fill, rows[t::threads], images[t::threads], epoch) for t in range(threads)]
        pool.shutdown(wait=False)  # its threads end with their shares

        def finish() -> Tensor:
            for share in shares:
                share.result()
            return to_device(drawn, self.device)

        return finish

    def _fill(self, rows: np.ndarray, images: list[int], epoch: int) -> None:
        for row, image in zip(rows, images):
            rng = np.random.Generator(np.random.PCG64((self.seed, epoch, image)))
            label = self._labels[image]
            start, size = self._starts[label], self._sizes[label]
            row[0] = image if self.mode == "exact" else self._order[start + rng.integers(size)]
            others = len(self._labels) - size
            place = rng.choice(others, self.k, replace=self.k > others, shuffle=False)
            np.take(self._order[start + size :], place, out=row[1:], mode="clip")  # mode "raise" would buffer `out`
