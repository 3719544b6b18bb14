"""Merge a student's and a teacher's weights into one file, and export the student's from such a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from mdistiller.engine.files.checkpoint import save_checkpoint
from mdistiller.errors import UserError
from mdistiller.user_files import writing

from .. import HERE
from .annotations import set_num_classes
from .weights import NOT_STUDENT, Placed, classes_in, place, read_weights

TEACHER, BACKBONE = "teacher.", "backbone.bottom_up."
# ResNets by the number of blocks in their third stage.
RESNETS = {2: "R18", 6: "R50", 23: "R101"}
THIRD_STAGE = re.compile(r"(?:layer3\.|res4[._])(\d+)[._]")


def student_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's entries of an RCNNKD's `state`."""
    return {name: value for name, value in state.items() if not name.startswith(NOT_STUDENT)}


def network_name(path: str | Path, weights: Iterable[str]) -> str:
    """R18, R50, R101 or MV2, recognised by the names of the weights in the file at `path`.

    Raises:
        UserError: it is none of them.
    """
    names = [name for name in weights if not name.startswith(NOT_STUDENT)]
    if any(re.search(r"(^|\.)(conv_stem|features\.\d+\.conv)\.", name) for name in names):
        return "MV2"
    blocks = {int(found[1]) for name in names if (found := THIRD_STAGE.search(name))}
    if len(blocks) not in RESNETS:
        raise UserError(f"{path} is not a ResNet-18, -50 or -101 or a MobileNetV2; name the config by --config-file")
    return RESNETS[len(blocks)]


def config_for(teacher: str | Path, student: str | Path) -> Path:
    """The published config for the networks in two files; Mask R-CNN's if the teacher predicts masks.

    Raises:
        UserError: there is none.
    """
    weights_teacher, weights_student = read_weights(teacher)[0], read_weights(student)[0]
    pair = f"{network_name(student, weights_student)}-{network_name(teacher, weights_teacher)}"
    mask = "-Mask" if any(name.startswith("roi_heads.mask_head.") for name in weights_teacher) else ""
    path = HERE / "configs" / "ReviewKD" / f"ReviewKD-{pair}{mask}.yaml"
    if not path.is_file():
        raise UserError(f"no published config has the student and teacher {pair}; name one by --config-file")
    return path


def merge(cfg: CfgNode, teacher: str | Path, student: str | Path | None, output: str | Path) -> tuple[Placed, Placed]:
    """Write the file that MODEL.WEIGHTS names, and return what was matched.

    Args:
        cfg: the configuration of an RCNNKD.
        teacher: a file of a detector's weights.
        student: a file of the weights of a detector or its bottom-up network; None to train it from scratch.

    Returns:
        What was matched in the teacher and in the student.

    Raises:
        UserError: a tensor has another shape; the teacher or the student's network is incomplete.
    """
    if cfg.MODEL.META_ARCHITECTURE != "RCNNKD":
        raise UserError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which has no teacher; use RCNNKD")
    cfg = with_classes(cfg, teacher, read_weights(teacher)[0])
    state = build_model(cfg).state_dict()
    of_teacher = {name.removeprefix(TEACHER): value for name, value in state.items() if name.startswith(TEACHER)}
    of_student = student_part(state)
    in_teacher = place(teacher, of_teacher)
    _require(in_teacher.missing, f"{teacher} is not a complete teacher")
    in_student = place(student, of_student) if student else Placed({}, [], list(of_student))
    if student:
        _require([k for k in in_student.missing if k.startswith(BACKBONE)], f"{student} is not the student's network")
    merged = in_student.weights | {TEACHER + name: value for name, value in in_teacher.weights.items()}
    with writing(output):
        save_checkpoint({"model": {name: value.contiguous() for name, value in merged.items()}}, output)
    return in_teacher, in_student


def with_classes(cfg: CfgNode, path: str | Path, weights: Mapping[str, Tensor]) -> CfgNode:
    """`cfg` with the number of classes of the detector's `weights` in the file at `path`.

    Raises:
        UserError: the configuration sets another number.
    """
    count = classes_in(weights)
    cfg = cfg.clone()
    if count is not None:
        set_num_classes(cfg, count, f"{path} knows")
    return cfg


def stride_note(cfg: CfgNode, student: str | Path) -> str:
    """A note if the student's bottlenecks have their stride in another convolution than the config says, else ""."""
    names = list(read_weights(student)[0])
    elsewhere = "layer1.0.conv3.weight" in names and cfg.MODEL.RESNETS.STRIDE_IN_1X1
    note = "torchvision's and timm's bottlenecks have their stride in the 3x3 convolution: train with "
    return f"note: {note}MODEL.RESNETS.STRIDE_IN_1X1 False" if elsewhere else ""


def _require(missing: list[str], problem: str) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{problem}: it lacks {', '.join(missing[:3])}{more}; is it what the config names?")


def export(weights: str | Path, output: str | Path) -> int:
    """Write the student of an RCNNKD's checkpoint as a plain detectron2 checkpoint; return its number of tensors.

    Raises:
        UserError: there is no student in the file.
    """
    student = student_part(read_weights(weights)[0])
    if not student:
        raise UserError(f"{weights} holds no student: nothing except teacher.* and kd_*")
    with writing(output):
        save_checkpoint({"model": student}, output)
    return len(student)


def student_cfg(cfg: CfgNode, weights: str | Path) -> CfgNode:
    """The configuration of the student alone. Plain detectron2 has all its keys, except those of a MobileNetV2.

    Args:
        weights: the student's file, which tells the number of classes.
    """
    cfg = with_classes(cfg, weights, read_weights(weights)[0]) if Path(weights).is_file() else cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.removesuffix("_kd")
    cfg.MODEL.WEIGHTS = str(Path(weights).resolve())
    del cfg["KD"], cfg["TEACHER"], cfg.DATASETS["OWN"]
    if "mobilenetv2" not in cfg.MODEL.BACKBONE.NAME:
        del cfg.MODEL["MOBILENETV2"]
    return cfg
