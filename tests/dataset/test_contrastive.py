"""The sampler's draws: which images may be drawn, how often, and what the draws depend on."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from mdistiller.dataset.contrastive import ContrastiveSampler
from mdistiller.errors import UnknownNameError, UserError

TARGETS = torch.tensor([2, 0, 1, 0, 2, 0, 1, 2, 2, 0])  # classes of 4, 2 and 4


# A class of 1,000 images: their rows are 1,000 draws from the same 8 images of other classes.
CROWD, OTHERS = torch.tensor([0] * 1000 + [1, 2] * 4), 8


def draws(k: int, mode: str = "exact", epochs: int = 4, seed: int = 1) -> np.ndarray:
    """(epochs * 1000, K + 1): the rows of the crowd; entry 1000 + i is the i-th of the others."""
    sampler = ContrastiveSampler(CROWD, k, mode, seed)
    return torch.cat([sampler(torch.arange(1000), epoch) for epoch in range(epochs)]).numpy()


@pytest.mark.parametrize("mode", ["exact", "relax"])
@pytest.mark.parametrize("k", [1, 5, 6, 8, 50])
def test_which_images_are_drawn(mode, k):
    index = torch.arange(10)
    for epoch in range(20):
        rows = ContrastiveSampler(TARGETS, k, mode)(index, epoch)
        assert rows.shape == (10, k + 1) and rows.dtype == torch.int64
        classes = TARGETS[rows]
        assert torch.equal(classes[:, 0], TARGETS)
        if mode == "exact":
            assert torch.equal(rows[:, 0], index)
        assert (classes[:, 1:] != TARGETS[:, None]).all()
        for row, label in zip(rows[:, 1:].tolist(), TARGETS.tolist()):
            others = sum(t != label for t in TARGETS.tolist())
            if k <= others:
                assert len(set(row)) == k, "drawn without replacement"


def chi_square(observed: np.ndarray, expected: float, variance_share: float, freedom: int) -> float:
    """p-value of counts that each have variance expected * variance_share and together `freedom` degrees of freedom."""
    return float(stats.chi2.sf(((observed - expected) ** 2).sum() / (expected * variance_share), freedom))


def test_every_negative_is_equally_likely():
    """3 are drawn of 8: each is in 3/8 of the rows.

    Counts of a draw of k out of m have covariance n k/m (1 - k/m) (I - 1/m) m/(m - 1): m - 1 degrees of freedom.
    """
    rows, k, m = 4000, 3, OTHERS
    counts = np.bincount(draws(k)[:, 1:].ravel() - 1000, minlength=m)
    assert counts.sum() == rows * k
    assert 0.001 < chi_square(counts, rows * k / m, (1 - k / m) * m / (m - 1), m - 1) < 0.999


def test_every_set_of_negatives_is_equally_likely():
    """All 56 triples out of 8, hence all pairs too: 56 - 1 degrees of freedom."""
    drawn = np.sort(draws(3, epochs=6, seed=2)[:, 1:], axis=1) - 1000
    triples = list(itertools.combinations(range(OTHERS), 3))
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert {tuple(t) for t in found.tolist()} == set(triples)
    assert 0.001 < chi_square(counts, 6000 / len(triples), 1.0, len(triples) - 1) < 0.999


def test_rows_of_one_batch_are_independent():
    """The single negatives of neighbours in a batch: all 8 x 8 pairs are equally likely, 64 - 1 degrees of freedom."""
    pairs = draws(1, epochs=8, seed=3)[:, 1].reshape(-1, 2) - 1000
    counts = np.bincount(pairs @ [OTHERS, 1], minlength=64)
    assert 0.001 < chi_square(counts, len(pairs) / 64, 1.0, 63) < 0.999


def test_epochs_are_independent():
    """The same for one image in two consecutive epochs."""
    pairs = draws(1, epochs=8, seed=4)[:, 1].reshape(4, 2, 1000).swapaxes(1, 2).reshape(-1, 2) - 1000
    counts = np.bincount(pairs @ [OTHERS, 1], minlength=64)
    assert 0.001 < chi_square(counts, len(pairs) / 64, 1.0, 63) < 0.999


def test_relax_positives_and_negatives_with_replacement_are_uniform():
    """Mode relax: the positive is any of its own 1,000, itself included. K = 40 of 8: each negative 5 times a row."""
    rows = draws(40, "relax", epochs=2, seed=5)
    assert stats.chisquare(np.histogram(rows[:, 0], bins=20, range=(0, 1000))[0]).pvalue > 0.001
    counts = np.bincount(rows[:, 1:].ravel() - 1000)
    assert stats.chisquare(counts).pvalue > 0.001
    own = (rows[:, 0].reshape(2, 1000) == np.arange(1000)).mean()
    assert own < 0.01  # 1/1000 expected


def test_large_and_sparse_draws_are_uniform():
    """NumPy draws few out of many and many out of few by different algorithms; both are tested."""
    targets = np.arange(60_000) % 3
    for k in (300, 16_384):
        sampler = ContrastiveSampler(targets, k, seed=5)
        drawn = torch.cat([sampler(torch.arange(4), epoch)[:, 1:].flatten() for epoch in (0, 1)])
        counts = np.histogram(drawn, bins=20, range=(0, 60_000))[0]
        assert stats.chisquare(counts).pvalue > 0.001


def test_a_row_depends_only_on_seed_epoch_and_image():
    sampler = ContrastiveSampler(TARGETS, 5, "relax", seed=6)
    whole = sampler(torch.arange(10), 3)
    # Not on the batch, the other calls, the number of threads or the process.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sampler(torch.tensor([7, 2, 7]), 3), whole[[7, 2, 7]])
        torch.set_num_threads(3)
        assert torch.equal(pickle.loads(pickle.dumps(sampler))(torch.arange(10), 3), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(sampler(torch.arange(10), 4), whole)
    assert not torch.equal(ContrastiveSampler(TARGETS, 5, "relax", seed=7)(torch.arange(10), 3), whole)


def test_any_labels_and_devices():
    """Labels need not be 0..C-1 nor a tensor; the draws are returned on the chosen device."""
    sampler = ContrastiveSampler([7, 7, -3, 7], 1).to("meta")
    assert sampler(torch.tensor([0]), 1).device.type == "meta"
    assert sampler.to("cpu")(torch.tensor([0, 1, 3]), 1).tolist() == [[0, 2], [1, 2], [3, 2]]


def test_memory_is_linear_in_the_number_of_samples():
    sampler = ContrastiveSampler(np.arange(100_000) % 10, 16)
    assert len(pickle.dumps(sampler)) < 20 * 100_000  # two int64 a sample


def test_bad_arguments_are_refused():
    with pytest.raises(UnknownNameError, match=r"CRD.MODE 'exakt'; did you mean exact"):
        ContrastiveSampler(TARGETS, 5, "exakt")
    with pytest.raises(UserError, match="other classes, but the training set has 1"):
        ContrastiveSampler([3, 3], 5)
    with pytest.raises(UserError, match=r"CRD.NCE.K must be a whole number >= 1, not 0"):
        ContrastiveSampler(TARGETS, 0)
