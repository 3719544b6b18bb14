"""The teacher in training: folded, in half precision, from the cache; the module itself does not change."""

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import KD, OFD, distiller_dict
from mdistiller.distillers._declared import UndeclaredOutputError
from mdistiller.engine.teacher.fast_teacher import FrozenNetworks, HalfPrecision
from mdistiller.engine.teacher.file_cache import FileCache
from mdistiller.engine.teacher.fold_batchnorm import CannotFold, fold_batchnorm
from mdistiller.engine.teacher.rows import RowSource
from mdistiller.errors import UserError
from mdistiller.models.copies import has_hooks

from ._teachers import Reads, config, counting, distiller, loader, trained

TEACHERS = ["resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18"]


def tensors(output):
    logits, features = output
    return [logits, *features["feats"], *features["preact_feats"], features["pooled_feat"]]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_folded_network_returns_the_same_with_fewer_batchnorms(name):
    network = trained(name).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = fold_batchnorm(network, image)
    counts = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (network, folded)]
    assert counts[1] < counts[0] and (name.startswith("wrn") or counts[1] == 0)
    with torch.no_grad():
        for own, other in zip(tensors(network(image)), tensors(folded(image))):
            torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_network_without_feature_maps_works_in_place(name):
    network = trained(name).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = fold_batchnorm(network, image[:1], ["pooled_feat"])
    assert "relu_" in folded.code
    kept = image.clone()
    with torch.no_grad():
        logits, features = network(image)
        for _ in range(2):  # a second time, in case the first has overwritten something it needs
            own, own_features = folded(image)
            torch.testing.assert_close(own, logits, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(own_features["pooled_feat"], features["pooled_feat"], rtol=1e-9, atol=1e-9)
    assert set(own_features) == {"pooled_feat"} and torch.equal(image, kept)


def test_a_method_derived_from_another_gets_all_outputs_of_the_teacher():
    class ReadsMaps(KD):
        pass

    for cls, keys in ((KD, set()), (ReadsMaps, {"feats", "preact_feats", "last_map", "pooled_feat"})):
        model = distiller(cls)
        FrozenNetworks(model, loader(), config())
        assert model.teacher_forward(torch.randn(1, 3, 32, 32))[1].keys() == keys


def test_a_network_that_torch_fx_cannot_trace_is_not_folded():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.bn(self.conv(x))
            return (x if x.sum() > 0 else -x), {}

    with pytest.raises(CannotFold, match="TraceError"):
        fold_batchnorm(Foreign().eval(), torch.randn(1, 3, 8, 8))


def test_a_network_that_folding_would_change_is_not_folded():
    """The convolution's weight is used a second time by a function, which folding does not see."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            nn.init.constant_(self.bn.weight, 2.0)

        def forward(self, x):
            return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight), {}

    with pytest.raises(CannotFold, match="another function"):
        fold_batchnorm(Shared().eval(), torch.randn(1, 3, 8, 8))


def test_a_convolution_that_is_called_twice_keeps_its_batchnorm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            nn.init.constant_(self.bn.weight, 2.0)

        def forward(self, x):
            return self.last(self.conv(torch.relu(self.bn(self.conv(x))))), {}

    network, image = Twice().eval(), torch.randn(1, 3, 8, 8)
    folded = fold_batchnorm(network, image)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules()) == 2
    torch.testing.assert_close(folded(image)[0], network(image)[0])


def test_a_network_is_folded_where_float32_convolutions_are_inexact(monkeypatch):
    """As on GPUs, where they round to TF32, with 10 bits of mantissa. Here it is 7, for a small network's sake.

    On an H200, the published resnet56 and its folded copy differ by 9.7e-4 of the largest logit.
    """
    convolve = nn.functional.conv2d

    def rounded(x, weight, *rest):
        if x.dtype == torch.float32:
            x, weight = (t.bfloat16().float() for t in (x, weight))
        return convolve(x, weight, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", rounded)
    network, image = trained("resnet14"), torch.rand(1, 3, 32, 32)
    folded = fold_batchnorm(network, image)
    with torch.no_grad():
        own, other = network(image)[0], folded(image)[0]
    assert (own - other).abs().max() > 1e-3 * own.abs().max()
    model = Reads(["logits"])
    assert FrozenNetworks(model, loader(), config()).words["teacher"] == "a copy with its BatchNorms folded"


def test_a_frozen_network_that_runs_itself_says_why():
    frozen = FrozenNetworks(Reads(None), loader(), config())
    assert frozen.words["teacher"] == "itself, as the method does not declare what it reads"
    hooked_teacher = Reads(["logits"])
    hooked(hooked_teacher.teacher.layer1)
    assert FrozenNetworks(hooked_teacher, loader(), config()).words["teacher"] == "itself, as it has hooks"


def test_the_line_about_a_teacher_that_changes_names_it(capsys):
    model = Reads(["logits"])
    frozen = FrozenNetworks(model, loader(), config())
    in_place(model.teacher.fc.bias)
    frozen.check()
    assert capsys.readouterr().err.count("the teacher runs without its faster copy, as its weights change") == 1
    assert frozen.words["teacher"] == "itself, as its weights change during training"


@pytest.mark.parametrize("full_output", [True, False])
def test_half_precision_is_close_and_has_the_promised_dtype(full_output):
    network = trained("resnet8x4")
    image = torch.randn(4, 3, 32, 32)
    half = HalfPrecision(network, torch.bfloat16, full_output)
    with torch.no_grad():
        expected, (logits, features) = network(image)[0], half(image)
    assert logits.dtype == features["feats"][0].dtype == (torch.float32 if full_output else torch.bfloat16)
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()
    assert next(network.parameters()).dtype == torch.float32


def test_the_teacher_itself_does_not_change():
    model = distiller()
    before = copy.deepcopy(model.state_dict())
    FrozenNetworks(model, loader(), config())
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.teacher_forward(image)[0], model.teacher(image)[0].detach(), rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_teacher_in_training_mode_is_left_alone():
    model = distiller(OFD, config("OFD"))
    assert FrozenNetworks(model, loader(), config("OFD")).cache is None and not model._runners


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WAYS = {
    "[]": lambda f: f["feats"],
    "get": lambda f: f.get("feats"),
    "items": lambda f: dict(f.items())["feats"],
    "values": lambda f: next(iter(f.values())),
    "**": lambda f: {**f}["feats"],
    "dict": lambda f: dict(f)["feats"],
    "copy": lambda f: f.copy()["feats"],
    "pop": lambda f: f.pop("feats"),
    "loop": lambda f: next(f[key] for key in f if key == "feats"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("amp", ["none", "bf16-teacher"])
def test_features_may_be_read_in_every_way_and_used_in_a_loss(way, amp):
    model, cfg = Reads(["feats"], WAYS[way]), config()
    cfg.SOLVER.AMP = amp
    FrozenNetworks(model, loader(), cfg)
    _, feats = model.forward_train(IMAGE, None)
    own = model.teacher(IMAGE)[1]["feats"]
    for ours, theirs in zip(feats, own, strict=True):
        scale = torch.ones_like(ours, requires_grad=True)
        (scale * ours).sum().backward()  # an inference tensor could not be saved for this
        assert torch.equal(scale.grad, ours) and (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("sped_up", [True, False])
@pytest.mark.parametrize(
    "read",
    [
        lambda f: f["preact_feats"], lambda f: f.get("preact_feats"), lambda f: "preact_feats" in f,
        lambda f: f.pop("preact_feats"), lambda f: f.setdefault("preact_feats", 0),
    ],
    ids=["[]", "get", "in", "pop", "setdefault"],
)
def test_a_feature_that_was_not_declared_says_so_by_name(read, sped_up):
    model = Reads(["feats"], read)
    if sped_up:
        FrozenNetworks(model, loader(), config())
    with pytest.raises(
        UndeclaredOutputError, match="Reads's teacher: 'preact_feats' is read, but only 'feats' is decl"
    ):
        model.forward_train(IMAGE, None)


@pytest.mark.parametrize("sped_up", [True, False])
def test_logits_that_were_not_declared_say_so_by_name(sped_up):
    model = Reads(["feats"])
    if sped_up:
        FrozenNetworks(model, loader(), config())
    logits, _ = model.teacher_forward(IMAGE)
    uses = [
        lambda x: x.softmax(1), lambda x: torch.softmax(x, 1), lambda x: nn.functional.kl_div(IMAGE, x),
        lambda x: x / 4.0, lambda x: 1 - x, lambda x: -x, lambda x: x[0], len, list, bool, lambda x: x > 0,
        lambda x: torch.stack([x, x]), lambda x: IMAGE + x,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(UndeclaredOutputError, match="'logits' is read"):
            use(logits)


@pytest.mark.parametrize("sped_up", [True, False])
@pytest.mark.parametrize("amp", ["none", "bf16-teacher"])
def test_one_map_of_a_list_may_be_declared(amp, sped_up):
    """The others are neither computed for their own sake nor converted, and reading one of them says so by name."""
    model = Reads(["feats[2]"])
    cfg = config()
    cfg.SOLVER.AMP = amp
    if sped_up:
        FrozenNetworks(model, loader(), cfg)
        assert [own is None for own in model._runners["teacher"](IMAGE)[1]["feats"]] == [True, True, False, True]
    _, features = model.teacher_forward(IMAGE)
    expected = model.teacher(IMAGE)[1]["feats"][2]
    torch.testing.assert_close(features["feats"][2], expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    for use in (lambda m: m.mean(), lambda m: m + 1, torch.flatten, len):
        with pytest.raises(UndeclaredOutputError, match=r"'feats\[0\]' is read, but only 'feats\[2\]' is declared"):
            use(features["feats"][0])
    with pytest.raises(UndeclaredOutputError, match="'preact_feats' is read"):
        features["preact_feats"]


def test_a_map_that_the_network_lacks_is_refused():
    with pytest.raises(UserError, match=r"feats\[4\]"):
        FrozenNetworks(Reads(["feats[4]"]), loader(), config())
    FrozenNetworks(Reads(["feats[-4]"]), loader(), config())


@pytest.mark.parametrize("method, maps", [("AT", [1, 2, 3]), ("SP", [3]), ("FITNET", [2])])
def test_a_method_reads_only_the_maps_that_it_compares(method, maps):
    cfg = config(method)
    model = distiller(distiller_dict[method], cfg)
    assert model.frozen["teacher"] == tuple(f"feats[{i}]" for i in maps)

    class Reader(distiller_dict[method]):
        """May read more, as it declares nothing."""

    assert distiller(Reader, cfg).frozen["teacher"] is None


def test_a_declared_feature_that_the_network_lacks_is_a_key_error():
    with pytest.raises(KeyError, match="attention"):
        Reads(["attention"], lambda f: f["attention"]).forward_train(IMAGE, None)
    assert Reads(["attention"], lambda f: f.get("attention")).forward_train(IMAGE, None)[1] is None


def hooked(module):
    """What a forward hook on `module` sees."""
    seen = []
    module.register_forward_hook(lambda *args: seen.append(args[2]))
    return seen


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("amp", ["none", "bf16", "bf16-teacher"])
def test_a_hook_on_an_inner_module_sees_every_image(when, amp):
    """The hook may be registered before the trainer is built, or before its first step."""
    model, cfg = Reads(["logits"]), config()
    cfg.SOLVER.AMP = amp
    seen = hooked(model.teacher.layer2) if when == "before" else None
    frozen = FrozenNetworks(model, loader(), cfg)
    seen = hooked(model.teacher.layer2) if seen is None else seen
    images = [IMAGE + step for step in range(3)]
    for image in images:
        frozen.check()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            model.teacher_forward(image)
    assert len(seen) == 3
    with torch.no_grad():
        stems = [torch.relu(model.teacher.bn1(model.teacher.conv1(x))) for x in images]
        expected = [model.teacher.layer2(model.teacher.layer1(stem)[0])[0] for stem in stems]
    for (ours, _), theirs in zip(seen, expected):
        assert (ours.float() - theirs).norm() < (0.05 if amp != "none" else 1e-5) * theirs.norm()


def test_a_method_without_a_declaration_gets_the_network_itself():
    model = Reads(None)
    frozen = FrozenNetworks(model, loader(), config())
    assert frozen.runners["teacher"] is model.teacher
    assert model.teacher_forward(IMAGE)[1].keys() == model.teacher(IMAGE)[1].keys()


def test_copies_carry_no_hooks():
    model, cfg = Reads(["logits"]), config()
    cfg.SOLVER.AMP = "bf16"
    runner = FrozenNetworks(model, loader(), cfg).runners["teacher"]
    seen = hooked(model.teacher.layer1)
    runner(IMAGE)
    assert seen == [] and not has_hooks(runner)


def in_place(bias):
    with torch.no_grad():
        bias.add_(1.0)


def behind_autograd(bias):
    bias.data.add_(1.0)


def replaced(bias):
    bias.data = bias.data + 1.0


@pytest.mark.parametrize("change", [in_place, behind_autograd, replaced])
def test_a_frozen_network_that_changes_runs_itself(change):
    """A moving average of the student, say; in each of the ways in which such updates are written."""
    model = Reads(["logits"])
    frozen = FrozenNetworks(model, loader(), config())
    frozen.check()
    assert frozen.runners["teacher"] is not model.teacher
    change(model.teacher.fc.bias)
    frozen.check()
    assert torch.equal(model.teacher_forward(IMAGE)[0], model.teacher(IMAGE)[0].detach())


@pytest.mark.parametrize("change", ["weights", "hook"])
def test_a_change_within_a_step_counts_at_once(change):
    model = Reads(["logits"])
    frozen = FrozenNetworks(model, loader(), config())
    frozen.check()
    if change == "weights":
        in_place(model.teacher.fc.bias)
        assert torch.equal(model.teacher_forward(IMAGE)[0], model.teacher(IMAGE)[0].detach())
    else:
        seen = hooked(model.teacher.layer1)
        model.teacher_forward(IMAGE)
        assert len(seen) == 1


def test_a_declared_output_that_the_network_lacks_is_refused_with_the_near_ones():
    with pytest.raises(UserError, match=r"unknown output of Reads's teacher 'feat'; did you mean feats"):
        FrozenNetworks(Reads(["feat"]), loader(), config())


def test_every_frozen_network_is_sped_up_alike():
    model = Reads(["logits"])
    model.add_frozen("assistant", trained("resnet8x4"), ["logits", "pooled_feat"])
    runner = FrozenNetworks(model, loader(), config()).runners["assistant"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in runner.modules())
    logits, features = model.frozen_forward("assistant", IMAGE)
    expected, expected_features = model.assistant(IMAGE)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["pooled_feat"], expected_features["pooled_feat"], rtol=1e-4, atol=1e-4)
    assert set(features) == {"pooled_feat"}


@pytest.mark.parametrize("change", ["weights", "hooks"])
def test_stored_outputs_of_a_teacher_that_changes_are_refused(change, tmp_path):
    model = distiller()
    frozen = FrozenNetworks(model, loader(), config(TEACHER_CACHE=str(tmp_path)))
    if change == "weights":
        nn.init.zeros_(model.teacher.fc.bias)
    else:
        hooked(model.teacher.layer1)
    with pytest.raises(UserError, match=r"DISTILLER\.TEACHER_CACHE stores the teacher's outputs, but it"):
        frozen.check()


def cache_of(folder, network, batches, outputs=("logits", "pooled_feat"), dtype="fp32", max_bytes=2**30, how="cpu"):
    run, seen = counting(network)
    source = RowSource(network, run, how, torch.zeros(1, 3, 32, 32), batches, outputs, dtype)
    cache = FileCache(source, folder, max_bytes)
    seen.clear()
    return cache, seen


def pass_over(cache, batches, network, epoch, tolerance):
    """One epoch through the cache; each output is compared with the network's own."""
    batches.set_epoch(epoch)
    for image, _, index in batches:
        cache.look_up(index)
        logits, features = cache(image)
        with torch.no_grad():
            expected, expected_features = network(image)
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
        pooled = features["pooled_feat"], expected_features["pooled_feat"]
        torch.testing.assert_close(*pooled, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp16", 2e-3)])
def test_a_second_run_never_runs_the_teacher(tmp_path, dtype, tolerance):
    network = trained("resnet8")
    folder = tmp_path / "new" / "cache"
    first, seen = cache_of(folder, network, loader(), dtype=dtype)
    for epoch in (1, 2, 3):
        pass_over(first, first.loader, network, epoch, tolerance)
    assert 0 < sum(seen) <= 120 and first.hit_rate() == pytest.approx(100 - 100 * sum(seen) / 120)
    second, seen = cache_of(folder, network, loader(), dtype=dtype)
    for epoch in (1, 2, 3):
        pass_over(second, second.loader, network, epoch, tolerance)
    assert seen == [] and second.hit_rate() == 100.0
    assert len(list(folder.iterdir())) == 2


def test_two_runs_share_a_cache_at_the_same_time(tmp_path):
    network = trained("resnet8")
    one, seen_one = cache_of(tmp_path, network, loader())
    two, seen_two = cache_of(tmp_path, network, loader())
    pass_over(one, one.loader, network, 1, 1e-5)
    pass_over(two, two.loader, network, 1, 1e-5)
    assert sum(seen_one) == 40 and seen_two == []


def test_another_teacher_augmentation_or_dtype_has_its_own_files(tmp_path):
    network = trained("resnet8")
    other = copy.deepcopy(network)
    other.fc.bias.data[0] += 1e-3
    for net, batches, dtype in (
        (network, loader(), "fp32"), (other, loader(), "fp32"), (network, loader(flip=False), "fp32"),
        (network, loader(), "fp16"),
    ):  # fmt: skip
        cache_of(tmp_path, net, batches, dtype=dtype)
    cache_of(tmp_path, network, loader(), how="cpu torch.bfloat16")
    leaky = copy.deepcopy(network)
    leaky.relu = nn.LeakyReLU()
    cache_of(tmp_path, leaky, loader())
    assert len(list(tmp_path.glob("*.values"))) == 6


@pytest.mark.parametrize("other", [{"AMP": "bf16"}, {"AMP": "bf16-teacher"}, "itself"])
def test_outputs_of_a_teacher_that_runs_in_another_way_are_not_reused(other, tmp_path):
    def run(cfg, itself=False):
        model, batches = Reads(["logits"]), loader()
        if itself:
            model.teacher.forward = lambda x: ((y := type(model.teacher).forward(model.teacher, x))[0].sum() and y)
        frozen = FrozenNetworks(model, batches, cfg)
        batches.set_epoch(1)
        for image, _, index in batches:
            frozen.cache.look_up(index)
            model.teacher_forward(image)
        return frozen.cache.hit_rate()

    cfg = config(TEACHER_CACHE=str(tmp_path))
    changed = cfg.clone()
    if other != "itself":
        changed.defrost()
        changed.SOLVER.merge_from_list([item for pair in other.items() for item in pair])
    assert run(changed, itself=other == "itself") == 0
    assert run(cfg) == 0 and run(cfg) == 100


def test_the_size_is_bounded_and_the_rest_is_computed_again(tmp_path):
    network = trained("resnet8")
    width = 10 + 64
    cache, seen = cache_of(tmp_path, network, loader(), max_bytes=(4 * width + 1) * 162 * 10)  # ten images
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == (4 * width + 1) * 1620
    for _ in range(2):
        pass_over(cache, cache.loader, network, 1, 1e-5)
    assert sum(seen) == 40 + 30


def test_a_cache_in_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        FrozenNetworks(distiller(), loader(), config(TEACHER_CACHE=str(tmp_path / "file" / "cache")))
