"""Training and evaluation of every published config, narrow, on the synthetic set; resuming; mixed precision."""

import json
import shutil

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.modeling import build_model

from detection.model.config import load_cfg
from detection.model.data import build_train_loader
from detection.model.merge import student_part
from detection.model.trainer import AMPTrainer, CPUAMPTrainer, SimpleTrainer, Trainer, step_trainer
from mdistiller.errors import UserError
from tests.detection import _small

STUDENT = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
OF_TYPE = {"DKD": {"loss_dkd"}, "ReviewKD": {"loss_reviewkd"}, "ReviewDKD": {"loss_dkd", "loss_reviewkd"}}


def train(cfg, resume=False):
    torch.manual_seed(0)  # what default_setup does from SEED
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer, trainer.train()


def logged(folder):
    """The last value of every entry in metrics.json."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def equal(a, b):
    """Whether two checkpoints' contents are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", _small.CONFIGS)
def test_two_iterations_and_an_evaluation(small_cfg, tmp_path, name):
    cfg = small_cfg(name, "TEST.EVAL_PERIOD", "2")
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    trainer.train()
    line = logged(tmp_path / "out")
    losses = {key: value for key, value in line.items() if key.startswith("loss_")}
    masks = {"loss_mask"} if name.endswith("Mask") else set()
    assert losses.keys() == STUDENT | OF_TYPE[cfg.KD.TYPE] | masks
    assert line["total_loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
    assert all(0 <= line[f"{kind}/AP50"] <= 100 for kind in (("bbox", "segm") if masks else ("bbox",)))
    changed = {n for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and not any(n.startswith("teacher.") for n in changed)
    student = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(student & changed) > 0.7 * len(student), "at this learning rate rounding keeps some where they were"
    gradients = {n for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert gradients == student
    assert {n.split(".")[0] for n in student} <= {"backbone", "proposal_generator", "roi_heads", "kd_trans"}


MOVING = ("MODEL.RESNETS.NORM", "BN", "INPUT.MIN_SIZE_TRAIN", "(48, 64)", "TEST.EVAL_PERIOD", "0")


def test_a_resumed_run_equals_the_uninterrupted_one(small_cfg, tmp_path):
    """Model, optimizer and scheduler, bit for bit, with augmentation, sampled proposals and updates of BatchNorm."""
    opts = (*MOVING, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.STEPS", "(3,)")
    cfg = small_cfg("DKD/ReviewDKD-R18-R101", *opts)
    train(cfg)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tmp_path / "out" / "model_0000001.pth", half)
    (half / "last_checkpoint").write_text("model_0000001.pth")
    resumed, _ = train(small_cfg("DKD/ReviewDKD-R18-R101", *opts, "OUTPUT_DIR", str(half)), resume=True)
    assert resumed.start_iter == 2
    whole, ours = (torch.load(f / "model_final.pth", weights_only=True) for f in (tmp_path / "out", half))
    assert whole["iteration"] == 3 and equal(whole, ours)
    first = torch.load(half / "model_0000001.pth", weights_only=True)
    assert not equal(whole["model"], first["model"])


def test_a_resumed_run_has_the_solver_settings_of_its_configuration(small_cfg, tmp_path, caplog):
    opts = (*MOVING, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.WEIGHT_DECAY_NORM", "None")
    train(small_cfg("DKD/DKD-R18-R101", *opts))
    changed = ("SOLVER.BASE_LR", "0.00025", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.003")
    more = (*changed, "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)")
    with caplog.at_level("INFO", "detectron2.trainer"):
        trainer, _ = train(small_cfg("DKD/DKD-R18-R101", *opts, *more), resume=True)
    (said,) = [record.getMessage() for record in caplog.records if " instead of " in record.getMessage()]
    assert said.startswith("from iteration 2 on: ") and "SOLVER.BASE_LR 0.00025 instead of 0.0001" in said
    assert all(f"SOLVER.{key} " in said for key in ("MOMENTUM", "WEIGHT_DECAY", "MAX_ITER", "STEPS"))
    (group,) = trainer.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.5, 0.003, 0.00025)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == [0.0001, pytest.approx(0.000025)], "at iterations 1 and 3"
    (again,) = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"][
        "param_groups"
    ]
    assert again["lr"] == pytest.approx(0.000025)


def test_a_resumed_run_whose_parameters_are_grouped_otherwise_is_refused(small_cfg):
    opts = (*MOVING, "SOLVER.MAX_ITER", "1")
    train(small_cfg("DKD/DKD-R18-R101", *opts, "SOLVER.WEIGHT_DECAY_NORM", "None"))
    line = refused_weights(small_cfg("DKD/DKD-R18-R101", *opts, "SOLVER.WEIGHT_DECAY_NORM", "0.5"), resume=True)
    assert line.startswith("the checkpoint's optimizer has groups of [") and "SOLVER.WEIGHT_DECAY_NORM" in line


def refused_weights(cfg, resume=False):
    """The line by which the trainer refuses what MODEL.WEIGHTS names."""
    trainer = Trainer(cfg)
    with pytest.raises(UserError) as error:
        trainer.resume_or_load(resume)
    for hook in trainer._hooks:  # a run that was never started leaves its log open
        for writer in getattr(hook, "_writers", ()):
            writer.close()
    return str(error.value)


@pytest.mark.parametrize("resume", [False, True], ids=["from the start", "resumed without a checkpoint"])
def test_a_random_teacher_is_refused(small_cfg, resume):
    """By the trainer too, without the command's checks."""
    line = refused_weights(small_cfg("DKD/DKD-R18-R101", "KD.RANDOM_TEACHER", "False"), resume)
    assert line.startswith("MODEL.WEIGHTS is empty, ") and "detection/merge_weights.py" in line


def test_a_random_teacher_that_was_asked_for(small_cfg, tmp_path):
    """It may come with weights of the student alone; a resumed run needs no permission, its teacher is saved."""
    model = build_model(small_cfg("DKD/DKD-R18-R101"))
    torch.save({"model": student_part(model.state_dict())}, tmp_path / "student.pth")
    opts = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "MODEL.WEIGHTS", str(tmp_path / "student.pth"))
    line = refused_weights(small_cfg("DKD/DKD-R18-R101", *opts, "KD.RANDOM_TEACHER", "False"))
    assert line.startswith("MODEL.WEIGHTS holds no teacher.")
    trainer, _ = train(small_cfg("DKD/DKD-R18-R101", *opts))
    again = small_cfg("DKD/DKD-R18-R101", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "KD.RANDOM_TEACHER", "False")
    resumed, _ = train(again, resume=True)
    assert resumed.start_iter == 1
    assert equal(dict(resumed.model.teacher.state_dict()), dict(trainer.model.teacher.state_dict()))


def test_seeds(small_cfg, tmp_path):
    def weights(seed):
        opts = (*MOVING, "SOLVER.MAX_ITER", "1", "SEED", seed, "OUTPUT_DIR", str(tmp_path / f"run{seed}"))
        trainer, _ = train(small_cfg("DKD/DKD-MV2-R50", *opts))
        return trainer.model.state_dict()

    first = weights("3")
    assert equal(first, weights("3"))
    assert not equal(first, weights("4"))


def test_mixed_precision_on_a_cpu(small_cfg, tmp_path):
    opts = ("MODEL.RESNETS.NORM", "BN", "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0")
    trainer, _ = train(small_cfg("DKD/ReviewDKD-R18-R101", "SOLVER.AMP.ENABLED", "True", *opts))
    assert type(trainer._trainer) is CPUAMPTrainer
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    half = logged(tmp_path / "out")
    train(small_cfg("DKD/ReviewDKD-R18-R101", *opts, "OUTPUT_DIR", str(tmp_path / "full")))
    full = logged(tmp_path / "full")
    names = ["loss_cls", "loss_rpn_cls", "loss_dkd", "loss_reviewkd"]  # the others depend on the proposals drawn
    assert [half[name] for name in names] == pytest.approx([full[name] for name in names], rel=0.1)
    assert any(half[name] != full[name] for name in names), "bfloat16 was used"


def test_the_step_trainer_for_each_precision_and_device():
    precise, mixed, cuda = (
        _small.load("DKD/DKD-R18-R101", "SOLVER.AMP.ENABLED", amp, "MODEL.DEVICE", device)
        for amp, device in (("False", "cpu"), ("True", "cpu"), ("True", "cuda"))
    )
    assert [step_trainer(cfg) for cfg in (precise, mixed, cuda)] == [SimpleTrainer, CPUAMPTrainer, AMPTrainer]


def test_test_time_augmentation_after_training(small_cfg, tmp_path):
    opts = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)", "SOLVER.MAX_ITER", "1")
    train(small_cfg("ReviewKD/ReviewKD-R18-R101-Mask", *opts))
    line = logged(tmp_path / "out")
    assert {"bbox/AP50", "segm/AP50", "bbox_TTA/AP50", "segm_TTA/AP50"} <= line.keys()
    assert (tmp_path / "out" / "inference_TTA" / "coco_instances_results.json").is_file()


def test_pictures_of_proposals(small_cfg, tmp_path):
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(small_cfg("DKD/DKD-R18-R101", "VIS_PERIOD", "1"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    assert events.Tags()["images"] == ["Left: GT bounding boxes;  Right: Predicted proposals"]


def test_a_plain_detector_trains_too(small_cfg, tmp_path):
    """For baselines and for your own teachers, any meta-architecture can be trained, also from scratch."""
    train(small_cfg("DKD/DKD-R18-R101", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KD.RANDOM_TEACHER", "False"))
    assert {key for key in logged(tmp_path / "out") if key.startswith("loss_")} == STUDENT


def test_another_kind_of_data_set_is_refused(small_cfg):
    with pytest.raises(UserError, match="'voc_2007_test' is evaluated as 'pascal_voc'"):
        Trainer.build_evaluator(small_cfg("DKD/DKD-R18-R101"), "voc_2007_test")


def test_the_tiny_configs(datasets):
    """The configs of docs/detection.md can be read, and student and teacher have the same pyramid."""
    folder = _small.HERE / "configs" / "Tiny"
    opts = [*_small.ON_SYNTHETIC, "MODEL.DEVICE", "cpu"]
    teacher, student = (load_cfg(folder / f"{name}.yaml", opts) for name in ("Teacher-R50", "ReviewDKD-R18-R50"))
    for key in ("RESNETS", "FPN", "PIXEL_MEAN", "PIXEL_STD", "ROI_HEADS", "ROI_BOX_HEAD"):
        ours, theirs = student.TEACHER.MODEL[key], teacher.MODEL[key]
        if key == "ROI_HEADS":  # in distillation only the student samples proposals
            ours, theirs = ours.NUM_CLASSES, theirs.NUM_CLASSES
        assert ours == theirs, key
    assert len(next(iter(build_train_loader(student, seed=0)))) == 4
