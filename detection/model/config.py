"""The configuration: detectron2's own, KD for the method, TEACHER for the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, CascadeROIHeads, RROIHeads, StandardROIHeads
from fvcore.common.registry import Registry

from mdistiller.errors import UserError
from mdistiller.paths import expanded
from mdistiller.registry import unknown_name
from mdistiller.user_files import parse_yaml

from .losses import kd_types

# Channel orders that are each other's reverse, so that the teacher can read the student's images.
COLOURS = ("BGR", "RGB")
# Keys of the original's configs that had no effect.
UNUSED = ("MODEL.MOBILENETV2.DEBUG", "TEACHER.KD")


def add_distillation_cfg(cfg: CfgNode) -> None:
    """Add this project's keys to detectron2's `cfg`. TEACHER holds all keys and defaults of the installed detectron2.

    Two of detectron2's defaults change: MODEL.DEVICE is the CPU where there is no GPU, and SEED is 0.
    """
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.SEED = 0
    cfg.MODEL.MOBILENETV2 = CfgNode({"OUT_FEATURES": ["m2"], "NORM": "FrozenBN"})
    cfg.KD = CfgNode({"TYPE": "DKD", "DKD": {"ALPHA": 1.0, "BETA": 0.25, "T": 1.0}, "REVIEWKD": {"LOSS_WEIGHT": 1.0}})
    # Whether MODEL.WEIGHTS may be empty, or lack tensors of the teacher, which then keep their random values.
    cfg.KD.RANDOM_TEACHER = False
    # Data of your own in COCO's format, as [name, annotation file, image folder]; TRAIN and TEST then take their names.
    cfg.DATASETS.OWN = []
    cfg.TEACHER = get_cfg()
    cfg.TEACHER.MODEL.MOBILENETV2 = cfg.MODEL.MOBILENETV2.clone()
    for key in UNUSED:
        cfg.register_deprecated_key(key)


def load_cfg(path: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """The configuration in `path`, overridden by `opts` (KEY VALUE KEY VALUE ...), checked and frozen.

    Raises:
        UserError: no such file, a key that stands twice in it or in a base, an unknown key, a value of the wrong type,
            an unknown MODEL.META_ARCHITECTURE, or what `check_pair` refuses for RCNNKD.
    """
    path = expanded(path)
    if path and not Path(path).is_file():
        raise UserError(f"no config file at {path}; detection/configs/ holds the published ones")
    cfg = get_cfg()
    add_distillation_cfg(cfg)
    try:
        if path:
            _Checked.load_yaml_with_base(path)
            cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except UserError:
        raise
    except Exception as error:  # yacs, literal_eval and PyYAML raise many types
        raise UserError(f"config {path} {' '.join(opts)}: {error}") from None
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = expanded(cfg.OUTPUT_DIR), expanded(cfg.MODEL.WEIGHTS)
    # One model, one device.
    cfg.TEACHER.MODEL.DEVICE = cfg.MODEL.DEVICE
    _check_registered("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    if cfg.MODEL.META_ARCHITECTURE == "RCNNKD":
        check_pair(cfg)
    cfg.freeze()
    return cfg


class _Checked(CfgNode):
    """Opens a config and its bases (`_BASE_`), and refuses a key that stands twice in one."""

    @classmethod
    def _open_cfg(cls, filename: str) -> StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        parse_yaml(text, f"config {filename}")
        return StringIO(text)


def check_pair(cfg: CfgNode) -> None:
    """Refuse a student and a teacher that cannot be compared.

    Raises:
        UserError: an unknown KD.TYPE; a teacher that is no R-CNN or has a teacher itself; an unknown backbone or box
            head; ROI heads without what the losses read; different numbers of classes; a channel order other than BGR
            and RGB; a value in TEACHER.MODEL.WEIGHTS, which would not be read.
    """
    kd_types[cfg.KD.TYPE]
    _check_architectures(cfg)
    classes_student, classes_teacher = (c.MODEL.ROI_HEADS.NUM_CLASSES for c in (cfg, cfg.TEACHER))
    if classes_student != classes_teacher:
        raise UserError(
            f"the student knows {classes_student} classes and the teacher {classes_teacher}: set MODEL.ROI_HEADS."
            "NUM_CLASSES and TEACHER.MODEL.ROI_HEADS.NUM_CLASSES to the same number, that of the teacher's weights"
        )
    for name, value in (("INPUT.FORMAT", cfg.INPUT.FORMAT), ("TEACHER.INPUT.FORMAT", cfg.TEACHER.INPUT.FORMAT)):
        if value not in COLOURS:
            raise UserError(f"{name} is {value!r}; it must be BGR or RGB, so that student and teacher can share images")
    if cfg.TEACHER.MODEL.WEIGHTS:
        raise UserError(
            f"TEACHER.MODEL.WEIGHTS is {cfg.TEACHER.MODEL.WEIGHTS!r}, but MODEL.WEIGHTS names one file for both; "
            "make it with detection/merge_weights.py"
        )


def _check_architectures(cfg: CfgNode) -> None:
    """Refuse a teacher that is not one R-CNN alone, and ROI heads that do not classify each proposal once."""
    teachers = _names(META_ARCH_REGISTRY, GeneralizedRCNN, META_ARCH_REGISTRY.get("RCNNKD"))
    teacher = cfg.TEACHER.MODEL.META_ARCHITECTURE
    if teacher not in teachers:
        hint = ", also for a teacher that was a student of RCNNKD" if teacher == "RCNNKD" else ""
        raise UserError(
            f"TEACHER.MODEL.META_ARCHITECTURE must be {' or '.join(teachers)}{hint}, because the teacher classifies "
            f"the student's proposals; it is {teacher!r}"
        )
    heads = _names(ROI_HEADS_REGISTRY, StandardROIHeads, CascadeROIHeads, RROIHeads)
    for whose, model in (("MODEL", cfg.MODEL), ("TEACHER.MODEL", cfg.TEACHER.MODEL)):
        if model.ROI_HEADS.NAME not in heads:
            raise UserError(f"{whose}.ROI_HEADS.NAME must be {' or '.join(heads)}, it is {model.ROI_HEADS.NAME}")
        _check_registered(f"{whose}.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY)
        _check_registered(f"{whose}.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME, ROI_BOX_HEAD_REGISTRY)


def _check_registered(key: str, name: str, registry: Registry) -> None:
    if name not in registry:
        raise unknown_name(key, name, [known for known, _ in registry])


def _names(registry: Registry, kind: type, *excluded: type) -> list[str]:
    """The names in `registry` of `kind` and its subclasses, except the `excluded` ones and theirs."""
    classes = [(name, entry) for name, entry in registry if isinstance(entry, type)]
    return [name for name, entry in classes if issubclass(entry, kind) and not issubclass(entry, excluded)]
