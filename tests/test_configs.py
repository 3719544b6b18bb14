"""Every config under configs/: it says how it is run, resolves, builds, and takes a step on tiny data."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdistiller.dataset import ImageArray, configured_dict, info_of
from mdistiller.distillers import RunFacts, distiller_dict
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.modes import check_modes
from mdistiller.engine.trainer import trainer_dict
from mdistiller.models import cifar_model_dict
from mdistiller.models.sources import build_network

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_opens_with_the_command_that_runs_it(path):
    first = (REPOSITORY / path).read_text().splitlines()[0]
    assert first == f"# python tools/train.py --cfg {path}"


def loaders(info, augment, count=2):
    generator = torch.Generator().manual_seed(0)
    size = (count, info.image_size, info.image_size, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    data = ImageArray(images, torch.arange(count) % info.num_classes, (0.5,) * 3, (0.25,) * 3)
    data = data.augmented(augment, info.image_size) if augment else data
    train = data.loader(count, 0, train=True)
    train.augmentation = augment
    return train, data.loader(count, 0, train=False)


# Folders with a config for each pair of networks, which differ in networks and numbers alone.
ORIGINAL = ("dkd", "dot", "kd", "short")
_FOLDER = re.compile(r"configs/cifar100/(\w+)/")
PAIRS = [path for path in CONFIGS if (found := _FOLDER.match(path)) and found[1] not in ORIGINAL]


def alike(path):
    """What configs have in common: the folder, and kd_, dkd_, mlkd_ or dcgd_ where their names begin so."""
    return re.match(r"configs/cifar100/\w+/(?:(?:dcgd|dkd|kd|mlkd)_)?", path)[0]


def step_of(path):
    """A slow test for all but the first of the configs that are alike."""
    first = path not in PAIRS or path == next(other for other in PAIRS if alike(other) == alike(path))
    return pytest.param(path, marks=() if first else pytest.mark.slow)


@pytest.mark.parametrize("path", PAIRS)
def test_the_config_of_a_pair_goes_with_itself(path):
    """Its settings are read and allowed together, and its networks exist; see the next test for a step of it."""
    cfg = load_cfg(path)
    check_modes(cfg, distiller_dict[cfg.DISTILLER.TYPE], trainer_dict[cfg.SOLVER.TRAINER].update_rule, world=1)
    assert {cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER} <= cifar_model_dict.keys()


@pytest.mark.parametrize("path", [step_of(path) for path in CONFIGS])
def test_a_config_builds_and_takes_a_step(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # configs name files relative to the repository
    overrides = ["EXPERIMENT.DEVICE", "cpu", "SOLVER.BATCH_SIZE", "2"]
    cfg = load_cfg(path, overrides)
    if cfg.DATASET.TYPE in configured_dict:  # data of one's own, as of four classes, and small
        pytest.importorskip("timm")
        cfg = load_cfg(path, [*overrides, "DATASET.NUM_CLASSES", "4", "DATASET.IMAGE_SIZE", "64"])
    info = info_of(cfg)
    torch.manual_seed(0)
    # The teacher's weights are random here: published ones are not in the repository.
    student = build_network(cfg.DISTILLER.STUDENT, info.num_classes, info.image_size)
    method = distiller_dict[cfg.DISTILLER.TYPE]
    needed = method.needs_teacher
    teacher = build_network(cfg.DISTILLER.TEACHER, info.num_classes, info.image_size) if needed else None
    distiller = method.from_run(student, teacher, cfg, replace(RunFacts.of(cfg), num_data=2))
    trainer = trainer_dict[cfg.SOLVER.TRAINER]("none", distiller, *loaders(info, cfg.DATASET.AUGMENT), cfg)
    before = {name: p.detach().clone() for name, p in distiller.named_parameters() if p.requires_grad}
    trainer.distiller.train()
    meters = Meters()
    for batch in trainer.train_loader:
        trainer.train_iter(trainer.prepare_batch(batch, epoch=1), 1, meters)
    means = meters.means()
    assert all(abs(mean) < float("inf") for mean in means.values()), means
    moved = [name for name, p in distiller.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before), "a step moves the parameters"
