"""The step benchmark compares equals: the default path trains as the classic path does; its numbers are right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mdistiller.dataset import ImageArray, dataset_dict
from mdistiller.dataset.cifar100 import MEAN, STD
from mdistiller.engine.build import build_trainer
from mdistiller.engine.meters import Meters

from ._scripts import script

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def step() -> Iterator[ModuleType]:
    with script("step") as module:
        yield module


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """640 images of smooth noise instead of CIFAR-100."""
    g = torch.Generator().manual_seed(0)
    small = torch.rand(640, 3, 8, 8, generator=g) * 255
    images = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear").byte().permute(0, 2, 3, 1)
    data = ImageArray(images.contiguous(), torch.arange(640) % 100, MEAN, STD)
    info = dataset_dict["cifar100"]
    monkeypatch.setitem(dataset_dict, "cifar100", type(info)(100, 32, "cifar", lambda *_: data))


@pytest.mark.parametrize(
    ("pair", "method", "dtype", "batch_size", "lr", "within"),
    [
        ("resnet56-resnet20", "KD", torch.float64, 8, 0.05, 1e-8),
        ("resnet56-resnet20", "KD", torch.float32, 16, 5e-4, 1e-4),
        ("resnet56-resnet20", "DKD", torch.float32, 16, 5e-4, 1e-4),
        ("resnet32x4-resnet8x4", "KD", torch.float32, 16, 2e-3, 1e-4),
        ("resnet32x4-resnet8x4", "DKD", torch.float32, 16, 2e-3, 1e-4),
    ],
)
def test_eight_steps_end_where_the_classic_path_ends(
    pair: str,
    method: str,
    dtype: torch.dtype,
    batch_size: int,
    lr: float,
    within: float,
    step: ModuleType,
    small_cifar: None,
    tmp_path: Path,
) -> None:
    """Channels_last, the folded teacher and the meters on the device only change rounding.

    At the published learning rate these first steps magnify any rounding error ten thousand times (the classic path
    in float32 ends 0.1 from the classic path in float64), so the case at that rate is run in float64.
    """
    teacher = step.teacher_file(pair.split("-")[0], tmp_path)
    more = ["EXPERIMENT.DEVICE", "cpu", "SOLVER.LR", str(lr)]
    cfg = step.settings(method, pair, teacher, str(tmp_path), batch_size, [], more)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        ours, classic = build_trainer(cfg), step.classic_trainer(cfg, 640)
    finally:
        torch.set_default_dtype(usual)
    before = copy.deepcopy(classic.distiller.student.state_dict())
    ours.distiller.train()
    meters = Meters()
    for _, (image, *fields) in zip(range(8), ours.train_loader):
        batch = image.to(dtype), *fields
        ours.train_iter(ours.prepare_batch(batch, 1), 1, meters)
        classic.train_iter([field.contiguous() for field in batch], 1)
    assert len(classic.losses) == 8
    moved = 0.0
    for name, theirs in classic.distiller.student.named_parameters():
        mine = ours.distiller.student.get_parameter(name)
        assert mine.dtype == dtype
        assert torch.allclose(mine, theirs, rtol=0, atol=within), (name, float((mine - theirs).detach().abs().max()))
        moved = max(moved, float((theirs - before[name]).detach().abs().max()))
    assert moved > 10 * within  # the weights have changed
    means = meters.means()
    assert means["train_loss"] == pytest.approx(sum(classic.losses) / 8, rel=1e-4)
    assert means["train_acc"] == pytest.approx(sum(classic.top1) / 8, abs=1e-3)
    assert means["train_acc_top5"] == pytest.approx(sum(classic.top5) / 8, abs=1e-3)


def test_the_classic_loader_has_the_package_s_augmentation(step: ModuleType, small_cifar: None) -> None:
    """Each of its images is one of the 162 views of the image that this package can draw."""
    from mdistiller.dataset.augment import crop_and_flip
    from mdistiller.dataset.in_memory import Normalize

    data = dataset_dict["cifar100"].read(Path(), True)
    image, target, index = next(iter(step.cifar_loader(data, 4, 0)))
    assert torch.equal(target, data.targets[index])
    places = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    for shown, i in zip(image, index):
        every = crop_and_flip(data.images[i].expand(162, -1, -1, -1), places[:, 0], places[:, 1], places[:, 2] == 1, 4)
        assert (Normalize(MEAN, STD, 32 * 32)(every) == shown).flatten(1).all(1).any()


def test_the_classic_negatives_are_of_other_classes(step: ModuleType, small_cifar: None) -> None:
    data = dataset_dict["cifar100"].read(Path(), True)
    _, target, index, contrastive = next(iter(step.cifar_loader(data, 8, 0, negatives=100)))
    assert contrastive.shape == (8, 101) and torch.equal(contrastive[:, 0], index)
    assert (data.targets[contrastive[:, 1:]] != target[:, None]).all()
    assert all(len(set(row)) == 101 for row in contrastive.tolist())


def test_the_floor_by_hand(step: ModuleType) -> None:
    from floor import floor_rate

    # resnet8x4 (1 stem, 3 stages of a block at widths 64, 128, 256; fully connected 256 -> 100), in MACs:
    stem = 32 * 32 * 27 * 32
    stages = [
        32 * 32 * 64 * (9 * 32 + 9 * 64 + 32),
        16 * 16 * 128 * (9 * 64 + 9 * 128 + 64),
        8 * 8 * 256 * (9 * 128 + 9 * 256 + 128),
    ]
    student = stem + sum(stages) + 256 * 100
    assert floor_rate("resnet8x4", "resnet8x4", 1e12) == pytest.approx(1e12 / (4 * student))
    assert floor_rate("resnet8x4", "resnet8x4", 1e12, needs_teacher=False) == pytest.approx(1e12 / (3 * student))


def test_ratios_are_taken_turn_by_turn(step: ModuleType) -> None:
    from timing import ratio, spread, take_turns

    turns: list[str] = []
    reached = take_turns({name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}, 2)
    assert turns == ["a", "b", "a", "b"] and reached == {"a": [1, 3], "b": [2, 4]}
    assert spread([3.0, 1.0, 8.0]) == {"median": 3.0, "low": 1.0, "high": 8.0}
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_a_whole_benchmark(
    step: ModuleType, small_cifar: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "use_data", lambda root: "smooth noise")
    monkeypatch.setattr(step, "convolution_rate", lambda dtype, device: 2e9 if dtype == torch.float32 else 4e9)
    words = "--pairs resnet8x4-resnet8 --methods KD AT CRD --steps 1 --rounds 1 --batch 4 --workers 1 --device cpu"
    words += f" --data {tmp_path} --json --out {tmp_path / 'step.json'} --modes default bf16 graph #"
    args = step.parse([*words.split()[:-1], "teacher cache"])
    shown = []
    result = json.loads(json.dumps(step.measure(args, lambda result: shown.append(len(result["races"])))))
    assert shown == [0, 1, 2, 3]  # at the start, and after every race
    races = {race["method"]: race for race in result["races"]}
    assert list(races) == ["KD", "AT", "CRD"]
    assert list(races["KD"]["modes"]) == ["classic", "default", "bf16", "teacher cache"]
    assert list(races["KD"]["refused"]) == ["graph"] and not races["KD"]["failed"]
    assert "only a GPU has them" in races["KD"]["refused"]["graph"]
    assert "AT" in races["AT"]["refused"]["teacher cache"]
    for race in races.values():
        for numbers in race["modes"].values():
            assert numbers["images_per_second"]["low"] > 0 and numbers["peak_mib"] > 0.1
            assert numbers["milliseconds"]["median"] == pytest.approx(4000 / numbers["images_per_second"]["median"])
            assert 50 < numbers["operations"] < 1000 and numbers["held_mib"] is None
        assert race["modes"]["classic"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    kd = races["KD"]["modes"]
    assert kd["bf16"]["floor_images_per_second"] == pytest.approx(2 * kd["default"]["floor_images_per_second"])
    default = kd["default"]
    expected = default["floor_images_per_second"] / default["images_per_second"]["median"]
    assert default["times_floor"] == pytest.approx(expected)
    table = step_table().table(result)
    assert "smooth noise" in table and table.count("### resnet8x4-resnet8") == 1
    assert sum(line.startswith("| KD | ") for line in table.splitlines()) == 5
    assert "| KD | graph | refused: SOLVER.CUDA_GRAPH always does not go with EXPERIMENT.DEVICE cpu" in table
    assert "| AT | teacher cache | refused: " in table


def step_table() -> ModuleType:
    import step_table  # while the fixture `step` has the folder on the path

    return step_table


def test_a_mode_that_fails_is_a_line_and_the_others_go_on(
    step: ModuleType, small_cifar: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """One fails as it is built, one in a later turn. Results are printed and written after the race."""
    build, turns = step.ours, []

    def ours(cfg):
        if not cfg.SOLVER.CHANNELS_LAST:
            raise RuntimeError("CUDA out of\nmemory")
        runner = build(cfg)
        if cfg.SOLVER.CUDA_GRAPH == "never":
            train = runner.train
            runner.train = lambda batch: turns.append(1) or (train(batch) if len(turns) < 4 else 1 / 0)
        return runner

    monkeypatch.setattr(step, "ours", ours)
    monkeypatch.setattr(step, "use_data", lambda root: "smooth noise")
    monkeypatch.setattr(step, "convolution_rate", lambda dtype, device: 2e9)
    out = tmp_path / "step.json"
    words = f"step.py --pairs resnet8-resnet8 --methods KD --steps 1 --rounds 2 --batch 4 --out {out} --device cpu"
    modes = ["--modes", "NCHW", "eager", "default"]
    monkeypatch.setattr("sys.argv", [*words.split(), "--without-classic", *modes])
    step.main()
    (race,) = json.loads(out.read_text())["races"]
    assert list(race["modes"]) == ["default"] and race["modes"]["default"]["ratio"]["median"] == 1.0
    assert race["failed"] == {
        "NCHW": "RuntimeError: CUDA out of memory", "eager": "ZeroDivisionError: division by zero",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "| KD | NCHW | failed: RuntimeError: CUDA out of memory |" in printed
    assert sum(line.startswith("| KD | default | ") for line in printed.splitlines()) == 1


def test_every_mode_says_whether_it_is_a_graph(step: ModuleType) -> None:
    assert step.MODES["default"] == [] and step.MODES["eager"] == ["SOLVER.CUDA_GRAPH", "never"]
    assert step.MODES["bf16, compile, graph"] == [
        "SOLVER.AMP", "bf16", "SOLVER.COMPILE", "True", "SOLVER.CUDA_GRAPH", "always",
    ]  # fmt: skip


def test_without_cifar_noise_of_its_size_is_used(
    step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dataset_dict, "cifar100", dataset_dict["cifar100"])  # restored afterwards
    assert step.use_data(str(tmp_path)) == f"noise of CIFAR-100's size, which is not in {tmp_path}"
    data = dataset_dict["cifar100"].read(tmp_path, True)
    assert data.images.shape == (50_000, 32, 32, 3) and data.targets.bincount().tolist() == [500] * 100
