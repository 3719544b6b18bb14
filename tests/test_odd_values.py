"""Every setting of the engine and of every method, at odd values: refused by its name, or a step can be taken."""

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import distiller_dict, method_defaults, method_ranges
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import _RANGES, CFG, check_cfg, load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.overrides import flat_settings, merge, setting
from mdistiller.errors import UserError

from ._networks import write_untrained

ODD = [
    "0", "-1", "-7.5e-2", "0.5", "3", "1e-30", "1e-300", "1e9", "1e30", "1e300", "1000000000", str(2**40),
    str(2**63 - 1),
    str(2**70), "9" * 5000, "nan", "inf", "-inf", "", "[]", "[1]", "[0, 0]", "[8, 8]", "[1, 1]", "[-1, -1]", "[nan, 1]",
    "[1e30, 1e30]", "[[1, 1]]", "[[0, 0], [1, 1]]", "[1, 2, 3, 4]", "True", "None", "word", "a\0b", "{}", "{{}}",
]  # fmt: skip
RANGES = _RANGES | {f"{section}.{key}": allowed for section, of in method_ranges.items() for key, allowed in of.items()}


def read(key, value):
    """The setting that `load_cfg` makes of the override, without its copies of the whole tree."""
    cfg, node = CFG.clone(), value
    for part in reversed(key.split(".")):
        node = {part: node}
    merge(cfg, node, CFG)
    allowed = RANGES.get(key)
    if allowed is not None and allowed.refused(setting(cfg, key)):
        check_cfg(cfg)  # raises
    return setting(cfg, key)


def accepted(key):
    """The odd values that are accepted for `key`; each of the others is refused in a line that names the key."""
    for value in ODD:
        try:
            read(key, value)
        except UserError as error:
            assert str(error).startswith(f"{key} must be ") and "\n" not in str(error), (value, error)
        else:
            yield value


@pytest.mark.parametrize("key", flat_settings(CFG))
def test_a_value_is_refused_by_its_name_or_is_in_its_range(key):
    for value in accepted(key):
        if key in RANGES:
            assert not RANGES[key].refused(read(key, value))
        else:
            assert isinstance(read(key, value), (str, bool)), "every number and every list has a range"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("teacher") / "resnet8", "resnet8", seed=1)


def take_two_steps(method, key, value, teacher, folder):
    cfg = load_cfg("configs/digits/vanilla.yaml", [
        "LOG.WANDB", "False", "LOG.PREFIX", str(folder), "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.02",
        "SOLVER.BATCH_SIZE", "8", "DISTILLER.TYPE", method, "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT",
        str(teacher), "CRD.NCE.K", "16", "DCGD.GROUPS", "configs/digits/groups.json", key, value,
    ])  # fmt: skip
    trainer = build_trainer(cfg)
    trainer.distiller.train()
    trainer.train_loader.set_epoch(1)
    meters = Meters()
    for number, batch in zip((1, 2), trainer.train_loader):
        trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, step=number)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(distiller_dict))
def test_a_step_can_be_taken_with_every_value_that_is_accepted(method, teacher, tmp_path):
    """Or one line says what is wrong: two settings that contradict each other, or a loss that is not finite."""
    section = distiller_dict[method].config_section
    defaults = method_defaults.get(section, CN()) if section == method or method == "FITNET" else CN()
    for key in (f"{section}.{key}" for key in flat_settings(defaults)):
        for value in accepted(key):
            if key == "CRD.NCE.K" and int(value) > 2**16:  # as much memory as it says
                continue
            torch.manual_seed(0)
            try:
                take_two_steps(method, key, value, teacher, tmp_path)
            except UserError as error:
                assert "\n" not in str(error), (key, value)
