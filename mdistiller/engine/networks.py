"""The networks of a run: by name, with the weights that their source publishes or a file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from shlex import quote
from typing import Any

import torch.nn as nn
from yacs.config import CfgNode as CN

from ..console import note
from ..dataset import OWN_LOADER, DatasetInfo
from ..distillers import Distiller, RunFacts
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..grouping import load_groups
from ..models import build_model, teacher_checkpoint
from ..models.grouped import GroupedStudent
from ..models.native import FAMILIES, NativeInput, family_of, native_input
from ..models.own_input import with_own_input
from ..models.sources import build_network, is_foreign, source_of
from ..paths import find_file
from ..registry import Registry
from .cfg import load_cfg
from .files.checkpoint import INPUT, OtherHead, check_classes, load_model_weights, load_state


@dataclass(frozen=True)
class Named:
    """A network, as settings or a command line name it.

    Attributes:
        name: of a registry, or of another source, see `models.sources`.
        family: the model family of the data set, in whose registry a bare name is looked for; "any": see `family_of`.
        classes: C, of the data set.
        image_size: height and width of the images that the network sees, in pixels.
        feats: the modules whose outputs are its feature maps; only for networks of other sources.
        role: the beginning of its settings' names, such as "DISTILLER.TEACHER".
    """

    name: str
    family: str
    classes: int
    image_size: int
    feats: Sequence[str] = ()
    role: str = "DISTILLER.TEACHER"

    @classmethod
    def of(cls, cfg: CN, role: str, info: DatasetInfo, facts: RunFacts) -> Named:
        """The "STUDENT" or the "TEACHER" of a run."""
        size = (cfg.DISTILLER.TEACHER_SIZE if role == "TEACHER" else 0) or facts.image_size
        feats = tuple(cfg.DISTILLER[f"{role}_FEATS"])
        return cls(cfg.DISTILLER[role], info.model_family, facts.num_classes, size, feats, f"DISTILLER.{role}")

    @property
    def registry(self) -> Registry:
        """Where a bare name is found."""
        family = family_of(self.name, self.image_size) if self.family == "any" else self.family
        return FAMILIES[family][0]


def fresh(named: Named) -> nn.Module:
    """The network with random weights.

    Raises:
        UserError: no such network, or modules are named of one whose feature maps are fixed.
    """
    if is_foreign(named.name):
        return build_network(named.name, named.classes, named.image_size, feats=named.feats)
    if named.feats:
        raise UserError(
            f"{named.role}_FEATS names modules of networks of other sources, such as timm/resnet18; the feature maps "
            f"of {named.name} are fixed: leave it []"
        )
    return build_model(named.registry, named.name, named.classes)


def published(named: Named) -> nn.Module:
    """The network with the weights that its source publishes.

    Raises:
        OtherHead: they are of another number of classes.
        UserError: there are none.
    """
    if not is_foreign(named.name):
        return _published_here(named)
    source, own = source_of(named.name)
    count = source.num_classes(own)
    if count not in (0, named.classes):
        message = f"the published weights of {named.name} have {count} classes, the data has {named.classes}"
        raise OtherHead(message, count, named.classes)
    return build_network(named.name, named.classes, named.image_size, pretrained=True, feats=named.feats)


def _published_here(named: Named) -> nn.Module:
    """`published`, of a network of a registry: by its constructor's `pretrained`, or from download_ckpts."""
    entry = named.registry[named.name]
    if not isinstance(entry, tuple) and _loads_weights(entry):
        try:
            return build_model(named.registry, named.name, named.classes, pretrained=True)
        except UserError as error:
            count = getattr(signature(entry).parameters.get("num_classes"), "default", None)
            if not isinstance(count, int) or count == named.classes:
                raise
            raise OtherHead(str(error), count, named.classes) from None
    network, path = fresh(named), _published_path(named)
    if not path and named.role == "DISTILLER.STUDENT":
        off = "set DISTILLER.STUDENT_PRETRAINED False, or DISTILLER.STUDENT_CKPT to a file"
        raise UserError(f"{named.name} has no published checkpoint to start from; {off}")
    load_model_weights(network, teacher_checkpoint(path, named.name))
    return network


def _loads_weights(constructor: Callable[..., nn.Module]) -> bool:
    """Whether a constructor takes `pretrained`; one that a user has registered may not."""
    parameters = signature(constructor).parameters.values()
    return any(p.name == "pretrained" or p.kind is Parameter.VAR_KEYWORD for p in parameters)


def from_file(named: Named, path: str, groups: str = "") -> tuple[nn.Module, Mapping[str, Any]]:
    """The network with the weights of a file, and the file's `description_of` the images that it was trained on.

    Args:
        groups: for the checkpoint of a plain network that DCGD grouped: a grouping file, or a published one's name.

    Raises:
        OtherHead: it is of another number of classes.
        UserError: no such file, or one of another network.
    """
    network = fresh(named)
    if groups:
        network = GroupedStudent(network, load_groups(groups))
    return network, load_model_weights(network, teacher_checkpoint(path, named.name))


def with_weights(named: Named, path: str = "", groups: str = "") -> tuple[nn.Module, Mapping[str, Any]]:
    """`from_file`, or without a path the `published` network; see there."""
    if path or groups:
        return from_file(named, path or _published_path(named), groups)
    return published(named), {}


def _published_path(named: Named) -> str:
    entry = None if is_foreign(named.name) else named.registry[named.name]
    return (entry[1] or "") if isinstance(entry, tuple) else ""


def starting_student(cfg: CN, named: Named, class_names: Sequence[str] | None) -> nn.Module:
    """The student as its training starts: with random weights, those of a file, or those that its source publishes.

    Where these are of another number of classes, its head is random, and a note says so.

    Args:
        class_names: those of the data; a file of as many other classes is refused.

    Raises:
        UserError: the weights do not fit in anything but the head, or are of other classes.
    """
    network, path = fresh(named), cfg.DISTILLER.STUDENT_CKPT
    if path:
        file = teacher_checkpoint(path, named.name, "DISTILLER.STUDENT_CKPT")
        try:
            check_classes(load_model_weights(network, file), file, class_names)
        except OtherHead as other:
            load_model_weights(network, file, other.names)
            _say_fresh(named, str(file), other)
    elif cfg.DISTILLER.STUDENT_PRETRAINED:
        _copy_body(network, named)
    return network


def _copy_body(network: nn.Module, named: Named) -> None:
    """Give `network` the weights that its source publishes, but for a head of another number of classes."""
    state, what = _with_any_head(named, "")[0].state_dict(), f"the published weights of {named.name}"
    try:
        load_state(network, state, what)
    except OtherHead as other:
        own = network.state_dict()
        load_state(network, {**state, **{name: own[name] for name in other.names}}, what)
        _say_fresh(named, what, other)


def _say_fresh(named: Named, what: str, other: OtherHead) -> None:
    if current_ranks().first:
        note(
            f"{what}: the head of {other.saved} classes ({', '.join(other.names)}) is left out; the student "
            f"{named.name} begins with a fresh one of {other.own}"
        )


def _with_any_head(named: Named, path: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """`with_weights`, with as many classes as the weights have."""
    try:
        return with_weights(named, path)
    except OtherHead as other:
        return with_weights(replace(named, classes=other.saved), path)


def frozen_teacher(cfg: CN, info: DatasetInfo, facts: RunFacts, method: type[Distiller]) -> nn.Module:
    """The teacher of a run, with trained weights, which sees the images as it was made to.

    Raises:
        UserError: it would have random weights; or a head of other classes, and the method may read its logits; or its
            weights do not fit.
    """
    named, path = Named.of(cfg, "TEACHER", info, facts), cfg.DISTILLER.TEACHER_CKPT
    if not path and not cfg.DISTILLER.TEACHER_PRETRAINED:
        raise UserError(
            f"the teacher {named.name} would have random weights: set DISTILLER.TEACHER_CKPT to a file, or "
            "DISTILLER.TEACHER_PRETRAINED True"
        )
    read = method.teacher_outputs
    try:
        network, told = with_weights(named, path)
        if read is None or "logits" in read or cfg.DISTILLER.SCORE_TEACHER:
            check_classes(told, path, facts.class_names)
    except OtherHead as other:
        if read is None or "logits" in read:
            raise _unfit_head(cfg, info, named, method, other) from None
        if cfg.DISTILLER.SCORE_TEACHER:
            raise UserError(
                f"DISTILLER.SCORE_TEACHER compares the teacher's logits with the labels, but the head of {named.name} "
                f"has {other.saved} classes and the data {other.own}; leave it False"
            ) from None
        network, told = _with_any_head(named, path)
    return seeing_its_own(network, named, facts.mean, facts.std, facts.image_size, told)


def teacher_classes(cfg: CN, info: DatasetInfo) -> int:
    """How many classes the teacher's weights are of; for data that does not tell any.

    Raises:
        UserError: no such teacher or file, or one of another network.
    """
    size = cfg.DISTILLER.TEACHER_SIZE or info.image_size
    named = Named(cfg.DISTILLER.TEACHER, info.model_family, 2, size)
    try:
        with_weights(named, cfg.DISTILLER.TEACHER_CKPT)
    except OtherHead as other:
        return other.saved
    return named.classes


def untrained_teacher(cfg: CN, info: DatasetInfo, facts: RunFacts) -> nn.Module:
    """The same with random weights, for what only needs its layers; no file is read."""
    named = Named.of(cfg, "TEACHER", info, facts)
    return seeing_its_own(fresh(named), named, facts.mean, facts.std, facts.image_size, {})


def seeing_its_own(
    network: nn.Module,
    named: Named,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    image_size: int,
    told: Mapping[str, Any],
) -> nn.Module:
    """`network` behind the change from the data's images to its own (`OwnInput`), where they differ.

    Its own normalisation is that of the images on which its checkpoint was trained, or else that of its source. Without
    either, as for a network of a data set's registry, it is the data's.

    Args:
        mean, std: of the data, if they are known.
        image_size: of the data; the network's own is `named.image_size`.
        told: its checkpoint's description of images, see `from_file`.
    """
    native = native_input(named.name, named.image_size) if _has_own(named) else None
    own = _told_input(told.get(INPUT, {}), native) or native
    size = named.image_size if named.image_size != image_size else 0
    if not mean or not std:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if own is not None and current_ranks().first:
            note(f"{named.name} sees images normalised as the data is, which does not tell its mean and std")
        own = None
    same = NativeInput(image_size, mean, std)
    if own is None:
        own = replace(same, interpolation=native.interpolation) if native else same
    return with_own_input(network, mean, std, own, size)


def _has_own(named: Named) -> bool:
    """Whether a network has images of its own: those of a data set's registry are trained on the data set's."""
    return is_foreign(named.name) or named.family == "any"


def _told_input(told: Mapping[str, Any], native: NativeInput | None) -> NativeInput | None:
    if not (told.get("mean") and told.get("std")):
        return None
    interpolation = native.interpolation if native else "bilinear"
    return NativeInput(told.get("image_size", 0), told["mean"], told["std"], interpolation=interpolation)


def _unfit_head(
    cfg: CN, info: DatasetInfo, named: Named, method: type[Distiller], other: OtherHead
) -> UserError:
    """The refusal of a teacher whose logits are of other classes, with the command, or the call, that fine-tunes it."""
    if not info.labelled:  # they have no classes but the teacher's
        return UserError(
            f"the teacher {named.name} has a head of {other.saved} classes, but DATASET.NUM_CLASSES is {other.own}; "
            f"set it to 0 or to {other.saved}"
        )
    what = (
        f"the teacher {named.name} has a head of {other.saved} classes, the data has {other.own}, and "
        f"{method.__name__} may read its logits; fine-tune it first, by "
    )
    if cfg.DATASET.TYPE == OWN_LOADER:
        file = cfg.DISTILLER.TEACHER_CKPT
        start = f"student_ckpt={file!r}" if file else "student_pretrained=True"
        return UserError(
            f"{what}mdistiller.distill({named.name!r}, None, train_loader, val_loader, method='NONE', "
            f"num_classes={other.own}, {start}), and give its result.student as the teacher"
        )
    kind = cfg.DATASET.TYPE.partition("/")[0]
    files = [f"configs/{kind}/{name}.yaml" for name in ("teacher", "vanilla")]
    config = next((file for file in files if find_file(file)), "configs/folder/teacher.yaml")
    start = f"DISTILLER.STUDENT_CKPT {quote(cfg.DISTILLER.TEACHER_CKPT)}" if cfg.DISTILLER.TEACHER_CKPT else (
        "DISTILLER.STUDENT_PRETRAINED True"
    )  # fmt: skip
    return UserError(
        f"{what}python tools/train.py --cfg {config} DISTILLER.STUDENT {quote(named.name)} "
        f"{start}{_data_settings(cfg, config)}, and set DISTILLER.TEACHER_CKPT to its student_best"
    )


def _data_settings(cfg: CN, config: str) -> str:
    """What names the data of a run, as overrides of the file `config`, as a shell takes them."""
    there = load_cfg(find_file(config) or config).DATASET
    keys = ("ROOT", "TRAIN", "VAL", "VAL_FRACTION", "IMAGE_COLUMN", "LABEL_COLUMN")
    given = {key: cfg.DATASET[key] for key in keys if cfg.DATASET[key] != there[key]}
    return "".join(f" DATASET.{key} {quote(str(value))}" for key, value in {"TYPE": cfg.DATASET.TYPE, **given}.items())


__all__ = [
    "Named", "fresh", "frozen_teacher", "published", "seeing_its_own", "starting_student", "teacher_classes",
    "untrained_teacher", "with_weights",
]  # fmt: skip
