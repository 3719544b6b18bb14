"""A teacher with an input of its own runs as other teachers do: as a faster copy, in half precision, from the cache."""

import pytest
import torch

from mdistiller.distillers import KD
from mdistiller.engine.teacher.fast_teacher import Autocast, FrozenNetworks, HalfPrecision
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.native import NativeInput
from mdistiller.models.own_input import OwnInput
from mdistiller.models.sources import build_network

from ._teachers import config, loader, trained

OWN = NativeInput(24, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def kd(size=24, own=OWN, cfg=None):
    teacher = OwnInput(trained("resnet14"), (0.5,) * 3, (0.25,) * 3, own, size)
    return KD(build_model(cifar_model_dict, "resnet8", 10), teacher, cfg or config()).eval()


def batch():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_its_copy_is_folded_and_computes_the_same():
    distiller = kd()
    expected = distiller.teacher_forward(batch())[0]
    frozen = FrozenNetworks(distiller, loader(), config())
    assert frozen.words["teacher"] == "a copy with its BatchNorms folded"
    assert torch.allclose(distiller.teacher_forward(batch())[0], expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.runners["teacher"].modules())
    distiller.teacher.network.fc.weight.data.mul_(2)
    frozen.check()
    assert frozen.words["teacher"] == "itself, as its weights change during training"


def test_in_half_precision_the_image_is_changed_in_full_precision():
    """The images of the data are not rounded before the multiply-add and the resize."""
    cfg = config()
    cfg.SOLVER.AMP = "bf16-teacher"
    distiller, seen = kd(), []
    frozen = FrozenNetworks(distiller, loader(), cfg)
    frozen.runners["teacher"].network.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    logits = distiller.teacher_forward(batch())[0]
    assert torch.equal(seen[0], distiller.teacher.seen(batch())) and logits.dtype == torch.float32
    expected = distiller.teacher(batch())[0]
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("where", ["host", "device"])
def test_its_outputs_are_cached_under_a_key_of_their_own(where, tmp_path):
    keys = set()
    for size, own in ((24, OWN), (0, OWN), (24, NativeInput(24, (0.4, 0.5, 0.7), (0.2, 0.25, 0.3)))):
        cfg = config(TEACHER_CACHE=str(tmp_path), TEACHER_CACHE_DEVICE=where, TEACHER_CACHE_DTYPE="fp32")
        distiller, batches = kd(size, own), loader()
        plain = {int(i): row for image, _, index in loader() for i, row in zip(index, distiller.teacher(image)[0])}
        frozen = FrozenNetworks(distiller, batches, cfg)
        frozen.begin_epoch()
        for image, _, index in batches:
            frozen.cache.look_up(index)
            rows = distiller.teacher_forward(image)[0]
            expected = torch.stack([plain[int(i)] for i in index])
            assert torch.allclose(rows, expected, rtol=1e-3, atol=1e-3)
        keys.add(frozen.cache.source.key)
    assert len(keys) == 3


def test_as_many_images_at_once_as_the_size_that_it_sees_allows(tmp_path):
    cfg = config(TEACHER_CACHE=str(tmp_path), TEACHER_CACHE_DEVICE="device")
    counts = [FrozenNetworks(kd(size), loader(), cfg).cache._at_once(10**6) for size in (0, 64)]
    assert counts == [64, 16]


@pytest.mark.parametrize("name, kind", [("test_resnet", HalfPrecision), ("test_vit", Autocast)])
def test_networks_of_other_sources_run_in_half_precision(name, kind):
    """Converted once, or under autocast where a parameter of the network's own mixes with its layers."""
    pytest.importorskip("timm")
    cfg = config()
    cfg.SOLVER.AMP = "bf16-teacher"
    torch.manual_seed(0)
    teacher = build_network(f"timm/{name}", 10, 32).eval()
    distiller = KD(build_model(cifar_model_dict, "resnet8", 10), teacher, cfg).eval()
    frozen = FrozenNetworks(distiller, loader(), cfg)
    assert type(frozen.runners["teacher"]) is kind
    logits, expected = distiller.teacher_forward(batch())[0], teacher(batch())[0]
    assert logits.dtype == torch.float32 and (logits - expected).abs().max() < 0.05 * expected.abs().max()
