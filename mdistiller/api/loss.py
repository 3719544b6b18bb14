"""`distiller`: a method's loss, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..dataset import OWN_LOADER
from ..dataset.batch import host_index
from ..dataset.contrastive import ContrastiveSampler
from ..dataset.labels import as_labels, check_labels
from ..distillers import Distiller, RunFacts, distiller_dict
from ..distillers.contract import learnable_parameters
from ..engine.cfg import cfg_of
from ..engine.modes import check_modes
from ..engine.update import SumUpdate
from ..errors import UserError
from ..models.parameters import flat_parameters
from .loaders import image_size_of
from .networks import as_given, check_given, classes_of, method_of, name_of
from .settings import method_name, settings_given, tree_of


class Loss(nn.Module):
    """A method with its student and teacher: (images, labels) -> (loss, its terms). `distiller` makes it.

    A module: `.to(device)`, `.train()`, `.eval()` and `state_dict()` are those of all its networks and layers. The
    teacher stays in eval mode and gets no gradients.

    Attributes:
        student, teacher: the networks as the caller gave them.
        method: the `mdistiller.distillers.Distiller` below.

    Example:
        >>> import torch, mdistiller
        >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 5))
        >>> images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> distiller = mdistiller.distiller("KD", student, teacher, example=images)
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
        >>> for step in range(3):
        ...     loss, terms = distiller(images, labels)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> sorted(terms)
        ['loss_ce', 'loss_kd']
    """

    def __init__(
        self,
        method: Distiller,
        student: nn.Module | str | None = None,
        teacher: nn.Module | str | None = None,
        draw: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        # In a dictionary, as they are in the method already.
        self._given = {"student": student, "teacher": teacher}
        self._draw = draw

    @property
    def student(self) -> nn.Module:
        """The student, as it was given; what it learns is in it."""
        return as_given(self.method.student, self._given["student"])

    @property
    def teacher(self) -> nn.Module:
        """The teacher, as it was given."""
        return as_given(self.method.teacher, self._given["teacher"])

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What an optimizer is to update: the student's parameters and those of the method's layers."""
        return iter(flat_parameters(learnable_parameters(self.method)))

    def forward(
        self, images: Tensor, labels: Tensor, *, epoch: int = 1, index: Tensor | None = None, **fields: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, in training mode and in eval mode alike.

        In training mode, what a method keeps besides its parameters (CRD's memory of all images) is updated by this
        call; so call it once for each step.

        Args:
            images: (B, 3, H, W) float32, normalised, on the device of the student.
            labels: (B,) integers, 0 to C - 1.
            epoch: from 1, for methods whose loss is warmed up.
            index: (B,) int64, each image's place in the training set, for CRD.
            fields: further fields of the batch that the method needs, such as `contrastive_index` (B, K + 1).

        Returns:
            () the sum of the terms, to be minimised, and the terms by name, () each.

        Raises:
            UserError: labels are no labels, or a field is missing that the method needs.
        """
        target = as_labels(labels)
        if target.device.type == "cpu":
            check_labels(target, "the labels")
        if index is not None:
            fields["index"] = index
            if self._draw is not None and "contrastive_index" not in fields:
                fields["contrastive_index"] = self._draw(index, epoch)
        missing = [name for name in self.method.needs_batch if name not in fields]
        if missing:
            raise UserError(self._how(missing))
        _, terms = self._passed(image=images, target=target, epoch=epoch, **fields)
        means = {name: term.mean() if term.ndim else term for name, term in terms.items()}
        return sum(means.values(), torch.zeros((), device=images.device)), means

    def _passed(self, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
        passed: Any = self.method(**fields) if self.training else self.method.forward_train(**fields)
        return passed  # type: ignore[no-any-return]

    def _how(self, missing: Sequence[str]) -> str:
        method, names = type(self.method).__name__, ", ".join(f"{name}=..." for name in missing)
        drawn = "contrastive_index" in missing and self._draw is None
        more = "; distiller(..., targets=LABELS of all training images) draws contrastive_index itself" if drawn else ""
        return f"{method} needs {', '.join(missing)} of each image: distiller(images, labels, {names}){more}"


def distiller(
    method: str,
    student: nn.Module | str,
    teacher: nn.Module | str | None,
    example: Tensor | None = None,
    *,
    num_data: int | None = None,
    targets: Any = None,
    class_names: Sequence[str] | None = None,
    **settings: Any,
) -> Loss:
    """A method's loss between `student` and `teacher`, for a training loop of one's own.

    Layers that a method adds (ReviewKD's fusion, FitNet's regressor) are made here, on the device of the student;
    `distiller.parameters()` has the student's parameters and theirs.

    Args:
        method: "KD", "ReviewKD", ...; case does not matter.
        student, teacher: as for `distill`. The teacher is frozen: its parameters require no gradients from now on.
        example: (B, 3, H, W) images as the loop will give them; their size is read. Or give `image_size`.
        num_data: N, the number of training images, for CRD; or `targets`.
        targets: (N,) labels of all training images; CRD then draws its negatives itself from each batch's `index`.
        class_names: the C names, by label, for methods that ask.
        settings: those of the method: `temperature=4`, `DKD={"T": 4}`; `pairs=[[1, 1]]`, `num_classes`, `image_size`,
            `mean`, `std`, `epochs` (of the whole training), `seed`. The random generators of torch are left as they
            are: seed them before for the same layers.

    Returns:
        A module: (images, labels) -> (loss, terms); see `Loss`.

    Raises:
        UserError: an unknown method or setting, networks that do not fit, or a fact that the method needs.

    Example:
        >>> import torch, mdistiller
        >>> student, teacher = mdistiller.create_model("resnet8", 5), mdistiller.create_model("resnet14", 5)
        >>> images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
        >>> distiller = mdistiller.distiller("ReviewKD", student, teacher, example=images)
        >>> loss, terms = distiller(images, labels)
        >>> loss.backward()
        >>> sorted(terms), loss.shape
        (['loss_ce', 'loss_kd'], torch.Size([]))
    """
    for network, role in ((student, "student"), (teacher, "teacher")):
        check_given(network, role)
    name = method_name(method)
    given = settings_given(name, settings, loss_only=True)
    own = cfg_of(tree_of({"DISTILLER.TYPE": name, **given}))
    size = own.DATASET.IMAGE_SIZE or _size_of(example)
    image = torch.zeros(2, 3, size, size) if example is None else example
    classes = own.DATASET.NUM_CLASSES or classes_of(student, image, "student") or classes_of(teacher, image, "teacher")
    if not classes:
        raise UserError("how many classes are there? A network that is named does not say; give num_classes=C")
    cfg = cfg_of(tree_of({
        **given, "DISTILLER.TYPE": name, "DATASET.TYPE": OWN_LOADER, "DATASET.NUM_CLASSES": classes,
        "DATASET.IMAGE_SIZE": size, "DISTILLER.STUDENT": name_of(student), "DISTILLER.TEACHER": name_of(teacher),
    }))  # fmt: skip
    facts = RunFacts(
        num_data=len(targets) if targets is not None else num_data, num_classes=classes,
        class_names=tuple(class_names) if class_names else None, image_size=size, epochs=cfg.SOLVER.EPOCHS,
        mean=tuple(cfg.DATASET.MEAN) or None, std=tuple(cfg.DATASET.STD) or None,
    )  # fmt: skip
    built = method_of(cfg, student, teacher, facts)
    check_modes(cfg, built, SumUpdate, world=1)
    built.smooth_labels(cfg.SOLVER.LABEL_SMOOTHING)
    device = next(built.student.parameters()).device
    return Loss(built.to(device).train(), student, teacher, _drawing(cfg, name, targets))


def _size_of(example: Tensor | None) -> int:
    if not isinstance(example, Tensor):
        raise UserError("give a batch of images, example=images (B, 3, H, W), or their size, image_size=H")
    return image_size_of({"image": example})


def _drawing(cfg: Any, method: str, targets: Any) -> Callable[[Tensor, int], Tensor] | None:
    """For a method that compares images with negatives: (index (B,), epoch) -> contrastive_index (B, K + 1)."""
    if targets is None or "contrastive_index" not in distiller_dict[method].needs_batch:
        return None
    labels = torch.as_tensor(targets).cpu()
    sampler = ContrastiveSampler(labels, cfg.CRD.NCE.K, cfg.CRD.MODE, cfg.EXPERIMENT.SEED)
    return lambda index, epoch: sampler(host_index(index).now, epoch).to(index.device)
