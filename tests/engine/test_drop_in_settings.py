"""The keys of a method that was written for the original: beside the engine's in cfg.py, of any case, also None."""

from types import SimpleNamespace

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.api.settings import settings_given, tree_of
from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.distributed.ranks import Ranks
from mdistiller.engine.cfg import CFG, cfg_of, cfg_text, load_cfg
from mdistiller.engine.resume_facts import compare_facts, facts_of_run
from mdistiller.engine.run_name import experiment_name
from mdistiller.errors import UserError

from .._networks import Net

CONFIG = "configs/digits/kd.yaml"
VALUES = {
    "3": 3, "0.5": 0.5, "1e-4": 1e-4, "True": True, "None": None, "null": None, "text": "text",
    "[1, 2]": [1, 2], "[[1, 2], [3]]": [[1, 2], [3]],
}  # fmt: skip


class MyKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.layers = cfg.MyKD.layers
        self.temperature = cfg.KD.TEMPERATURE


@pytest.fixture(autouse=True)
def registered():
    CFG.MyKD = CN()
    CFG.MyKD.layers = None
    CFG.MyKD.WEIGHT = 1.0
    distiller_dict["MYKD"] = MyKD
    yield
    del CFG["MyKD"], distiller_dict["MYKD"]


def loaded(*words):
    return load_cfg(CONFIG, ["DISTILLER.TYPE", "MYKD", *words])


@pytest.mark.parametrize("text", VALUES)
def test_a_key_whose_default_is_none_takes_any_plain_value(text, tmp_path):
    words = ("MyKD.layers", text)
    cfg = loaded(*words)
    assert cfg.MyKD.layers == VALUES[text] and type(cfg.MyKD.layers) is type(VALUES[text])
    saved = tmp_path / "config.yaml"
    saved.write_text(cfg_text(cfg))
    assert load_cfg(saved).MyKD == cfg.MyKD
    assert "MyKD.layers" in experiment_name(cfg, words)
    assert cfg_of(tree_of(settings_given("MYKD", {"layers": VALUES[text]}))).MyKD.layers == VALUES[text]


def test_what_is_no_plain_value_is_refused():
    with pytest.raises(UserError, match=r"MyKD.layers must be a number, text, True, False, None, or a list"):
        cfg_of([{"MyKD": {"layers": {"a": 1}}}])


def test_its_sections_are_those_that_its_functions_name():
    """Its own, which no method registers, and that of a method whose settings it takes over."""
    cfg = loaded()
    assert MyKD.config_sections(cfg) == {"MyKD", "KD"}
    text = cfg_text(cfg)
    assert "\nKD:" in text and "\nMyKD:" in text and "\nDKD:" not in text


def test_a_run_that_is_resumed_says_that_it_changed():
    def facts(cfg):
        torch.manual_seed(0)  # of the same networks
        return facts_of_run(cfg, MyKD(Net(), Net(), cfg), SimpleNamespace(optimizer=None), [0], Ranks())

    before, after = facts(loaded()), facts(loaded("MyKD.layers", "3"))
    assert compare_facts(before, after).startswith("MyKD.layers 3 (was None)")
    assert compare_facts(after, before).startswith("MyKD.layers None (was 3)")


@pytest.mark.parametrize(
    "keywords", [{"layers": 3}, {"settings": {"MyKD.layers": 3}}, {"MyKD": {"layers": 3}}, {"mykd_layers": 3}]
)
@pytest.mark.parametrize("loss_only", [False, True])
def test_distill_and_a_loss_take_them(keywords, loss_only):
    assert settings_given("MYKD", keywords, loss_only) == {"MyKD.layers": 3}
