"""Read weights from files of all formats in use, without running code, and map their names to detectron2's."""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor

from mdistiller.engine.files import inert_pickle
from mdistiller.engine.files.checkpoint import strip_module
from mdistiller.errors import UserError

from .backbone.mobilenetv2 import GROUPS

# Prefixes of the state dict entries of an RCNNKD that do not belong to its student.
NOT_STUDENT = ("teacher.", "kd_")
CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"

NO_TEACHER = (
    "MODEL.WEIGHTS is empty, so the teacher would be random: make a file of student and teacher with "
    "detection/merge_weights.py and name it in MODEL.WEIGHTS, or ask for a random teacher with KD.RANDOM_TEACHER True"
)


NO_STUDENT = (
    "MODEL.WEIGHTS is empty, so --eval-only would score random weights: name a checkpoint, such as "
    "MODEL.WEIGHTS output/.../model_final.pth"
)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint as {"model": weights by name, ...}: a .pkl of detectron2's zoo or Caffe2, or torch.save's.

    For a Caffe2 file, "matching_heuristics" is also set: detectron2 then matches Caffe2's names to its own.

    Raises:
        UserError: the file does not exist, is damaged, or names what would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                data = inert_pickle.load(file, encoding="latin1")
        elif tarfile.is_tarfile(path):  # torch would unpack one that is in its first format
            raise ValueError("it is a tar archive; unpack it and name the file of weights in it")
        else:
            data = torch.load(path, map_location="cpu", pickle_module=inert_pickle, weights_only=False)
    except Exception as error:  # a damaged file fails anywhere inside zipfile, pickle or torch
        reason = str(error)[:200] or type(error).__name__
        raise UserError(f"{path} is not a readable file of weights: {reason}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not weights by name")
    if path.suffix == ".pkl" and "__author__" not in data:
        weights = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        data = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    return data if "model" in data else {"model": data.get("state_dict", data)}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint file by name, and whether the names are Caffe2's.

    Raises:
        UserError: as `read_checkpoint`, or an entry is not a tensor.
    """
    data = read_checkpoint(path)
    weights = {}
    for name, value in data["model"].items():
        if not isinstance(value, (Tensor, np.ndarray)):
            raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
        weights[name] = torch.as_tensor(value)
    return strip_module(weights), bool(data.get("matching_heuristics"))


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, reading files with `read_checkpoint`.

    Attributes:
        whole_teacher: refuse no weights, and weights that lack any tensor of the teacher; detectron2 only warns.
        whole_student: likewise for the network that is scored.
    """

    whole_teacher = False
    whole_student = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As detectron2's; without a `path` nothing is loaded.

        Raises:
            UserError: as `read_checkpoint`; with `whole_teacher`, the teacher or a part of it would stay random.
        """
        if not path and self.whole_teacher and any(name.startswith("teacher.") for name in self.model.state_dict()):
            raise UserError(NO_TEACHER)
        if not path and self.whole_student:
            raise UserError(NO_STUDENT)
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        try:
            left = super()._load_model(checkpoint)
        except ValueError as error:
            if not checkpoint.get("matching_heuristics"):
                raise
            # Names are matched by their ends: those of a single network fit the student's and the teacher's.
            raise UserError(
                f"MODEL.WEIGHTS holds no student and teacher ({error}); detection/merge_weights.py makes such a file"
            ) from None
        shapes = {name: f" of shape {model}, but {file}" for name, file, model in left.incorrect_shapes}
        lost = [name for name in left.missing_keys if name.startswith("teacher.")]
        if lost and self.whole_teacher:
            raise UserError(
                f"MODEL.WEIGHTS holds no {lost[0]}{shapes.get(lost[0], '')}; {len(lost)} tensors of the teacher are "
                "missing. Classes and network must be those of TEACHER.MODEL; detection/merge_weights.py makes the file"
                + _other_classes(left.incorrect_shapes, "teacher.")
            )
        lost = [name for name in left.missing_keys if not name.startswith(NOT_STUDENT)]
        if lost and self.whole_student:
            raise UserError(
                f"MODEL.WEIGHTS holds no {lost[0]}{shapes.get(lost[0], '')}; {len(lost)} tensors of the network that "
                "--eval-only scores are missing. Name a checkpoint of the network that the config describes"
                + _other_classes(left.incorrect_shapes, "")
            )
        return left

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)


def _other_classes(shapes: Iterable[tuple[str, Any, Any]], prefix: str) -> str:
    """A note if the classifier whose name begins with `prefix` is for another number of classes, else ""."""
    for name, file, model in shapes:
        if name == prefix + CLASSIFIER:
            return f" (it knows {file[0] - 1} classes, the data has {model[0] - 1}: docs/detection.md, Your own data)"
    return ""


def classes_in(weights: Mapping[str, Tensor]) -> int | None:
    """How many classes a detector's weights, by detectron2's names, know besides the background."""
    return len(weights[CLASSIFIER]) - 1 if CLASSIFIER in weights else None


# From torchvision's and timm's names to detectron2's; a name that matches no rule stays unchanged.
Rules = list[tuple[str, Any]]
RESNET: Rules = [
    (r"conv1\.(.+)", r"stem.conv1.\1"),
    (r"bn1\.(.+)", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.(.+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.{m[3]}"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(.+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.(.+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.{m[4]}"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(.+)", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}"),
]
# In this project, every block is one flat nn.Sequential: convolution, normalisation, activation, three times, or twice
# in the first block.
TORCHVISION_MOBILENET: Rules = [
    (r"features\.(\d+)\.conv\.(\d)\.(\d)\.(.+)", lambda m: f"features.{m[1]}.conv.{3 * int(m[2]) + int(m[3])}.{m[4]}"),
    (r"features\.1\.conv\.([12])\.(.+)", lambda m: f"features.1.conv.{int(m[1]) + 2}.{m[2]}"),
    (r"features\.(\d+)\.conv\.([23])\.(.+)", lambda m: f"features.{m[1]}.conv.{int(m[2]) + 4}.{m[3]}"),
]
LAYERS = {"conv_pw": 0, "bn1": 1, "conv_dw": 3, "bn2": 4, "conv_pwl": 6, "bn3": 7}
LAYERS_OF_FIRST = {"conv_dw": 0, "bn1": 1, "conv_pw": 3, "bn2": 4}
# The index in `features` of each group's first block.
FIRST_BLOCKS = [1, *itertools.accumulate((repeats for _, _, repeats, _ in GROUPS), initial=1)][1:]
TIMM_MOBILENET: Rules = [
    (r"conv_stem\.(.+)", r"features.0.0.\1"),
    (r"bn1\.(.+)", r"features.0.1.\1"),
    (r"blocks\.0\.0\.(\w+)\.(.+)", lambda m: f"features.1.conv.{LAYERS_OF_FIRST[m[1]]}.{m[2]}"),
    (
        r"blocks\.(\d)\.(\d)\.(\w+)\.(.+)",
        lambda m: f"features.{FIRST_BLOCKS[int(m[1])] + int(m[2])}.conv.{LAYERS[m[3]]}.{m[4]}",
    ),
]
# A pattern in the names that identifies each format, and its rules; the first that matches is used.
FORMATS: list[tuple[str, Rules]] = [
    (r"layer1\.0\.", RESNET),
    (r"conv_stem\.", TIMM_MOBILENET),
    (r"features\.\d+\.conv\.\d\.\d\.", TORCHVISION_MOBILENET),
]
# Names of a classification network, which becomes the detector's bottom-up network.
NETWORK = re.compile(r"(stem|res\d|features)\.")


def detectron_names(weights: Iterable[str]) -> dict[str, str]:
    """Map a file's names to detectron2's; the file may be torchvision's, timm's or detectron2's."""
    weights = list(weights)
    rules = next((rules for sign, rules in FORMATS if any(re.match(sign, name) for name in weights)), [])
    return {name: _rename(name, rules) for name in weights}


def _rename(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, new, name)
            break
    return f"backbone.bottom_up.{name}" if NETWORK.match(name) else name


@dataclass
class Placed:
    """A file's weights that were matched to a model's.

    Attributes:
        weights: by the model's names.
        homeless: names of the file that the model does not have.
        missing: names of the model that the file does not have.
    """

    weights: dict[str, Tensor]
    homeless: list[str]
    missing: list[str]


def place(path: str | Path, state: Mapping[str, Tensor]) -> Placed:
    """Match each tensor of the file at `path` to a detector's `state`.

    Caffe2's networks have no running statistics, which are folded into weight and bias; `state`'s are kept.

    Raises:
        UserError: as `read_weights`, or a tensor has another shape than the model's.
    """
    weights, caffe2 = read_weights(path)
    if caffe2:
        weights = align_and_update_state_dicts(dict(state), weights, c2_conversion=True)
    names = detectron_names(weights)
    placed = {names[name]: value for name, value in weights.items() if names[name] in state}
    for name, value in placed.items():
        if value.shape != state[name].shape:
            shapes = f"{tuple(value.shape)}, the model's {tuple(state[name].shape)}"
            raise UserError(f"{path}: {name} has shape {shapes}; is it the network that the config names?")
    if caffe2:
        absorbed = [k for k in state if "running_" in k and f"{k.rsplit('.', 1)[0]}.weight" in placed]
        placed = {k: state[k] for k in absorbed} | placed
    homeless = [name for name in weights if names[name] not in state]
    return Placed(placed, homeless, [name for name in state if name not in placed])
