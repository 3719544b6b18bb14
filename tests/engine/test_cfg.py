"""The configuration tree: the original's defaults and values, what is accepted, what is refused."""


import pytest

from mdistiller.engine.cfg import CFG, cfg_text, load_cfg
from mdistiller.errors import UserError
from tests import _golden


def differing(expected, ours, above=()):
    """The keys of `expected` whose value in `ours` is missing or different; `ours` may have more keys."""
    for key, value in expected.items():
        name = (*above, key)
        if key not in ours:
            yield ".".join(name)
        elif isinstance(value, dict):
            yield from differing(value, ours[key], name)
        elif list(value) != list(ours[key]) if isinstance(value, list) else value != ours[key]:
            yield ".".join(name)


def test_the_defaults_are_the_originals():
    assert list(differing(_golden.load("configs")["defaults"], CFG)) == []


@pytest.mark.parametrize("path", _golden.load("configs")["experiments"])
def test_an_original_experiment_resolves_to_the_originals_values(path):
    expected = _golden.load("configs")["experiments"][path]
    assert list(differing(expected, load_cfg(path))) == []


def test_res56_res20_has_a_second_name_from_the_users_readme():
    assert load_cfg("configs/cifar100/dkd/resn56_res20.yaml") == load_cfg("configs/cifar100/dkd/res56_res20.yaml")


def test_overrides_take_precedence_over_the_file_and_the_file_over_the_defaults(yaml_file):
    cfg = load_cfg(yaml_file("SOLVER: {LR: 0.2, EPOCHS: 3}"), ["SOLVER.LR", "0.4"])
    assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS, cfg.SOLVER.MOMENTUM) == (0.4, 3, 0.9)
    assert CFG.SOLVER.LR == 0.05, "the shared tree is untouched"


def test_yamls_bare_exponent_is_a_number(yaml_file):
    assert load_cfg(yaml_file("SOLVER: {LR: 1e-2}")).SOLVER.LR == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: [", "is not valid YAML"),
        ("- a\n- b", "holds a list, not sections"),
        ("SOLVER: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("SOLVER: {LR: .nan}", "SOLVER.LR must be positive and finite, not nan"),
        ("SOLVER: {LR: }", "SOLVER.LR must be a number such as 0.05, not None"),
        ("1: 2", "unknown config key '1'"),
    ],
)
def test_a_bad_file_gets_one_line_that_names_it(yaml_file, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_cfg(yaml_file(text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"cannot read config configs/none.yaml: No such file"):
        load_cfg("configs/none.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a text file"):
        load_cfg(path)


def test_the_text_of_a_configuration_leaves_out_the_other_methods(yaml_file):
    shown = cfg_text(load_cfg(yaml_file("DISTILLER: {TYPE: KD}")))
    assert "KD:" in shown and "SOLVER:" in shown and "CRD:" not in shown


def test_the_dump_of_a_config_reads_back_as_itself(tmp_path):
    cfg = load_cfg("configs/imagenet/r50_mv1/reviewkd.yaml")
    (tmp_path / "again.yaml").write_text(cfg.dump())
    assert load_cfg(tmp_path / "again.yaml") == cfg


