"""SEMCKD against its equations: loops over maps and images; batches that are short, too large, or spread over ranks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from yacs.config import CfgNode as CN

from mdistiller.distillers import SemCKD, method_defaults
from mdistiller.distillers.SemCKD import (
    CrossLayerAttention,
    map_distance,
    regressor_name,
    semantic_attention,
    semckd_loss,
    similarities,
)
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.modes import check_modes
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal


def naive_loss(layers, maps_s, maps_t, size, soft):
    """sum over b, i, j of the softmax of the products of queries and keys, times mean squared differences."""

    def unit(layer, x):
        rows = []
        for b in range(len(x)):
            row = [float((x[b] * x[k]).sum()) if k < len(x) else 0.0 for k in range(size)]
            hidden = F.relu(layer.linear1(torch.tensor(row, dtype=x.dtype)))
            out = layer.linear2(hidden)
            rows.append(out / out.square().sum().sqrt())
        return rows

    queries = [unit(getattr(layers, f"query_{i}"), x) for i, x in enumerate(maps_s)]
    keys = [unit(getattr(layers, f"key_{j}"), x) for j, x in enumerate(maps_t)]
    images = len(maps_s[0])
    total = 0.0
    for i, x in enumerate(maps_s):
        taught = []
        for j, t in enumerate(maps_t):
            side = min(x.shape[-1], t.shape[-1])
            own = F.avg_pool2d(x, x.shape[-1] // side)
            goal = F.avg_pool2d(t, t.shape[-1] // side)
            regressed = getattr(layers, f"regressor{i}{j}").regressor(own)
            taught.append([(regressed[b] - goal[b]).square().mean() for b in range(images)])
        for b in range(images):
            products = torch.stack([(queries[i][b] * keys[j][b]).sum() for j in range(len(maps_t))]) / soft
            weights = products.exp() / products.exp().sum()
            total = total + sum(weights[j] * taught[j][b] for j in range(len(maps_t)))
    return total / images / len(maps_s)


@pytest.mark.parametrize("images", [8, 5, 1])
@pytest.mark.parametrize("soft", [1.0, 0.3])
def test_agrees_with_loops_over_maps_and_images(images, soft):
    """Also in a batch of five images or one, of layers for eight."""
    torch.manual_seed(0)
    layers = CrossLayerAttention([3, 5], [4, 2, 6], 8, soft).double()
    maps_s = [normal(images, 3, 8, 8, seed=1), normal(images, 5, 2, 2, seed=2)]
    maps_t = [normal(images, 4, 4, 4, seed=3), normal(images, 2, 2, 2, seed=4), normal(images, 6, 8, 8, seed=5)]
    twin = copy.deepcopy(layers)  # BatchNorm's statistics of both are those of the same batch
    loss = semckd_loss(*layers(maps_s, maps_t))
    assert loss.item() == pytest.approx(naive_loss(twin, maps_s, maps_t, 8, soft).item(), rel=1e-9)


def test_by_hand():
    """One image, one student map: products 1 and -1, so a = (e^2, 1) / (e^2 + 1) = (0.8808, 0.1192); d2 = (2, 4)."""
    queries, keys = torch.ones(1, 1, 1), torch.tensor([[[1.0], [-1.0]]])
    attention = semantic_attention(queries, keys, 1.0)
    assert attention.flatten().tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)
    assert semckd_loss(attention, torch.tensor([[[2.0, 4.0]]])).item() == pytest.approx(2.238406, abs=1e-5)
    assert map_distance(torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1, 2)).tolist() == [5.0]
    assert similarities(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 4).tolist() == [[5, 3, 0, 0], [3, 9, 0, 0]]


def test_agrees_with_its_definition_in_value_and_gradient():
    def naive(distances, attention):
        terms = [
            attention[b, i, j] * distances[b, i, j]
            for b in range(3) for i in range(2) for j in range(4)
        ]  # fmt: skip
        return sum(terms) / 6

    attention = normal(3, 2, 4).softmax(2)
    check_agrees(lambda d, a: semckd_loss(a, d), naive, normal(3, 2, 4, seed=1).square(), attention)


def test_gradcheck():
    queries, keys = normal(2, 2, 3).requires_grad_(), normal(2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: semantic_attention(q, k, 0.7), (queries, keys))
    maps = normal(3, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: similarities(x, 5), maps)
    assert torch.autograd.gradcheck(lambda x: map_distance(x, normal(3, 2, 2, 2, seed=1)), maps)


def test_precisions():
    check_precision(lambda q, k: semantic_attention(q, k, 1.0).square().sum(), normal(4, 2, 3), normal(4, 3, 3, seed=1))
    check_precision(lambda x: similarities(x, 6).square().mean(), normal(4, 2, 3, 3))
    check_precision(lambda a, b: map_distance(a, b).mean(), normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1))
    check_precision(lambda d, a: semckd_loss(a, d), normal(4, 2, 3).square(), normal(4, 2, 3, seed=1).softmax(2))


def test_large_features_and_images_without_any_are_finite():
    """Similarities of 1e8 and more, which float16 does not hold, and of 0."""
    torch.manual_seed(0)
    layers = CrossLayerAttention([2], [3], 4, 1.0)
    maps = [(1e4 * normal(4, 2, 2, 2)).float().requires_grad_()]
    with torch.no_grad():
        maps[0][1] = 0
    for dtype in (torch.bfloat16, None):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            attention, distances = layers(maps, [normal(4, 3, 2, 2).float()])
            loss = semckd_loss(attention, distances)
        (slope,) = torch.autograd.grad(loss, maps)
        assert loss.dtype == torch.float32 and loss.isfinite() and slope.isfinite().all()


def network(name):
    torch.manual_seed(0)
    return cifar_model_dict[name][0](num_classes=10)


def built(batch_size, student="resnet8", teacher="resnet14", **own):
    cfg = CN({"SEMCKD": method_defaults["SEMCKD"].clone(), "SOLVER": CN({"BATCH_SIZE": batch_size})})
    cfg.merge_from_list([x for key, value in own.items() for x in (f"SEMCKD.{key}", value)])
    return SemCKD(network(student), network(teacher), cfg, 32).train()


def batch(images):
    return {"image": normal(images, 3, 32, 32).float(), "target": torch.arange(images) % 10, "epoch": 1}


def test_the_layers_are_those_of_a_full_batch():
    assert built(8).attention.query_0.linear1.weight.shape == (4, 8)
    assert built(2).attention.key_2.linear2.weight.shape == (1, 2)  # a fourth of a batch is one at least
    by_hand = SemCKD(network("resnet8"), network("resnet14"), CN({"SEMCKD": method_defaults["SEMCKD"].clone()}), 32)
    assert by_hand.attention.query_0.linear1.in_features == load_cfg("configs/digits/kd.yaml").SOLVER.BATCH_SIZE == 64


def test_every_layer_gets_a_gradient_in_a_short_batch():
    distiller = built(8)
    for images in (8, 3, 1):
        _, losses = distiller(**batch(images))
        distiller.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.get_learnable_parameters())


def test_a_larger_batch_is_refused_with_its_size():
    with pytest.raises(UserError, match=r"up to 4 images, as SOLVER.BATCH_SIZE says, and a batch has 6; set SOLVER"):
        built(4)(**batch(6))


def test_regressors_of_ten_maps_and_more_have_names_of_their_own():
    names = [regressor_name(i, j) for i in range(12) for j in range(12)]
    assert len(set(names)) == 144 and {"regressor11", "regressor1_11", "regressor11_1"} <= set(names)


def test_the_maps_are_those_after_the_stem():
    """Of a ResNet, four maps from the stem's on; of a network that lists no stem, all."""
    distiller = built(8)
    assert distiller.attention.counts == (3, 3)
    assert distiller.frozen["teacher"] == ("logits", "feats[1]", "feats[2]", "feats[3]")
    student = network("resnet8")
    student.stem_in_feats = False
    own = CN({"SEMCKD": method_defaults["SEMCKD"].clone()})
    assert SemCKD(student, network("resnet14"), own, 32).attention.counts == (4, 3)


def test_a_network_without_stages_is_refused_by_name():
    student = network("resnet8")
    forward = student.forward
    student.forward = lambda image: (forward(image)[0], {"feats": forward(image)[1]["feats"][:1]})
    with pytest.raises(UserError, match=r"the student has 1 feature maps \(ResNet and ResNet\); DISTILLER.PAIRS"):
        SemCKD(student, network("resnet14"), CN({"SEMCKD": method_defaults["SEMCKD"].clone()}), 32)


def test_micro_batches_and_pairs_are_refused():
    for settings, words in (
        (("SOLVER.ACCUMULATE", "2"), "compares the images of a batch .* set SOLVER.ACCUMULATE 1"),
        (("DISTILLER.PAIRS", "[[1, 1]]"), "leave DISTILLER.PAIRS empty"),
        (("EXPERIMENT.LOGIT_STAND", "True"), "set EXPERIMENT.LOGIT_STAND False"),
    ):
        cfg = load_cfg("configs/digits/kd.yaml", ["DISTILLER.TYPE", "SEMCKD", *settings])
        with pytest.raises(UserError, match=words):
            check_modes(cfg, SemCKD, SumUpdate, 1)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="SOFT must be positive, it is 0"):
        semantic_attention(normal(1, 1, 1), normal(1, 1, 1), 0)
    with pytest.raises(ValueError, match=r"\(1, 1, 2\) and distances \(1, 2, 1\) differ"):
        semckd_loss(normal(1, 1, 2), normal(1, 2, 1))
