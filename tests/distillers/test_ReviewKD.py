"""ReviewKD against its equations; what it reads from the networks, and what it refuses."""

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import ReviewKD, method_defaults
from mdistiller.distillers.ReviewKD import ABF, build_abfs, hcl_loss, review
from mdistiller.models import cifar_model_dict, imagenet_model_dict

from .. import _golden
from .._networks import TwoMaps
from .oracles.reviewkd import naive_abf, naive_hcl_loss


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nets(*names):
    return [cifar_model_dict[name][0](num_classes=10) for name in names]


def config(**changes):
    cfg = CN({"REVIEWKD": method_defaults["REVIEWKD"].clone()})
    cfg.REVIEWKD.update(changes)
    return cfg


def step(method, epoch=20):
    torch.manual_seed(0)
    return method.train()(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]), epoch=epoch)[1]


@pytest.mark.parametrize("sizes", [[(8, 8), (1, 1)], [(7, 7), (5, 9), (2, 3)], [(16, 24), (4, 4), (3, 1)], [(12, 6)]])
def test_hcl_agrees_with_the_naive_form(sizes):
    f_s = [maps(2, 3, *size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    f_t = [maps(2, 3, *size, seed=9 + i) for i, size in enumerate(sizes)]
    ours, naive = hcl_loss(f_s, f_t), naive_hcl_loss(f_s, f_t)
    assert ours.shape == () and ours.item() == pytest.approx(naive.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(ours, f_s), torch.autograd.grad(naive, f_s)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_hcl_by_hand():
    # A 2x2 difference of (2, 0; 0, 0): mean square 1, then its mean 1/2 squared with weight 1/2, over 1 + 1/2.
    f_s = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])
    assert hcl_loss([f_s], [torch.zeros_like(f_s)]).item() == pytest.approx((1 + 0.25 / 2) / 1.5)
    # A constant difference of 3 is 9 at every size and level.
    f_s = [torch.full((1, 1, n, n), 3.0) for n in (8, 2, 1)]
    assert hcl_loss(f_s, [torch.zeros_like(f) for f in f_s]).item() == pytest.approx(27)


def test_hcl_gradcheck():
    f_t = [maps(1, 2, 8, 8, seed=1), maps(1, 2, 3, 5, seed=2)]
    inputs = maps(1, 2, 8, 8).requires_grad_(), maps(1, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *f_s: hcl_loss(f_s, f_t), inputs)


def test_hcl_autocast_and_refusal():
    f_s, f_t = maps(2, 3, 8, 8, dtype=torch.bfloat16).requires_grad_(), maps(2, 3, 8, 8, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hcl_loss([f_s], [f_t])
    loss.backward()
    assert loss.dtype == torch.float32 and f_s.grad.isfinite().all()
    assert loss.item() == pytest.approx(naive_hcl_loss([f_s.double()], [f_t.double()]).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"student's \(2, 3, 8, 8\), the teacher's \(2, 3, 4, 4\)"):
        hcl_loss([f_s], [f_t[..., ::2, ::2]])


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("size, deeper, out", [(8, 4, 8), (5, 3, 7), (4, 4, 2)])
def test_abf_agrees_with_the_naive_form(fuse, size, deeper, out):
    torch.manual_seed(0)
    abf = ABF(3, 6, 4, fuse).double()
    x, y = maps(2, 3, size, size).requires_grad_(), maps(2, 6, deeper, deeper, seed=1).requires_grad_()
    ours, naive = abf(x, y, size, out), naive_abf(abf, x, y, size, out)
    for a, b in zip(ours, naive):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    probe = maps(*ours[0].shape, seed=2)
    inputs = [x, *abf.parameters()] + ([y] if fuse else [])
    for a, b in zip(*(torch.autograd.grad((out[0] * probe).sum(), inputs) for out in (ours, naive))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_detection_shares_the_fusion():
    pinned = next(row["state_dict"] for row in _golden.load("detection") if "fused" in row)
    abfs = build_abfs([256] * 5, [256] * 5)
    ours = {f"kd_trans.abfs.{k}": list(v.shape) for k, v in abfs.state_dict().items()}
    assert ours == {k: v for k, v in pinned.items() if k.startswith("kd_trans.")}
    levels = [maps(1, 256, *size, dtype=torch.float32) for size in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
    fused = review(build_abfs([256] * 5, [256] * 5).eval(), levels, [None] * 5)
    assert [f.shape for f in fused] == [f.shape for f in levels]


def test_review_agrees_with_the_naive_fusion():
    torch.manual_seed(0)
    abfs = build_abfs([2, 3, 4], [5, 6, 7]).double()
    x = [maps(2, 2, 8, 8), maps(2, 3, 4, 4), maps(2, 4, 2, 2)]
    deep, fused = naive_abf(abfs[0], x[2], None, 2, 3)
    middle, fused = naive_abf(abfs[1], x[1], fused, 4, 4)
    shallow, _ = naive_abf(abfs[2], x[0], fused, 8, 8)
    for a, b in zip(review(abfs, x, [(8, 8), (4, 4), (3, 3)]), (shallow, middle, deep)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limit, expected", [(512, 64), (64, 64), (48, 48)])
def test_max_mid_channel_is_obeyed(limit, expected):
    method = ReviewKD(*nets("resnet8", "resnet14"), config(MAX_MID_CHANNEL=limit))
    assert {abf.conv1[0].out_channels for abf in method.abfs} == {expected}


def test_loss_grows_over_the_warmup():
    losses = {}
    for warmup, epoch in ((20, 5), (20, 20), (20, 40), (0, 1)):
        torch.manual_seed(0)
        method = ReviewKD(*nets("resnet8", "resnet14"), config(WARMUP_EPOCHS=warmup))
        losses[warmup, epoch] = step(method, epoch)["loss_kd"].item()
    full = losses[20, 20]
    assert list(losses.values()) == pytest.approx([full / 4, full, full, full])


@pytest.mark.parametrize(
    "student, teacher, channels",
    [
        ("resnet8", "wrn_16_1", [16, 32, 64, 64]),
        ("MobileNetV2", "vgg8", [12, 16, 48, 160, 1280]),
        ("vgg8", "MobileNetV2", [128, 256, 512, 512, 512]),
        ("ShuffleV1", "resnet8", [240, 480, 960, 960]),
        ("resnet8", "ShuffleV1", [16, 32, 64, 64]),
        ("ShuffleV2", "vgg8", [24, 116, 232, 464, 1024]),
        ("vgg8", "ShuffleV2", [256, 512, 512, 512]),
    ],
)
@pytest.mark.parametrize("preact", [False, True])
def test_pairs(student, teacher, channels, preact):
    method = ReviewKD(*nets(student, teacher), config(STU_PREACT=preact))
    assert [abf.conv1[0].in_channels for abf in method.abfs] == channels[::-1]
    losses = step(method)
    losses["loss_kd"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.abfs.parameters())


GIVEN = {
    "SHAPES": [1, 8, 16, 32],
    "OUT_SHAPES": [1, 8, 16, 32],
    "IN_CHANNELS": [16, 32, 64, 64],
    "OUT_CHANNELS": [32, 64, 128, 128],
}


def test_explicit_empty_and_default_values_agree():
    losses = []
    for given in (GIVEN, {key: [] for key in GIVEN}, {}):
        torch.manual_seed(0)
        losses.append(step(ReviewKD(*nets("resnet8", "wrn_16_2"), config(**given)))["loss_kd"].item())
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("key", ["IN_CHANNELS", "OUT_CHANNELS"])
def test_channels_that_contradict_the_networks_are_refused(key):
    found = ", ".join(map(str, GIVEN[key]))
    with pytest.raises(ValueError, match=rf"REVIEWKD\.{key} is \[16, 99\] but the networks have \[{found}\]"):
        ReviewKD(*nets("resnet8", "wrn_16_2"), config(**{key: [16, 99]}))


@pytest.mark.parametrize("key", ["SHAPES", "OUT_SHAPES"])
def test_sizes_that_contradict_the_maps_are_refused(key):
    method = ReviewKD(*nets("resnet8", "wrn_16_2"), config(**{key: [1, 7, 14, 28]}))
    with pytest.raises(ValueError, match=rf"REVIEWKD\.{key} is \[1, 7, 14, 28\] but .* \[1, 8, 16, 32\]"):
        step(method)


def test_sizes_that_contradict_the_run_are_refused_when_it_is_built():
    for key in ("SHAPES", "OUT_SHAPES"):
        with pytest.raises(ValueError, match=rf"REVIEWKD\.{key} is \[1, 7, 14, 28\] but .* \[1, 8, 16, 32\]"):
            ReviewKD(*nets("resnet8", "wrn_16_2"), config(**{key: [1, 7, 14, 28]}), image_size=32)


class Tokens(torch.nn.Module):
    """Returns tokens (B, N, C), as a transformer does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x):
        x = self.linear(x.flatten(2).mT)
        return x.mean(1), {"feats": [x] * 4, "preact_feats": [x] * 4, "pooled_feat": x.mean(1)}


def test_tokens_are_refused_when_it_is_built():
    with pytest.raises(ValueError, match=r"ReviewKD compares feature maps .* the student's \(1, 1024, 4\)"):
        ReviewKD(Tokens(), *nets("resnet8"), config())


def test_a_student_with_fewer_levels():
    method = ReviewKD(TwoMaps(), *nets("resnet8"), config())
    assert method.pairs.indices == [(0, 2), (1, 3)]
    assert [abf.conv2[0].out_channels for abf in method.abfs] == [64, 64, 32]


@pytest.mark.parametrize("folder", ["r34_r18", "r50_mv1"])
def test_imagenet_configs_agree_with_the_networks(folder):
    experiment = _golden.load("configs")["experiments"][f"configs/imagenet/{folder}/reviewkd.yaml"]
    names = [experiment["DISTILLER"][key] for key in ("STUDENT", "TEACHER")]
    pair = [imagenet_model_dict[name](pretrained=False) for name in names]
    method = ReviewKD(*pair, config(**experiment["REVIEWKD"]))
    assert len(method.abfs) == 5
    expected = min(experiment["REVIEWKD"].get("MAX_MID_CHANNEL", 512), experiment["REVIEWKD"]["IN_CHANNELS"][-1])
    assert method.abfs[0].conv1[0].out_channels == expected
