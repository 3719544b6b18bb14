"""What is known about a run before it starts: `RunFacts`, from which a method receives what its `needs_run` names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from yacs.config import CfgNode as CN

from ..dataset import info_of
from ..errors import UserError
from ..registry import unknown_name


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run; None where a fact is not known.

    Attributes:
        num_data: N, number of training images; their `index` is 0..N-1.
        num_classes: C; labels are 0..C-1.
        class_names: the C names, by label.
        image_size: height and width of the images, in pixels.
        epochs: SOLVER.EPOCHS.
        mean, std: of each channel, of values in [0, 1]; the images are normalised by them.
    """

    num_data: int | None
    num_classes: int
    class_names: tuple[str, ...] | None
    image_size: int
    epochs: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, cfg: CN, train_loader: Any = None) -> RunFacts:
        """The facts of a run of `cfg`; without its loader, those that need no data.

        Raises:
            UserError: no such data set.
        """
        info = info_of(cfg)
        targets = getattr(train_loader, "targets", None)

        def of_data(name: str) -> tuple[Any, ...] | None:
            return tuple(getattr(train_loader, name, None) or getattr(info, name, None) or ()) or None

        return cls(
            num_data=None if targets is None else len(targets),
            num_classes=info.num_classes,
            class_names=of_data("class_names"),
            image_size=info.image_size,
            epochs=cfg.SOLVER.EPOCHS,
            mean=of_data("mean"),
            std=of_data("std"),
        )

    def named(self, names: Iterable[str], method: str) -> dict[str, Any]:
        """The facts `names` as keyword arguments of the class `method`.

        Raises:
            UserError: there is no such fact, or this run does not know it.
        """
        return {name: self._get(name, method) for name in names}

    def _get(self, name: str, method: str) -> Any:
        known = [field.name for field in fields(self)]
        if name not in known:
            raise unknown_name(f"fact of the run ({method}.needs_run)", name, known)
        value = getattr(self, name)
        if value is None:
            raise UserError(f"{method} needs the run's {name}, which its data set does not tell")
        return value


def image_size_of(cfg: CN) -> int:
    """Height and width of the images of `cfg`'s data set; for a method that is built by hand, without facts."""
    return info_of(cfg).image_size
