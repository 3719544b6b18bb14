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



def test_a_key_that_stands_twice_is_refused_also_where_a_script_of_the_original_merges_the_file(yaml_file):
    path = yaml_file("SOLVER:\n  LR: 1\nKD: {TEMPERATURE: 2}\nSOLVER: {TYPE: SGD}\n")
    for read in (load_cfg, CFG.clone().merge_from_file):
        with pytest.raises(UserError, match=f"^config {path}: SOLVER stands there twice, in lines 1 and 4"):
            read(str(path))
    path = yaml_file("SOLVER: &s {LR: 1.0, EPOCHS: 2}\nKD: {TEMPERATURE: 2}\n")
    cfg = CFG.clone()
    cfg.merge_from_file(str(path))
    assert cfg.SOLVER.EPOCHS == load_cfg(path).SOLVER.EPOCHS == 2


def test_text_settings_are_expanded_once_but_names_are_not(yaml_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "DATASET: {ROOT: ~/d}\nDISTILLER: {TEACHER_CKPT: ~/t, TEACHER_CACHE: '~'}\nDCGD: {GROUPS: ~/g.json}\n"
    cfg = load_cfg(yaml_file(text), ["LOG.PREFIX", "~/p", "EXPERIMENT.NAME", "~/n", "EXPERIMENT.TAG", "~nobody_such"])
    found = [cfg.DATASET.ROOT, cfg.DISTILLER.TEACHER_CKPT, cfg.DISTILLER.TEACHER_CACHE, cfg.DCGD.GROUPS, cfg.LOG.PREFIX]
    assert found == [f"{tmp_path}/d", f"{tmp_path}/t", str(tmp_path), f"{tmp_path}/g.json", f"{tmp_path}/p"]
    assert (cfg.EXPERIMENT.NAME, cfg.EXPERIMENT.TAG) == ("~/n", "~nobody_such")


def test_yamls_bare_tilde_is_null_and_no_path(yaml_file):
    with pytest.raises(UserError, match=r"LOG\.PREFIX must be text, not None"):
        load_cfg(yaml_file("LOG: {PREFIX: ~}"))


def test_the_setting_whose_user_does_not_exist_is_named(yaml_file):
    with pytest.raises(UserError, match=r"^DISTILLER\.TEACHER_CKPT: cannot expand ~nobody_such of the path ~nobody_su"):
        load_cfg(yaml_file("DISTILLER: {TEACHER_CKPT: ~nobody_such/x}"))
