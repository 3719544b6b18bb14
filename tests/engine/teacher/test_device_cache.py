"""The teacher's outputs in the device's memory: the same rows as in the files, and no step that waits for them."""

import hashlib
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from mdistiller.engine.teacher import cache as caches
from mdistiller.engine.teacher.cache import teacher_cache
from mdistiller.engine.teacher.device_cache import DeviceCache
from mdistiller.engine.teacher.fast_teacher import FrozenNetworks
from mdistiller.engine.teacher.file_cache import FileCache
from mdistiller.engine.teacher.row_table import RowTable
from mdistiller.engine.teacher.rows import RowLayout, RowSource, _digest
from mdistiller.errors import UserError

from ._teachers import Reads, config, counting, distiller, loader, trained

NETWORK = trained("resnet8")
BOTH = ("logits", "pooled_feat")


def source_of(batches, outputs=BOTH, dtype="fp32", device="cpu"):
    """A source of the rows of NETWORK, and the numbers of images that it runs from now on."""
    run, seen = counting(NETWORK)
    source = RowSource(NETWORK, run, "cpu", torch.zeros(1, 3, 32, 32, device=device), batches, outputs, dtype)
    seen.clear()
    return source, seen


def cache_of(where, folder="", batches=None, **of):
    """A cache of forty images where TEACHER_CACHE_DEVICE says, and the numbers of images that the teacher runs."""
    source, seen = source_of(batches or loader(), **of)
    return teacher_cache(source, config(TEACHER_CACHE=str(folder), TEACHER_CACHE_DEVICE=where)), seen


def outputs_of(cache, epoch):
    """What the cache returns in an epoch: (index, logits, pooled features) of each batch; and the batches' images."""
    cache.loader.set_epoch(epoch)
    cache.begin_epoch()
    found, images = [], []
    for image, _, index in cache.loader:
        cache.look_up(index)
        logits, features = cache(image)
        found.append((index, logits, features["pooled_feat"]))
        images.append(image)
    return found, images


def same(one, other):
    return all(torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp16", 2e-3)])
def test_it_returns_what_the_teacher_computes_and_computes_each_crop_once(dtype, tolerance):
    cache, seen = cache_of("device", dtype=dtype)
    assert isinstance(cache, DeviceCache)
    rates = []
    for epoch in (1, 2, 1):
        seen.clear()
        for (_, logits, pooled), image in zip(*outputs_of(cache, epoch), strict=True):
            assert logits.dtype == pooled.dtype == torch.float32
            with torch.no_grad():
                expected, features = NETWORK(image)
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(pooled, features["pooled_feat"], rtol=tolerance, atol=tolerance)
        rates.append(cache.hit_rate())
        assert bool(seen) == (rates[-1] < 100)
    assert rates[0] == 0 and rates[2] == 100.0


@pytest.mark.parametrize("outputs", [("logits",), ("pooled_feat",)])
def test_a_row_holds_what_the_method_reads(outputs):
    cache, _ = cache_of("device", outputs=outputs)
    cache.loader.set_epoch(1)
    image, _, index = next(iter(cache.loader))
    cache.look_up(index)
    logits, features = cache(image)
    assert len(logits) == (8 if outputs == ("logits",) else 0) and set(features) == {*outputs} - {"logits"}


@pytest.mark.parametrize("first, second", [("host", "device"), ("device", "host"), ("device", "device")])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_rows_in_files_serve_both_ways_bit_for_bit(first, second, dtype, tmp_path):
    one, _ = cache_of(first, tmp_path, dtype=dtype)
    before = [outputs_of(one, epoch)[0] for epoch in (1, 2, 3)]
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    other, seen = cache_of(second, tmp_path, dtype=dtype)
    after = [outputs_of(other, epoch)[0] for epoch in (1, 2, 3)]
    assert seen == [] and other.hit_rate() == 100.0
    assert all(map(same, before, after))
    assert files == {path.name: path.stat().st_size for path in tmp_path.iterdir()} and len(files) == 2


def test_the_files_are_those_of_earlier_versions(tmp_path):
    """A folder that was filled before this form of the cache is still read."""
    cache, _ = cache_of("device", tmp_path)
    (index, logits, pooled), *_ = outputs_of(cache, 1)[0]
    text = f"{_digest(NETWORK)} cpu {cache.loader.fingerprint} ['logits', 'pooled_feat'] [10, 64] fp32"
    path = tmp_path / hashlib.sha256(text.encode()).hexdigest()[:32]
    places = index * 162 + cache.loader.variant(index)
    values = np.fromfile(path.with_suffix(".values"), np.float32).reshape(40 * 162, 74)
    assert np.array_equal(values[places], torch.cat([logits, pooled], dim=1))
    known = np.fromfile(path.with_suffix(".known"), np.uint8)
    assert known.shape == (40 * 162,) and known.sum() == 40 and known[places].all()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs_of(cache_of("device")[0], 1)
    assert list(tmp_path.iterdir()) == []


def test_the_hits_are_those_of_the_files(tmp_path):
    rates = {}
    for where in ("host", "device"):
        cache, _ = cache_of(where, tmp_path / where, loader(padding=1))
        rates[where] = [(outputs_of(cache, epoch), cache.hit_rate())[1] for epoch in (1, 2, 3, 4, 2)]
    assert rates["host"] == rates["device"] and rates["host"][-1] == 100 and 0 < rates["host"][-2] < 100


def test_the_bits_of_a_row_do_not_depend_on_which_others_are_known():
    """So a run that is resumed without files computes the rows that it had; all batches have the same size."""
    long, seen = cache_of("device", batches=loader(padding=1))
    for epoch in (1, 2, 3, 4):
        expected, _ = outputs_of(long, epoch)
    resumed, _ = cache_of("device", batches=loader(padding=1))
    assert same(outputs_of(resumed, 4)[0], expected)
    assert 0 < long.hit_rate() < 100 and seen == [40] * 4


def test_large_sets_are_computed_in_batches_of_one_size(monkeypatch):
    monkeypatch.setattr("mdistiller.engine.teacher.device_cache._PIXELS_ON_CPU", 16 * 32 * 32)
    whole, seen = cache_of("device")
    expected, _ = outputs_of(whole, 1)
    assert seen == [16, 16, 16]
    monkeypatch.setattr("mdistiller.engine.teacher.device_cache._PIXELS_ON_CPU", 1)
    single, seen = cache_of("device")
    for one, other in zip(outputs_of(single, 1)[0], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert seen == [1] * 40


def test_steps_find_the_tensors_where_they_were():
    """A CUDA graph reads them by their addresses."""
    cache, _ = cache_of("device")

    def addresses():
        table = cache.table
        return [t.data_ptr() for t in (table.values, table.places, table.known)]

    before = addresses()
    for epoch in (1, 2, 3):
        cache.loader.set_epoch(epoch)
        cache.begin_epoch()
        assert torch.equal(cache.table.places, torch.arange(40) * 162 + cache.loader.variant(torch.arange(40)))
    assert addresses() == before


def test_a_loop_that_does_not_begin_epochs_gets_their_rows():
    cache, seen = cache_of("device")
    for epoch in (1, 2):
        for image, _, index in cache.loader:
            cache.look_up(index)
            with torch.no_grad():
                torch.testing.assert_close(cache(image)[0], NETWORK(image)[0], rtol=1e-5, atol=1e-5)
        assert cache.loader.epoch == epoch and seen == [40] * epoch


def test_each_rank_computes_its_own_images_and_finds_what_the_others_have_written(tmp_path):
    ranks = [cache_of("device", tmp_path, loader().shard(rank, 2)) for rank in range(2)]
    for (cache, seen), (other, _) in zip(ranks, reversed(ranks)):
        seen_index = torch.cat([index for index, *_ in outputs_of(cache, 1)[0]])
        assert seen == [20] and len(seen_index) == 20 and cache.hit_rate() == 0
        known = cache.table.known.nonzero()[:, 0] // 162
        assert torch.equal(known, seen_index.sort().values)
        assert not other.loader.set_epoch(1)
    # Epoch 1 again, as if the other rank had its images: they are in the files.
    cache, seen = ranks[0]
    cache.loader.shard(1, 2)
    mine = outputs_of(cache, 1)[0]
    assert seen == [20] and cache.hit_rate() == 100.0
    assert same(mine, outputs_of(ranks[1][0], 1)[0])


def test_the_teacher_gets_the_images_as_a_step_does():
    """In NCHW memory without channels_last, and in the network's type."""
    for channels_last in (True, False):
        cfg, batches, got = config(TEACHER_CACHE_DEVICE="device"), loader(), []
        cfg.SOLVER.CHANNELS_LAST = channels_last
        network = trained("resnet8").double()

        def run(image, network=network, got=got):
            got.append(image)
            return network(image)

        image = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        cache = teacher_cache(RowSource(network, run, "cpu", image, batches, BOTH, "fp32"), cfg)
        outputs_of(cache, 1)
        batch = got[-1]
        assert batch.dtype == torch.float64 and batch.is_contiguous() != channels_last
        assert batch.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(batch.float(), batches.augmented(batches.own_images()))
        assert not cache.table.values.requires_grad


def test_a_teacher_that_changes_between_epochs_stores_nothing(tmp_path):
    for folder, remedy in (("", r"; set DISTILLER\.TEACHER_CACHE_DEVICE auto$"), (tmp_path, "; leave it empty and")):
        model = distiller()
        cfg = config(TEACHER_CACHE=str(folder), TEACHER_CACHE_DEVICE="device")
        frozen = FrozenNetworks(model, loader(), cfg)
        frozen.cache.loader.set_epoch(1)
        frozen.begin_epoch()
        known = int(frozen.cache.table.known.sum())
        nn.init.zeros_(model.teacher.fc.bias)
        frozen.cache.loader.set_epoch(2)
        with pytest.raises(UserError, match=rf"stores the teacher's outputs, but its weights change.*{remedy}"):
            frozen.begin_epoch()
        assert int(frozen.cache.table.known.sum()) == known == 40


def test_a_former_table_is_freed_before_there_is_a_new_one(monkeypatch):
    """When a run is resumed: two of them may not fit."""
    model, cfg = distiller(), config(TEACHER_CACHE_DEVICE="device")
    frozen = FrozenNetworks(model, loader(), cfg)
    former, gone = weakref.ref(frozen.cache.table.values), []
    make = caches.RowTable
    monkeypatch.setattr(caches, "RowTable", lambda *of: gone.append(former() is None) or make(*of))
    del frozen
    assert former() is not None  # the method still runs it
    FrozenNetworks(model, loader(), cfg)
    assert gone == [True]


SIZE = 40 * 162 * (74 * 4 + 1)


def place(cache):
    return {DeviceCache: "device", FileCache: "host"}[type(cache)]


def test_on_a_cpu_the_files_are_read_unless_asked(tmp_path):
    places = {where: place(cache_of(where, tmp_path)[0]) for where in ("auto", "host", "device")}
    assert places == {"auto": "host", "host": "host", "device": "device"}
    words = {"device": "the memory of cpu", "host": f"files in {tmp_path}"}
    for where, kept in words.items():
        cfg = config(TEACHER_CACHE=str(tmp_path), TEACHER_CACHE_DEVICE=where)
        line = FrozenNetworks(distiller(), loader(), cfg).words["teacher"]
        assert line == f"a copy with its BatchNorms folded; its outputs are kept in {kept}"
    for where in ("auto", "host"):
        assert FrozenNetworks(distiller(), loader(), config(TEACHER_CACHE_DEVICE=where)).cache is None


@pytest.fixture
def gpu():
    """The mode of fake tensors, and a source of rows on a fake GPU."""
    mode, batches = FakeTensorMode(), loader()
    with mode:
        image = torch.zeros(1, 3, 32, 32, device="cuda")
        output = torch.zeros(1, 10, device="cuda"), {"pooled_feat": torch.zeros(1, 64, device="cuda")}
        source = RowSource(NETWORK, lambda image: output, "cuda", image, batches, BOTH, "fp32")
    return mode, source


def test_on_a_gpu_half_of_the_free_memory_may_be_taken(gpu, monkeypatch, tmp_path, capsys):
    mode, source = gpu
    monkeypatch.setattr(caches, "_free", lambda device: 2 * SIZE)
    with mode:
        cache = teacher_cache(source, config(TEACHER_CACHE_GIB=SIZE / 2**30))
    assert place(cache) == "device" and str(cache.table.values.device) == "cuda:0"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(caches, "_free", lambda device: 2 * SIZE - 2)
    assert place(teacher_cache(source, config(TEACHER_CACHE=str(tmp_path)))) == "host"
    (line,) = capsys.readouterr().err.splitlines()
    assert "take 0.00179 GiB, but of the memory of cuda:0 only 0.00179 GiB may be taken" in line, line
    with mode:  # who insists may have all of it
        assert place(teacher_cache(source, config(TEACHER_CACHE_DEVICE="device"))) == "device"


def test_memory_that_runs_out_all_the_same_is_one_line(gpu, monkeypatch, tmp_path, capsys):
    def full(*of):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(caches, "_free", lambda device: 2**40)
    monkeypatch.setattr(caches, "RowTable", full)
    assert place(teacher_cache(gpu[1], config(TEACHER_CACHE=str(tmp_path)))) == "host"
    (line,) = capsys.readouterr().err.splitlines()
    assert "for which cuda:0 has no room" in line
    with pytest.raises(UserError, match=r"6480 crops take 0.00179 GiB, for which cuda:0 has no room"):
        teacher_cache(gpu[1], config(TEACHER_CACHE_DEVICE="device"))


@pytest.mark.parametrize(
    "gib, free, expected",
    [
        (SIZE / 2**30 / 2, 2**40, r"take 0.00179 GiB, more than DISTILLER\.TEACHER_CACHE_GIB 0.000896; raise it"),
        (8.0, SIZE - 1, "take 0.00179 GiB, but of the memory of cpu only 0.00179 GiB may be taken; free some"),
    ],
)
def test_who_insists_is_told_the_numbers(gib, free, expected, monkeypatch):
    monkeypatch.setattr(caches, "free_memory", lambda: free)
    source, _ = source_of(loader())
    with pytest.raises(UserError, match=rf"^DISTILLER\.TEACHER_CACHE_DEVICE device: .*{expected}"):
        teacher_cache(source, config(TEACHER_CACHE_DEVICE="device", TEACHER_CACHE_GIB=gib))


def test_a_loader_of_ones_own_may_not_tell_what_fills_the_table(tmp_path):
    class Own:
        targets, variants, fingerprint = torch.zeros(40), 162, "own"

    source, _ = source_of(Own())
    with pytest.raises(UserError, match=r"a Own has no augmented\(index\) and own_images\(\)"):
        teacher_cache(source, config(TEACHER_CACHE_DEVICE="device"))
    assert place(teacher_cache(source, config(TEACHER_CACHE=str(tmp_path)))) == "host"


def table_of(device="cpu"):
    layout = RowLayout(BOTH, "fp16", (torch.zeros(1, 10), {"pooled_feat": torch.zeros(1, 64)}))
    return RowTable(layout, 40, 162, device), layout


def test_a_look_up_on_a_gpu_is_not_waited_for():
    """With fake tensors, which have no values: what reads one raises. An epoch's start has one such place."""
    with FakeTensorMode():
        table, layout = table_of("cuda")
        index = torch.zeros(8, dtype=torch.int64, device="cuda")
        table.turn_to(torch.zeros(40, dtype=torch.int64, device="cuda"))
        logits, features = layout.split(table.rows(index))
        table.put(table.places[index], torch.zeros(8, 74, device="cuda"))
        assert (logits.shape, features["pooled_feat"].shape) == ((8, 10), (8, 64))
        assert {str(t.device) for t in (logits, features["pooled_feat"])} == {"cuda:0"}
        with pytest.raises(DynamicOutputShapeException):
            table.missing(index)


def test_a_look_up_is_part_of_one_traced_graph():
    """And of the same one in the next epoch."""
    model = Reads(["logits", "pooled_feat"])
    frozen = FrozenNetworks(model, loader(), config(TEACHER_CACHE_DEVICE="device"))
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    traced = torch.compile(model.forward_train, backend=counter, fullgraph=True, dynamic=False)
    for epoch in (1, 2):
        frozen.cache.loader.set_epoch(epoch)
        frozen.begin_epoch()
        for image, target, index in frozen.cache.loader:
            frozen.cache.look_up(index)
            logits, features = traced(image, target)
            expected, expected_features = model.forward_train(image, target)
            assert torch.equal(logits, expected)
            assert torch.equal(features["pooled_feat"], expected_features["pooled_feat"])
    assert counter.frame_count == 1
    torch._dynamo.reset()
