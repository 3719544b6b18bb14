"""Distances of classes, 1 - CKA, against plain loops; a hand-worked case; the files."""

import math

import pytest
import torch

from mdistiller.errors import UserError
from mdistiller.grouping import class_distances, load_distances, save_distances


def naive_hsic(x, y):
    """Sum over pairs of images of the products of both centred kernels' entries; x and y are lists of b vectors."""
    b = len(x)

    def kernel(v):
        mean = [sum(row[k] for row in v) / b for k in range(len(v[0]))]
        centred = [[a - m for a, m in zip(row, mean)] for row in v]
        return [[sum(p * q for p, q in zip(r, s)) for s in centred] for r in centred]

    of_x, of_y = kernel(x), kernel(y)
    return sum(of_x[m][n] * of_y[m][n] for m in range(b) for n in range(b))


@pytest.mark.parametrize("per_class, used", [(256, 3), (2, 2)])
def test_agrees_with_the_naive_form(per_class, used):
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1, 2, 1])  # class 0 has three images, class 1 four
    features = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    distances = class_distances(features, targets, per_class)
    of_class = [features[targets == c][:used].tolist() for c in range(3)]
    for i in range(3):
        for j in range(3):
            x, y = of_class[i], of_class[j]
            cka = naive_hsic(x, y) / math.sqrt(naive_hsic(x, x) * naive_hsic(y, y))
            assert distances[i, j].item() == pytest.approx(1 - cka, rel=1e-9, abs=1e-12)


def test_by_hand():
    # Two images of each class. Centred kernels are multiples of (1, -1; -1, 1), so that every CKA is 1; a class whose
    # features are all equal has none.
    features = torch.tensor([[0.0, 0], [1, 0], [5, 5], [5, 9], [3, 3], [3, 3]])
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = [[0.0, 0, 1], [0, 0, 1], [1, 1, 0]]
    torch.testing.assert_close(class_distances(features, targets), torch.tensor(expected))


@pytest.mark.parametrize("name", ["d.npy", "d.json"])
def test_files(tmp_path, name):
    distances = class_distances(torch.randn(30, 5, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3)
    save_distances(tmp_path / "new" / name, distances)
    assert load_distances(str(tmp_path / "new" / name), "WKD.COST_MATRIX").float().equal(distances)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="class 1 has 1 images"):
        class_distances(torch.randn(3, 2), torch.tensor([0, 0, 1]))
    with pytest.raises(UserError, match=r"not as 'd\.csv'"):
        save_distances(tmp_path / "d.csv", torch.zeros(2, 2))
