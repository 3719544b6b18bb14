"""The commands as a user types them: from the repository and from inside detection/, and with bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from tests.detection import _small

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "detection/configs/DKD/DKD-R18-R101.yaml"


def command(folder, datasets, *arguments):
    """Run `python ARGUMENTS` in `folder` of the repository, with one thread."""
    environment = os.environ | {"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, *map(str, arguments)]
    return subprocess.run(call, cwd=REPOSITORY / folder, env=environment, capture_output=True, text=True, timeout=300)


def test_train_on_two_processes_then_evaluate(datasets, tmp_path):
    """From inside detection/, as the original's README has it; then from the repository, on the checkpoint."""
    opts = [*_small.NARROW, "OUTPUT_DIR", tmp_path / "out", "SOLVER.IMS_PER_BATCH", "4"]
    config = "configs/DKD/ReviewDKD-MV2-R50.yaml"
    done = command("detection", datasets, "train_net.py", "--config-file", config, "--num-gpus", "2", *opts)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert {"loss_dkd", "loss_reviewkd", "total_loss", "bbox/AP50"} <= {key for line in lines for key in line}
    config = CONFIG.replace("DKD/DKD-R18-R101", "DKD/ReviewDKD-MV2-R50")
    opts += ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"]
    done = command("", datasets, "detection/train_net.py", "--eval-only", "--config-file", config, *opts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AP,AP50,AP75,APs,APm,APl" in done.stdout


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool's main() in this process: `tool("train_net", ...)` -> (stdout, stderr, exit status)."""

    def run(name, *arguments):
        module = __import__(f"detection.{name}", fromlist=["main"])
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return printed.out, printed.err, status

    return run


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--config-file", "none.yaml"], "error: no config file at none.yaml; detection/configs/ holds"),
        (["--config-file", CONFIG, "KD.TYPE", "KD"], "error: unknown KD.TYPE 'KD'; did you mean DKD"),
        (["--config-file", CONFIG, "MODEL.ROI_HEADS.NUM_CLASSES", "3"], "error: the student knows 3 classes and the"),
        (["--config-file", CONFIG], "error: no weights at pretrained/r18-r101.pth or "),
        (["--config-file", CONFIG, "MODEL.WEIGHTS", ""], "error: MODEL.WEIGHTS is empty, so the teacher would be "),
        (["--config-file", CONFIG, "TEACHER.MODEL.META_ARCHITECTURE", "RetinaNet"], "error: TEACHER.MODEL.META_ARCH"),
        (["--config-file", CONFIG, "DATASETS.TRAIN", "('coco_2017',)"], "error: unknown data set 'coco_2017'; did you"),
        (["--config-file", CONFIG, "DATASETS.TRAIN", "('lost',)"], "error: lost has no /nowhere/lost.json: put COCO's"),
        (["--config-file", CONFIG, "MODEL.DEVICE", "cuda"], "error: --num-gpus 999, but torch sees "),
    ],
)  # fmt: skip
def test_bad_input_gives_a_one_line_error(datasets, tool, monkeypatch, arguments, line):
    monkeypatch.chdir(REPOSITORY)
    if "lost" not in DatasetCatalog:
        DatasetCatalog.register("lost", list)
        MetadataCatalog.get("lost").set(json_file="/nowhere/lost.json", evaluator_type="coco")
    gpus = ["--num-gpus", "999"] if "cuda" in arguments else []
    _, error, status = tool("train_net", *arguments[:2], *gpus, *_small.ON_SYNTHETIC, *arguments[2:])
    assert status == 2
    assert error.startswith(line) and error.count("\n") == 1, error


def test_resuming_does_not_need_the_initial_weights(datasets, tool, small_cfg, tmp_path, monkeypatch):
    """The file that MODEL.WEIGHTS names may have been deleted since."""
    monkeypatch.setattr("detection.train_net.default_setup", lambda cfg, args: None)
    out = tmp_path / "out"
    opts = [*_small.NARROW, *_small.ON_SYNTHETIC, "OUTPUT_DIR", out, "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"]
    _, error, status = tool("train_net", "--config-file", CONFIG, *opts)
    assert status == 0, error
    again = [*opts, "MODEL.WEIGHTS", "gone.pth", "SOLVER.MAX_ITER", "2"]
    _, error, status = tool("train_net", "--config-file", CONFIG, "--resume", *again)
    assert status == 0, error
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize("arguments", [[], ["--resume"]], ids=["from the start", "resumed without a checkpoint"])
def test_a_random_teacher_is_refused_before_anything_starts(datasets, tool, tmp_path, arguments):
    opts = [*_small.NARROW, *_small.ON_SYNTHETIC, "OUTPUT_DIR", tmp_path / "out", "KD.RANDOM_TEACHER", "False"]
    _, error, status = tool("train_net", "--config-file", CONFIG, *arguments, *opts)
    assert (status, error.count("\n")) == (2, 1) and not (tmp_path / "out").exists()
    assert error.startswith("error: MODEL.WEIGHTS is empty, ") and "detection/merge_weights.py" in error


def test_missing_weights_are_no_reason_to_distil_from_a_random_teacher(datasets, tool):
    opts = [*_small.NARROW, *_small.ON_SYNTHETIC, "MODEL.WEIGHTS", "gone.pth"]
    _, error, status = tool("train_net", "--config-file", CONFIG, *opts)
    assert status == 2 and "; only a detector without a teacher can start from scratch" in error


def test_a_plain_detector_and_an_evaluation_need_no_teacher(datasets, tool, tmp_path, monkeypatch):
    monkeypatch.setattr("detection.train_net.default_setup", lambda cfg, args: None)
    opts = [*_small.NARROW, *_small.ON_SYNTHETIC, "KD.RANDOM_TEACHER", "False", "SOLVER.MAX_ITER", "1"]
    opts += ["TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out"]
    plain = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    _, error, status = tool("train_net", "--config-file", CONFIG, *opts, *plain)
    assert status == 0, error
    weights = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"]  # of a student alone
    _, error, status = tool("train_net", "--eval-only", "--config-file", CONFIG, *opts, *weights)
    assert status == 0, error


def test_merge_and_export(tool, tmp_path):
    cfg = _small.load("DKD/DKD-R18-R101")
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.save({"model": build_model(cfg.TEACHER).state_dict()}, tmp_path / "t.pth")
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    config = ["--config-file", REPOSITORY / CONFIG, *_small.NARROW]
    out, error, status = tool("merge_weights", "--teacher", tmp_path / "t.pth", "-o", tmp_path / "m.pth", *config)
    assert status == 0, error
    assert "teacher: 130 tensors matched" in out and f"wrote {tmp_path / 'm.pth'}" in out
    out, error, status = tool("export_student", "--weights", tmp_path / "whole.pth", "-o", tmp_path / "s.pth", *config)
    assert status == 0, error
    assert torch.load(tmp_path / "s.pth", weights_only=True)["model"].keys().isdisjoint({"teacher", "kd_trans"})
    assert "META_ARCHITECTURE: GeneralizedRCNN" in (tmp_path / "s.yaml").read_text()
    _, error, status = tool("merge_weights", "--teacher", tmp_path / "t.pth", "-o", tmp_path / "m.pth")
    assert (status, error.count("\n")) == (2, 1) and "name its config by --config-file" in error
    _, error, status = tool("merge_weights", "--teacher", "t", "--student", "s", "-o", tmp_path / "m.pth")
    assert (status, error) == (2, "error: no weights at t\n")


def test_a_subset_of_a_coco_folder(datasets, tool, tmp_path):
    source, target = datasets / "coco", tmp_path / "coco"
    out, _, status = tool("coco_subset", "--source", source, "--images", "3", "--max-objects", "2", "-o", target)
    assert (out, status) == ("images 1 2 3\n", 0)
    data = json.loads((target / "annotations/instances_train2017.json").read_text())
    assert [i["id"] for i in data["images"]] == [1, 2, 3] and len(data["categories"]) == 80
    assert {a["image_id"] for a in data["annotations"]} == {1, 2, 3} and len(data["annotations"]) == 6
    assert sorted(p.name for p in (target / "train2017").iterdir()) == [i["file_name"] for i in data["images"]]
    _, error, status = tool("coco_subset", "--source", source, "--images", "3", "-o", target)
    assert status == 2 and "already exists" in error
    shutil.rmtree(target)
    _, error, status = tool("coco_subset", "--source", source, "--images", "9", "-o", target)
    assert status == 2 and "only 5 images of 1 to 5 objects" in error and not target.exists()


def test_the_paths_of_the_commands_may_begin_with_the_home_folder(tool, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for name, *arguments in (
        ("coco_subset", "--source", "~/coco", "-o", "~/subset"),
        ("export_student", "--config-file", REPOSITORY / CONFIG, "--weights", "~/w.pth", "-o", "~/student.pth"),
        ("merge_weights", "--config-file", REPOSITORY / CONFIG, "--teacher", "~/w.pth", "-o", "~/pair.pth"),
        ("train_net", "--config-file", "~/own.yaml"),
    ):
        _, said, status = tool(name, *arguments)
        assert status == 2 and f" {home}/" in said and "~" not in said, (name, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
