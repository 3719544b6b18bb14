"""The configurations: every published value, the teacher's keys, and what is refused."""

import re
from ast import literal_eval

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

import yaml
from detectron2.config import get_cfg

from detection import HERE
from detection.model.config import load_cfg
from mdistiller.errors import UserError
from tests import _golden
from tests.detection import _small

PUBLISHED = _golden.load("configs")["detection"]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def read(value):
    """A value as yacs reads it, but with tuples (also those written as text) as lists."""
    value = literal_eval(value) if isinstance(value, str) and value.startswith("(") else value
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_values(path):
    file = HERE.parent / path
    assert yaml.safe_load(file.read_text()) == PUBLISHED[path], "the file says what the original's says"
    cfg = load_cfg(file)
    for keys, value in leaves(PUBLISHED[path]):
        if keys != ("_BASE_",):
            node = cfg
            for key in keys:
                node = node[key]
            assert read(node) == read(value), keys


@pytest.mark.parametrize("path", sorted(p for p in PUBLISHED if "Base" not in p))
def test_a_config_opens_with_its_command(path):
    first = (HERE.parent / path).read_text().splitlines()[0]
    assert first == f"# python detection/train_net.py --config-file {path} --num-gpus 4"


def test_every_published_config_is_tried():
    assert sorted(f"detection/configs/{name}.yaml" for name in _small.CONFIGS) == sorted(
        p for p in PUBLISHED if "Base" not in p
    )


def test_method_defaults_and_the_teachers_keys():
    cfg = load_cfg("")
    assert cfg.KD == {
        "TYPE": "DKD",
        "RANDOM_TEACHER": False,
        "DKD": {"ALPHA": 1.0, "BETA": 0.25, "T": 1.0},
        "REVIEWKD": {"LOSS_WEIGHT": 1.0},
    }
    own = {keys for keys, _ in leaves(cfg.TEACHER) if keys[:2] != ("MODEL", "MOBILENETV2")}
    assert own == {keys for keys, _ in leaves(get_cfg())}, "detectron2's keys, whatever its version"


@pytest.mark.parametrize(
    "opts, line",
    [
        (["KD.TYPE", "DKDD"], "unknown KD.TYPE 'DKDD'; did you mean DKD"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "20"], "the student knows 20 classes and the teacher 80"),
        (["TEACHER.INPUT.FORMAT", "L"], "TEACHER.INPUT.FORMAT is 'L'"),
        (["TEACHER.MODEL.WEIGHTS", "t.pth"], "TEACHER.MODEL.WEIGHTS is 't.pth', but MODEL.WEIGHTS"),
        (["KD.DKD.ALHPA", "1.0"], "KD.DKD.ALHPA"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", "{{}}"], "unhashable"),
    ],
)
def test_refused(opts, line):
    with pytest.raises(UserError) as error:
        load_cfg(HERE / "configs/DKD/DKD-R18-R101.yaml", opts)
    assert line in str(error.value)


TEACHERS = r"^TEACHER\.MODEL\.META_ARCHITECTURE must be GeneralizedRCNN or PanopticFPN"


@pytest.mark.parametrize(
    "opts, line",
    [
        (["MODEL.META_ARCHITECTURE", "RCNKD"], "unknown MODEL.META_ARCHITECTURE 'RCNKD'; did you mean RCNNKD"),
        (["TEACHER.MODEL.META_ARCHITECTURE", "RetinaNet"], TEACHERS + ", because .* it is 'RetinaNet'"),
        (["TEACHER.MODEL.META_ARCHITECTURE", "ProposalNetwork"], TEACHERS + ", because .* it is 'ProposalNetwork'"),
        (["TEACHER.MODEL.META_ARCHITECTURE", "FasterRCNN"], TEACHERS + ", because .* it is 'FasterRCNN'"),
        (["TEACHER.MODEL.META_ARCHITECTURE", "RCNNKD"], TEACHERS + ", also for a teacher that .* it is 'RCNNKD'"),
        (
            ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
            r"^MODEL\.ROI_HEADS.NAME must be StandardROIHeads, it is Res5ROIHeads",
        ),
        (
            ["TEACHER.MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
            r"^TEACHER\.MODEL\.ROI_HEADS.NAME must .* it is Res5ROIHeads",
        ),
        (["TEACHER.MODEL.ROI_HEADS.NAME", "RROIHeads"], r"^TEACHER\.MODEL\.ROI_HEADS.NAME must .* it is RROIHeads"),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], r"^MODEL\.ROI_HEADS.NAME must .* it is CascadeROIHeads"),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHead"], r"^MODEL\.ROI_HEADS.NAME must .* it is StandardROIHead$"),
        (["TEACHER.MODEL.ROI_BOX_HEAD.NAME", ""], "unknown TEACHER.MODEL.ROI_BOX_HEAD.NAME ''; known: FastRCNNConvFC"),
        (["MODEL.BACKBONE.NAME", "build_resnet18_fpn_backbone"], "unknown MODEL.BACKBONE.NAME .*; did you mean build_"),
    ],
)
def test_networks_without_what_the_losses_read_are_refused(opts, line):
    with pytest.raises(UserError) as error:
        load_cfg(HERE / "configs/DKD/DKD-R18-R101.yaml", opts)
    assert re.search(line, str(error.value)) and "\n" not in str(error.value)


def test_no_file_and_a_file_that_would_run_code(tmp_path):
    with pytest.raises(UserError, match=r"no config file at nowhere\.yaml"):
        load_cfg("nowhere.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="python/object/apply"):
        load_cfg(file)


def test_keys_of_the_original_without_effect_are_accepted():
    cfg = load_cfg(HERE / "configs/DKD/DKD-R18-R101.yaml", ["MODEL.MOBILENETV2.DEBUG", "0"])
    assert "DEBUG" not in cfg.MODEL.MOBILENETV2


def test_a_key_that_stands_twice_is_refused_in_the_file_and_in_its_base(tmp_path):
    published = HERE / "configs/DKD/DKD-R18-R101.yaml"
    (tmp_path / "base.yaml").write_text(f"_BASE_: {published}\nSEED: 1\nSOLVER: {{}}\nSEED: 2\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(UserError, match=rf"^config {tmp_path}/base\.yaml: SEED stands there twice, in lines 2 and 4"):
        load_cfg(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("MODEL:\n  MASK_ON: True\n  MASK_ON: False\n")
    with pytest.raises(UserError, match=r"own\.yaml: MODEL\.MASK_ON stands there twice, in lines 2 and 3"):
        load_cfg(tmp_path / "own.yaml")


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(f"_BASE_: {HERE}/configs/DKD/DKD-R18-R101.yaml\nOUTPUT_DIR: ~/out\n")
    cfg = load_cfg("~/own.yaml", ["MODEL.WEIGHTS", "~/w.pth"])
    assert {cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS} == {f"{tmp_path}/out", f"{tmp_path}/w.pth"}
    with pytest.raises(UserError, match="there is no user nobody_such"):
        load_cfg("~nobody_such/own.yaml")
