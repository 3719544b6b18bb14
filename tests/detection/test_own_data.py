"""Data of one's own: its classes, damaged images, and what is refused before anything starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from detection.model.annotations import annotations_of, use_classes
from detection.model.config import load_cfg
from detection.model.data import build_test_loader, build_train_loader
from detection.model.merge import export, merge, student_cfg
from detection.train_net import read_cfg
from mdistiller.errors import UserError
from tests.detection import _small

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "detection/configs/DKD/DKD-R18-R101.yaml"
CLASSES = {7: "nut", 12: "bolt", 90: "washer"}


@pytest.fixture
def own(datasets, tmp_path):
    """The synthetic set with three classes whose ids have gaps: a function from a change of each file to its folder."""

    def write(change=lambda split, data: None):
        root = tmp_path / "own"
        shutil.copytree(datasets / "coco", root / "coco", dirs_exist_ok=True)
        for split in ("train", "val"):
            path = root / f"coco/annotations/instances_{split}2017.json"
            data = json.loads(path.read_text())
            for annotation in data["annotations"]:
                annotation["category_id"] = sorted(CLASSES)[annotation["category_id"] % 3]
            data["categories"] = [{"id": number, "name": name} for number, name in reversed(CLASSES.items())]
            change(split, data)
            path.write_text(json.dumps(data))
        return root

    return write


def named(root, name="parts"):
    """The overrides that name the data in `root` as data sets of our own."""
    sets = [
        [f"{name}_{s}", str(root / f"coco/annotations/instances_{s}2017.json"), str(root / f"coco/{s}2017")]
        for s in ("train", "val")
    ]
    return ["DATASETS.OWN", repr(sets), "DATASETS.TRAIN", f"('{name}_train',)", "DATASETS.TEST", f"('{name}_val',)"]


class Arguments:
    """The command line, as `train_net.py` reads it."""

    def __init__(self, *opts, eval_only=False, resume=False):
        self.config_file, self.opts = str(CONFIG), [*_small.NARROW, *map(str, opts)]
        self.eval_only, self.resume, self.num_gpus = eval_only, resume, 1


def train_net(*arguments, root=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"DETECTRON2_DATASETS": str(root)} if root else {})
    call = [sys.executable, "detection/train_net.py", *map(str, arguments)]
    return subprocess.run(call, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def test_the_classes_are_those_of_the_annotations(own, tmp_path):
    """In the place of COCO, whose 80 names detectron2 knows in advance; trained, evaluated class by class, exported."""
    root, out = own(), tmp_path / "out"
    opts = [*_small.NARROW, "OUTPUT_DIR", out, "TEST.EVAL_PERIOD", "2"]
    done = train_net("--config-file", CONFIG, *opts, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads((out / "metrics.json").read_text().splitlines()[-1])
    assert {f"bbox/AP-{name}" for name in CLASSES.values()} <= last.keys()
    state = torch.load(out / "model_final.pth", weights_only=True)["model"]
    for whose in ("", "teacher."):
        assert len(state[f"{whose}roi_heads.box_predictor.cls_score.weight"]) == 3 + 1
    predicted = json.loads((out / "inference/coco_instances_results.json").read_text())
    assert {p["category_id"] for p in predicted} <= set(CLASSES)
    export(out / "model_final.pth", tmp_path / "student.pth")
    plain = student_cfg(load_cfg(CONFIG, _small.NARROW), tmp_path / "student.pth")
    assert plain.MODEL.ROI_HEADS.NUM_CLASSES == 3 and "OWN" not in plain.DATASETS


def test_data_sets_of_ones_own_names(own):
    cfg = read_cfg(Arguments(*named(own(), "named")))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.TEACHER.MODEL.ROI_HEADS.NUM_CLASSES) == (3, 3)
    images = next(iter(build_train_loader(cfg, seed=0)))
    assert all(set(image["instances"].gt_classes.tolist()) <= {0, 1, 2} for image in images)
    assert MetadataCatalog.get("named_train").thing_classes == ["nut", "bolt", "washer"]
    assert MetadataCatalog.get("named_train").thing_dataset_id_to_contiguous_id == {7: 0, 12: 1, 90: 2}


def test_cocos_own_classes_stay_as_they_are(datasets):
    cfg = load_cfg(CONFIG, [*_small.NARROW, *_small.ON_SYNTHETIC])
    before = cfg.dump()
    use_classes(cfg, ["synthetic_train", "synthetic_val"])
    assert cfg.dump() == before and cfg.is_frozen()


CHANGES = {
    "another number is set": (None, ["MODEL.ROI_HEADS.NUM_CLASSES", "20", "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "20"],
        "MODEL.ROI_HEADS.NUM_CLASSES is 20, but .*train2017.json has 3 classes .7 nut, 12 bolt, 90 washer.; leave"),
    "other classes to validate on": (
        lambda s, d: s == "val" and d["categories"].append({"id": 99, "name": "screw"}), [],
        "different classes: .*train2017.json alone has none, .*val2017.json alone has 99 screw; give all files"),
    "another name of a class": (lambda s, d: s == "val" and d["categories"][0].update(name="ring"), [],
        "train2017.json alone has 90 washer, .*val2017.json alone has 90 ring"),
    "a category that is not": (lambda s, d: d["annotations"][0].update(category_id=8), [],
        "train2017.json: annotation 1 has category_id 8, which no category has; docs/detection.md"),
    "a box of three numbers": (
        lambda s, d: d["annotations"][0].update(bbox=[1, 2, 3]), [], "annotation 1 needs a `bbox`"),
    "equal ids": (lambda s, d: d["annotations"][0].update(id=2), [], "two annotations have the `id` 2"),
    "an image without a size": (lambda s, d: d["images"][0].pop("width"), [], "needs a `width` and a `height`"),
    "no categories": (lambda s, d: d.pop("categories"), [], "no list `categories` of objects"),
    "no images": (lambda s, d: d["images"].clear(), [], "`images` is empty"),
    "no objects": (lambda s, d: d["annotations"].clear(), [], "train2017.json annotates no object to train on"),
    "no masks": (lambda s, d: d["annotations"][0].pop("segmentation"), ["MODEL.MASK_ON", "True"],
        "MODEL.MASK_ON is True, but annotation 1 of .* has no `segmentation`"),
    "no data set": (None, ["DATASETS.TRAIN", "()"], "DATASETS.TRAIN names no data set"),
    "no such place": (None, ["DATASETS.OWN", "[['a', 'b']]"], "DATASETS.OWN must be a list of .name, annotation file"),
    "no such user": (None, ["DATASETS.OWN", "[['a', '~nobody_such/b.json', 'c']]"], "there is no user nobody_such"),
    "a name that is taken": (
        None, ["DATASETS.OWN", "[['coco_2017_val', 'b', 'c']]"], "a data set 'coco_2017_val' already"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_agree_is_refused_in_one_line(own, tmp_path, case):
    change, opts, message = CHANGES[case]
    root = own(change or (lambda split, data: None))
    with pytest.raises(UserError, match=message) as error:
        read_cfg(Arguments(*named(root, case.replace(" ", "_")), *opts))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\xff", '{"images": 3}'])
def test_a_file_that_is_no_annotations_is_named(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"annotations .*a\.json"):
        annotations_of(tmp_path / "a.json")


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


BROKEN = {
    "cut": (cut, "cannot be read as an image .image file is truncated"),
    "missing": (Path.unlink, "cannot be read as an image .No such file or directory."),
    "no image": (lambda path: path.write_text("x"), "cannot be read as an image"),
    "resized": (lambda path: shutil.copy(path.with_name(f"{2:012d}.jpg"), path), "has 64x96 pixels, its annotation"),
}


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_image_is_named(own, case, workers):
    damage, message = BROKEN[case]
    root = own()
    names = named(root, f"{case}{workers}".replace(" ", "_"))
    cfg = read_cfg(Arguments(*names, "DATALOADER.NUM_WORKERS", workers))
    for split in ("train", "val"):
        damage(root / f"coco/{split}2017/{1:012d}.jpg")
    for loader in (build_train_loader(cfg, seed=0), build_test_loader(cfg, cfg.DATASETS.TEST[0])):
        with pytest.raises(UserError, match=rf"2017/{1:012d}\.jpg {message}") as error:
            for _, _ in zip(range(9), loader):
                pass
        assert "\n" not in str(error.value)


def test_a_broken_image_ends_training_in_one_line(own, tmp_path):
    root = own()
    for path in (root / "coco/train2017").iterdir():
        cut(path)
    opts = [*_small.NARROW, *named(root), "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", "9"]
    done = train_net("--config-file", CONFIG, "--num-gpus", "2", *opts, "DATALOADER.NUM_WORKERS", "1")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert "cannot be read as an image (image file is truncated" in done.stderr


def test_a_teacher_of_other_classes_is_refused(own, tmp_path):
    from detection.model.trainer import Trainer

    torch.save({"model": build_model(load_cfg(CONFIG, _small.NARROW)).state_dict()}, tmp_path / "coco.pth")
    opts = [*named(own(), "fewer"), "MODEL.WEIGHTS", tmp_path / "coco.pth", "KD.RANDOM_TEACHER", "False"]
    cfg = read_cfg(Arguments(*opts, "OUTPUT_DIR", tmp_path / "out"))
    trainer = Trainer(cfg)
    with pytest.raises(UserError, match=r"\(4, 32\), but \(81, 32\); .*it knows 80 classes, the data has 3: docs"):
        trainer.resume_or_load(False)
    for hook in trainer._hooks:
        for writer in getattr(hook, "_writers", ()):
            writer.close()


def test_merging_takes_the_classes_of_the_teachers_file(tmp_path):
    three = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = load_cfg(CONFIG, [*_small.NARROW, *three])
    torch.save({"model": build_model(cfg.TEACHER).state_dict()}, tmp_path / "t.pth")
    merge(load_cfg(CONFIG, _small.NARROW), tmp_path / "t.pth", None, tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=True)["model"]
    assert len(state["teacher.roi_heads.box_predictor.cls_score.weight"]) == 4
    cfg = load_cfg(CONFIG, [*_small.NARROW, *(word.replace("3", "5") for word in three)])
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but .*t\.pth knows 3 classes; leave the key out"):
        merge(cfg, tmp_path / "t.pth", None, tmp_path / "m.pth")


def test_random_weights_are_not_scored(datasets, tmp_path):
    with pytest.raises(UserError, match=r"^MODEL\.WEIGHTS is empty, so --eval-only would score random weights"):
        read_cfg(Arguments(*_small.ON_SYNTHETIC, "OUTPUT_DIR", tmp_path, eval_only=True))
    from detection.train_net import evaluate

    state = build_model(load_cfg(CONFIG, _small.NARROW)).state_dict()
    part = {name: value for name, value in state.items() if name.startswith("backbone.bottom_up.")}
    torch.save({"model": part}, tmp_path / "part.pth")
    opts = (*_small.ON_SYNTHETIC, "MODEL.WEIGHTS", tmp_path / "part.pth", "OUTPUT_DIR", tmp_path / "out")
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS holds no .*that --eval-only scores are missing"):
        evaluate(read_cfg(Arguments(*opts, eval_only=True)), resume=False)
