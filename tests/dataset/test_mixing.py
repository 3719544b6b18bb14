"""MixUp, CutMix and erasing of batches: torchvision's results on the same draws, its distributions, draws by index."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from mdistiller.dataset.batch import HostIndex, with_host_index
from mdistiller.dataset.boxes import UNIFORMS, inside, random_boxes
from mdistiller.dataset.mixing import Erasing, Mixing

CLASSES = 5


def batch(count=6, size=16, start=0):
    generator = torch.Generator().manual_seed(count)
    image = torch.randn(count, 3, size, size, generator=generator)
    image = image.contiguous(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (count,), generator=generator)
    return {"image": image, "target": target, "index": torch.arange(start, start + count)}


def soft(fields):
    """The distribution over the classes (B, C) of a mixed batch."""
    share = fields["target_share"][:, None]
    first, second = (torch.eye(CLASSES)[fields[name]] for name in ("target", "mixed_target"))
    return share * first + (1 - share) * second


def by_torchvision(transform, fields, **params):
    """Images and soft labels of the whole batch by a transform of torchvision with these draws."""
    params |= {"labels": fields["target"], "batch_size": len(fields["target"])}
    return transform.transform(fields["image"], params), transform.transform(fields["target"], params)


def test_mixed_images_are_those_of_torchvision_on_the_same_draws():
    mixing, plain = Mixing(0.8, 0, seed=3), batch()
    drawn = mixing.drawn(plain["index"], 2, 16, 16)
    mixed = mixing(plain, 2)
    for row, share in enumerate(drawn[:, 0].tolist()):
        image, label = by_torchvision(v2.MixUp(num_classes=CLASSES), plain, lam=share)
        torch.testing.assert_close(mixed["image"][row], image[row], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(soft(mixed)[row], label[row], rtol=1e-6, atol=1e-6)
    assert drawn[:, 0].min() > 0 and drawn[:, 0].max() < 1 and len(set(drawn[:, 0])) == 6


def test_cut_images_are_those_of_torchvision_on_the_same_draws_bit_for_bit():
    mixing, plain = Mixing(0, 1.0, seed=3), batch(12)
    drawn = mixing.drawn(plain["index"], 2, 16, 16)
    mixed = mixing(plain, 2)
    for row, (_, share, top, left, rows, columns) in enumerate(drawn.tolist()):
        box = [int(end) for end in (left, top, left + columns, top + rows)]
        image, label = by_torchvision(v2.CutMix(num_classes=CLASSES), plain, box=box, lam_adjusted=share)
        assert torch.equal(mixed["image"][row], image[row])
        torch.testing.assert_close(soft(mixed)[row], label[row], rtol=1e-6, atol=1e-6)
        assert share == pytest.approx(1 - rows * columns / 256)
    assert (drawn[:, 4] > 0).sum() > 6


@pytest.mark.parametrize("alphas", [(0.4, 0), (0, 1.0), (0.4, 1.0)])
def test_the_label_is_that_of_the_larger_share_and_nothing_else_changes(alphas):
    plain = batch(64) | {"other": torch.arange(64)}
    before = {name: field.clone() for name, field in plain.items()}
    mixed = Mixing(*alphas, seed=0)(plain, 1)
    assert all(torch.equal(plain[name], before[name]) for name in plain)
    assert all(torch.equal(mixed[name], before[name]) for name in ("index", "other"))
    assert mixed["target_share"].dtype == torch.float32 and mixed["target"].dtype == torch.int64
    assert mixed["target_share"].min() >= 0.5 and mixed["target_share"].max() <= 1
    pairs = {tuple(sorted(pair)) for pair in zip(mixed["target"].tolist(), mixed["mixed_target"].tolist())}
    labels = plain["target"].tolist()
    assert pairs == {tuple(sorted(pair)) for pair in zip(labels, [labels[-1], *labels])}
    assert (mixed["target"] != plain["target"]).any()
    assert mixed["image"].is_contiguous(memory_format=torch.channels_last)


def rows_of(mixing, count, size=16, epoch=1):
    return mixing.drawn(torch.arange(count), epoch, size, size)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_of_the_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    shares = rows_of(Mixing(alpha, 0, seed=1), 20_000)[:, 0]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_an_alpha_near_zero_or_beyond_all_bounds_gives_shares():
    assert set(rows_of(Mixing(1e-300, 0, seed=1), 100)[:, 0]) == {0.0, 1.0}
    assert np.allclose(rows_of(Mixing(1e308, 0, seed=1), 100)[:, 0], 0.5)


def test_where_both_are_on_each_image_takes_one_of_the_two():
    rows = rows_of(Mixing(0.8, 1.0, seed=1), 10_000)
    cut = rows[:, 0] == 1
    assert abs(cut.mean() - 0.5) < 0.02  # four standard deviations
    assert (rows[~cut, 2:] == 0).all() and (rows[cut, 4] > 0).mean() > 0.9


def test_cut_boxes_are_distributed_as_torchvisions():
    stats = pytest.importorskip("scipy.stats")
    ours = rows_of(Mixing(0, 1.0, seed=1), 4000, size=32)
    torch.manual_seed(0)
    transform = v2.CutMix(num_classes=CLASSES)
    theirs = [transform.make_params([torch.zeros(2, 3, 32, 32)]) for _ in range(4000)]
    for own, other in (
        (ours[:, 1], [p["lam_adjusted"] for p in theirs]),
        (ours[:, 2], [p["box"][1] for p in theirs]),
        (ours[:, 3] + ours[:, 5], [p["box"][2] for p in theirs]),
    ):
        assert stats.ks_2samp(own, other).pvalue > 0.001


def test_erased_images_are_those_of_torchvision_on_the_same_draws():
    erasing, plain = Erasing(0.7, seed=3), batch(32)
    plain |= {"image_weak": plain["image"] + 1, "image_strong": plain["image"] - 1}
    drawn = rows_of(erasing, 32, epoch=2)
    erased = erasing(plain, 2)
    for row, (top, left, rows, columns) in enumerate(drawn.tolist()):
        params = {"i": top, "j": left, "h": rows, "w": columns, "v": torch.zeros(3, 1, 1)}
        for name in ("image", "image_strong"):
            assert torch.equal(erased[name][row], v2.RandomErasing().transform(plain[name][row], params))
    assert torch.equal(erased["image_weak"], plain["image_weak"])
    assert 16 < (drawn[:, 2] > 0).sum() < 30


def test_erased_rectangles_are_distributed_as_torchvisions():
    stats = pytest.importorskip("scipy.stats")
    drawn = rows_of(Erasing(0.25, seed=1), 10_000, size=32)
    erased = drawn[drawn[:, 2] > 0]
    assert abs(len(erased) / 10_000 - 0.25) < 0.02
    torch.manual_seed(0)
    transform = v2.RandomErasing()
    theirs = [transform.make_params([torch.zeros(3, 32, 32)]) for _ in range(2500)]
    for place, name in enumerate("ijhw"):
        assert stats.ks_2samp(erased[:, place], [p[name] for p in theirs]).pvalue > 0.001, name


@pytest.mark.parametrize("make", [lambda: Mixing(0.4, 1.0, seed=5), lambda: Erasing(0.5, seed=5)])
def test_draws_depend_on_seed_epoch_and_index_alone(make):
    whole = rows_of(make(), 40_000)  # more than are made at once
    other = make()
    index = torch.tensor([39_999, 3, 17_000, 3])
    expected = whole[index.numpy()]
    assert np.array_equal(other.drawn(index[1:2], 1, 16, 16), expected[1:2])  # few first, then more
    assert np.array_equal(other.drawn(index, 1, 16, 16), expected)
    assert not np.array_equal(other.drawn(index, 2, 16, 16), expected)
    assert np.array_equal(other.drawn(index, 1, 16, 16), expected)


def test_a_rank_mixes_its_slice_as_one_process_mixes_the_batch():
    """But for the first image of the slice, which takes in the slice's last image."""
    plain = batch(8)
    slices = [{name: field[start : start + 4] for name, field in plain.items()} for start in (0, 4)]
    whole = Mixing(0.4, 1.0, seed=5)(plain, 1)
    for start, own in zip((0, 4), (Mixing(0.4, 1.0, seed=5)(part, 1) for part in slices)):
        for name in ("image", "target", "mixed_target", "target_share"):
            assert torch.equal(own[name][1:], whole[name][start + 1 : start + 4]), name


def test_what_the_cpu_knows_of_the_index_is_read():
    plain = batch()
    index = plain["index"]
    hidden = plain | {"index": with_host_index(torch.zeros(6, dtype=torch.int64), HostIndex(index, index[:0]))}
    assert torch.equal(Mixing(0.4, 0, seed=1)(hidden, 1)["image"], Mixing(0.4, 0, seed=1)(plain, 1)["image"])


def test_the_first_rectangle_that_fits_by_hand():
    """Of 10 x 20 pixels: the first attempt, of all and as wide as high, would be 14 x 14; the second is 4 x 4."""
    uniform = torch.zeros(1, UNIFORMS, dtype=torch.float64)
    uniform[0, 0] = 1.0  # its area, of 0.08 to 1
    uniform[0, 10:20] = 0.5  # ratio 1
    uniform[0, -2:] = torch.tensor([0.99, 0.5])
    box, found = random_boxes(uniform, 10, 20, (0.08, 1.0), (0.5, 2.0), smaller=False)
    assert box.tolist() == [[6, 8, 4, 4]] and found.tolist() == [True]
    mask = inside(box, 10, 20)
    assert mask.shape == (1, 1, 10, 20) and mask.sum() == 16 and mask[0, 0, 6:10, 8:12].all()
    uniform[0, :10] = 1.0
    assert random_boxes(uniform, 10, 20, (0.08, 1.0), (0.5, 2.0), smaller=False)[1].tolist() == [False]
