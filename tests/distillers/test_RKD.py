"""RKD against its equations; exact where samples coincide, more accurate in float32 than the naive form."""

import math
import sys

import pytest
import torch

from mdistiller.distillers.RKD import pdist, rkd_loss

from .oracles.rkd import naive_pdist, naive_rkd_loss


def embeddings(batch, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)


def loops(e_s, e_t):
    """The paper's distance and angle loss, a pair and a triple at a time."""

    def huber(x):
        return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5

    n = len(e_s)
    sums = [0.0, 0.0]
    mean = [sum(math.dist(a, b) for a in e for b in e) / (n * (n - 1)) for e in (e_s, e_t)]
    for i in range(n):
        for j in range(n):
            sums[0] += huber(math.dist(e_s[i], e_s[j]) / mean[0] - math.dist(e_t[i], e_t[j]) / mean[1])
            for k in range(n):
                cosines = []
                for e in (e_s, e_t):
                    to_i, to_k = ([a - b for a, b in zip(e[x], e[j])] for x in (i, k))
                    lengths = math.hypot(*to_i) * math.hypot(*to_k)
                    cosines.append(sum(a * b for a, b in zip(to_i, to_k)) / lengths if lengths else 0.0)
                sums[1] += huber(cosines[0] - cosines[1])
    return sums[0] / n**2, sums[1] / n**3


def test_naive_form_is_the_papers():
    e_s, e_t = embeddings(5, 3), embeddings(5, 4, seed=1)
    distance, angle = loops(e_s.tolist(), e_t.tolist())
    assert naive_rkd_loss(e_s, e_t, distance_weight=2, angle_weight=3).item() == pytest.approx(
        2 * distance + 3 * angle, rel=1e-12
    )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("batch, width_s, width_t", [(2, 1, 3), (3, 5, 2), (7, 4, 9), (13, 1, 1)])
def test_agrees_with_the_naive_form(batch, width_s, width_t, squared):
    e_s, e_t = embeddings(batch, width_s).requires_grad_(), embeddings(batch, width_t, seed=1)
    ours, naive = (loss(e_s, e_t, squared, 1e-12, 7, 11) for loss in (rkd_loss, naive_rkd_loss))
    assert ours.shape == () and ours.item() == pytest.approx(naive.item(), rel=1e-10)
    # On a line all cosines are +-1: their gradient is rounding in either form.
    gradients = [torch.autograd.grad(loss, e_s)[0] for loss in (ours, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(pdist(e_s, squared), naive_pdist(e_s, squared, 1e-12), rtol=1e-7, atol=1e-12)


def test_vertices_in_several_chunks(monkeypatch):
    e_s, e_t = embeddings(7, 4).requires_grad_(), embeddings(7, 9, seed=1)
    whole = rkd_loss(e_s, e_t)
    # Two vertices of 49 at a time. (The package's attribute RKD is the class, not the module.)
    monkeypatch.setattr(sys.modules["mdistiller.distillers.RKD"], "_CHUNK", 100)
    split = rkd_loss(e_s, e_t)
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, e_s)[0] for loss in (split, whole)), rtol=1e-12, atol=1e-15)


def test_by_hand():
    # Student 3-4-5, teacher 1-1-sqrt(2): mean distances 4 and (2 + sqrt(2)) / 3.
    e_s = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    e_t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    mean_t = (2 + 2**0.5) / 3
    differences = (3 / 4 - 1 / mean_t, 4 / 4 - 1 / mean_t, 5 / 4 - 2**0.5 / mean_t)
    distance = sum(0.5 * d * d for d in differences) * 2 / 9
    assert rkd_loss(e_s, e_t, angle_weight=0).item() == pytest.approx(25 * distance, rel=1e-12)
    # The right angle agrees; at the other corners cosines 3/5 and 4/5 against 1/sqrt(2), each twice (i, k and k, i).
    angle = sum(0.5 * (c - 0.5**0.5) ** 2 for c in (0.6, 0.8)) * 2 / 27
    assert rkd_loss(e_s, e_t, distance_weight=0).item() == pytest.approx(50 * angle, rel=1e-12)
    assert pdist(e_s).flatten().tolist() == pytest.approx([0, 3, 4, 3, 0, 5, 4, 5, 0])
    assert pdist(e_s, squared=True)[1, 2].item() == pytest.approx(25)


def test_scaling_and_turning_the_student_changes_nothing():
    e_s, e_t = embeddings(6, 4), embeddings(6, 5, seed=1)
    turn = torch.linalg.qr(embeddings(4, 4, seed=2))[0]
    assert rkd_loss(3 * e_s @ turn + 1, e_t).item() == pytest.approx(rkd_loss(e_s, e_t).item(), rel=1e-11)
    assert rkd_loss(3 * e_s @ turn + 1, e_s).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(squared):
    e_s, e_t = embeddings(5, 3).requires_grad_(), embeddings(5, 4, seed=1)
    assert torch.autograd.gradcheck(lambda e: rkd_loss(e, e_t, squared), e_s)
    assert torch.autograd.gradcheck(lambda e: pdist(e, squared), e_s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_have_finite_gradients_and_no_direction(dtype):
    e_s, e_t = 1000 + embeddings(6, 5, dtype=dtype), embeddings(6, 5, seed=1, dtype=dtype)
    e_s[3] = e_s[1]
    e_t[4] = e_t[0]
    e_s.requires_grad_()
    loss = rkd_loss(e_s, e_t)
    loss.backward()
    assert e_s.grad.isfinite().all() and e_s.grad.abs().max() < 100
    centred = (e_s.detach() - 1000).double(), e_t.double()
    assert loss.item() == pytest.approx(naive_rkd_loss(*centred).item(), rel=1e-5 if dtype == torch.float32 else 1e-10)

    same = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    rkd_loss(same, e_t[:4]).backward()
    assert same.grad.eq(0).all()


def test_more_accurate_in_float32_than_the_naive_form():
    errors = {rkd_loss: [], naive_rkd_loss: []}
    for seed in range(5):
        # Pooled features: positive, far from the origin for their spread, some of them close to each other.
        e_s, e_t = (3 + embeddings(16, 24, seed=10 * seed + i, dtype=torch.float32).relu() for i in range(2))
        e_s[1] = e_s[0] + 1e-3 * embeddings(1, 24, seed=seed)[0]
        exact = naive_rkd_loss(e_s.double(), e_t.double())
        for loss, found in errors.items():
            found.append(abs(loss(e_s, e_t).item() / exact.item() - 1))
    assert max(errors[rkd_loss]) < 1e-7 < max(errors[naive_rkd_loss])


def test_dtypes_and_autocast():
    e_s, e_t = embeddings(6, 8, dtype=torch.bfloat16).requires_grad_(), embeddings(6, 8, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rkd_loss(e_s, e_t)
    loss.backward()
    assert loss.dtype == torch.float32 and e_s.grad.isfinite().all()
    assert loss.item() == pytest.approx(naive_rkd_loss(e_s.double(), e_t.double()).item(), rel=1e-6)
    assert rkd_loss(e_s.float() * 1e18, e_t).isfinite()


def test_maps_are_flattened_and_a_single_sample_has_no_loss():
    f_s, f_t = embeddings(4, 12).view(4, 3, 2, 2), embeddings(4, 2, seed=1)
    assert rkd_loss(f_s, f_t) == rkd_loss(f_s.flatten(1), f_t)
    one = f_s[:1].clone().requires_grad_()
    loss = rkd_loss(one, f_t[:1])
    loss.backward()
    assert loss.item() == 0 and one.grad.eq(0).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"student's has 3 samples, the teacher's 4"):
        rkd_loss(embeddings(3, 2), embeddings(4, 2))
    with pytest.raises(ValueError, match="eps must be positive, it is 0"):
        rkd_loss(embeddings(3, 2), embeddings(3, 2), eps=0)
