"""Networks of other sources in every command that names one."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.commands.group_classes import group_classes
from mdistiller.commands.inspect_features import main as inspect_main
from mdistiller.commands.train import main as train
from mdistiller.dataset import dataset_info
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.in_memory import Normalize
from mdistiller.engine.build import load_trained, own_view
from mdistiller.engine.files.checkpoint import described, load_checkpoint, save_checkpoint
from mdistiller.experiments.method_cost import method_costs
from mdistiller.experiments.runs import read_run
from mdistiller.models.native import NativeInput, native_input
from mdistiller.models.sources import build_network

CODE = """
import torch.nn as nn
INPUT = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
def tiny(num_classes=7):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
SAMPLE, WEIGHTS = Path("../shared/data/imagenet-sample/val"), Path("../shared/data/pretrained")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return f"{tmp_path}/mine.py:tiny"


@pytest.fixture
def run(tiny, tmp_path):
    """The folder of a run of RKD, of a student and a teacher of the user's own file, the teacher's of other classes."""
    torch.manual_seed(0)
    save_checkpoint({"model": build_network(tiny, 7, 32).state_dict()}, tmp_path / "teacher")
    settings = [
        "DISTILLER.TYPE", "RKD", "DISTILLER.STUDENT", tiny, "DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT",
        tmp_path / "teacher", "DISTILLER.TEACHER_SIZE", "48", "DISTILLER.TEACHER_CACHE", tmp_path / "cache",
        "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "1", "EXPERIMENT.DEVICE", "cpu", "EXPERIMENT.PROJECT", "p",
         "LOG.PREFIX", tmp_path, "LOG.WANDB", "False",
    ]  # fmt: skip
    train(["--cfg", "configs/digits/kd.yaml", *map(str, settings)])
    (folder,) = (tmp_path / "p").iterdir()
    return folder, settings


def top1(said):
    return float(re.search(r"top-1 ([\d.]+)", said)[1])


def test_a_run_of_networks_of_other_sources_is_resumed_scored_and_costed(run, tiny, capsys):
    folder, settings = run
    checkpoint = load_checkpoint(folder / "student_best")
    assert checkpoint["input"]["mean"] == [0.3050] * 3  # the student's: the data set's own
    build_network(tiny, 10, 32).bare.load_state_dict(checkpoint["model"], strict=True)
    train(["--cfg", "configs/digits/kd.yaml", "--resume", *map(str, settings), "SOLVER.EPOCHS", "2"])
    assert "epoch 2/2" in capsys.readouterr().out
    path = str(folder / "student_best")
    deployed = evaluate_checkpoint(None, path, None, 64, device="cpu")
    named = evaluate_checkpoint(tiny, path, "digits", 64, device="cpu")
    assert top1(deployed) == top1(named) == pytest.approx(load_checkpoint(folder / "latest")["best_acc"], abs=0.01)
    costs, extra = method_costs(read_run(folder).cfg)
    assert costs["student"].parameters == 914 and extra == 0


def test_groups_are_counted_with_one(tiny, tmp_path):
    torch.manual_seed(0)
    save_checkpoint(described({"model": build_network(tiny, 10, 32).state_dict()}), tmp_path / "t")
    group_classes(tiny, str(tmp_path / "t"), "digits", out=tmp_path / "g.json", num_groups=2, split="test")
    assert json.loads((tmp_path / "g.json").read_text())["teacher"] == tiny


def test_one_is_inspected_beside_its_teacher(tiny, tmp_path, capsys):
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        save_checkpoint({"model": build_network(tiny, 10, 32).state_dict()}, tmp_path / name)
    files = ["-c", tmp_path / "student", "--teacher", tiny, "--teacher-ckpt", tmp_path / "teacher", "-d", "digits"]
    options = ["--tsne-images", "0", "--device", "cpu", "-o", tmp_path / "out"]
    inspect_main(["-m", tiny, *map(str, [*files, *options])])
    assert "agreement with the teacher" in capsys.readouterr().out


def test_imagenet_is_seen_at_the_networks_own_input(tmp_path):
    """As timm's own transform shows an image."""
    timm_data = pytest.importorskip("timm.data")
    pixels = np.random.default_rng(0).integers(0, 256, (301, 420, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    info = own_view("imagenet", "timm/tf_efficientnet_lite2")
    native = native_input("timm/tf_efficientnet_lite2")
    assert (info.image_size, tuple(info.mean), native.crop) == (260, (0.5,) * 3, 0.89)
    split = _at(info, tmp_path / "image.png")
    shown = Normalize(split.mean, split.std, pixels=260 * 260)(split.val_view(str(tmp_path / "image.png"))[None])[0]
    own = timm_data.create_transform(260, mean=native.mean, std=native.std, crop_pct=0.89, interpolation="bicubic")
    assert torch.allclose(shown, own(Image.open(tmp_path / "image.png")), atol=1e-5)
    assert split.train_view(str(tmp_path / "image.png")).shape == (260, 260, 3)


def _at(info, path):
    """The split that `info` reads, of one file."""
    import mdistiller.dataset.imagenet as module

    files = ImageFiles.of([(str(path), 0)], module.train_view, module.val_view, module.MEAN, module.STD)
    original = dataset_info["imagenet"]
    dataset_info["imagenet"] = replace(original, read=lambda root, train, skip_broken=False: files)
    try:
        native = native_input("timm/tf_efficientnet_lite2")
        return module.at(native).read(Path(), False)
    finally:
        dataset_info["imagenet"] = original


def test_which_networks_see_imagenet_at_their_own_input(tiny, tmp_path):
    imagenet = dataset_info["imagenet"]
    assert own_view("imagenet", "ResNet18") is imagenet
    assert own_view("imagenet", "torchvision/resnet18").image_size == 224
    assert own_view("digits", "timm/tf_efficientnet_lite2") is dataset_info["digits"]
    content = described({"model": {}}, (), imagenet.mean, imagenet.std, 224)
    save_checkpoint(content, tmp_path / "of_a_run")
    assert own_view("imagenet", tiny, str(tmp_path / "of_a_run")) is imagenet
    save_checkpoint(described({"model": {}}, (), (0.1,) * 3, (0.2,) * 3, 96), tmp_path / "of_a_run")
    assert own_view("imagenet", tiny, str(tmp_path / "of_a_run")).image_size == 96


def test_data_of_any_size_is_seen_as_the_checkpoints_run_saw_it(tiny, tmp_path):
    asked = []

    def at(native):
        asked.append(native)
        return replace(info, at=None)

    info = replace(dataset_info["digits"], model_family="any", mean=(0.5,) * 3, std=(0.5,) * 3, at=at)
    save_checkpoint(described({"model": {}}, (), (0.1,) * 3, (0.2,) * 3, 96), tmp_path / "of_a_run")
    own_view(info, "resnet8", str(tmp_path / "of_a_run"))
    assert asked == [replace(native_input("resnet8", 96), size=96, mean=(0.1,) * 3, std=(0.2,) * 3)]
    own_view(info, tiny)
    assert asked[1] == NativeInput(32, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], interpolation="bicubic")


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir() or not WEIGHTS.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_published_weights_score_as_in_timm(name, tmp_path):
    """The logits of timm's own network and transform, on images of every fortieth class."""
    timm = pytest.importorskip("timm")
    path, full = str(WEIGHTS / f"{name}.safetensors"), f"timm/{name}"
    (tmp_path / "imagenet").symlink_to(SAMPLE.parent.resolve())
    info = own_view("imagenet", full, path)
    net = load_trained(info, full, path, device="cpu")
    split = info.read(tmp_path, False)
    split = split.select((split.targets % 40 == 0).nonzero()[:, 0])
    theirs = timm.create_model(name)
    theirs.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, strict=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
    right = 0
    with torch.inference_mode():
        for image, target in split.loader(8, 0, train=False):
            logits = net(image)[0]
            right += int((logits.argmax(1) == target).sum())
        last = [transform(Image.open(os.fsdecode(file)).convert("RGB")) for file in split.paths[-len(image) :]]
        expected = theirs.eval()(torch.stack(last))
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3) and right / len(split.paths) > 0.7
