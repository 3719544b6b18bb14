"""What `distill` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn as nn

from ..engine.files.checkpoint import save_checkpoint
from ..engine.files.safetensors_file import SUFFIX, write_safetensors
from ..errors import UserError
from ..paths import expanded


@dataclass(frozen=True)
class Result:
    """A trained student.

    Attributes:
        student: the network that the caller gave, itself, with the weights of its best epoch, in eval mode, on the
            device of the training. For a student that was named, the network of that library: `timm/resnet18` gives
            timm's. A method that deploys another network than the student gives that one.
        accuracy: top-1 on the validation images of the best epoch, in percent.
        history: one dictionary for each epoch, in order: `epoch`, `lr`, `train_loss`, `train_acc`, `test_acc`,
            `test_acc_top5`, `test_loss` (accuracies in percent, losses in nats), `loss/...` for each term of the loss,
            `epoch_seconds`, `images_per_second` and others, as in metrics.csv.
        ema: with `ema=DECAY`, a network of the averaged weights at their best; else None.
        ema_accuracy: its top-1 in percent; None without it.
        folder: of the run's files; None if they were temporary.
        marks: what a checkpoint says beside the weights; safetensors files of `save` say it too.

    Example:
        >>> import torch, mdistiller
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 5))
        >>> images = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 5), batch_size=8)
        >>> result = mdistiller.distill(student, teacher, images, images, epochs=2, verbose=False)
        >>> result.student is student, [epoch["epoch"] for epoch in result.history]
        (True, [1, 2])
        >>> path = result.save("student.safetensors")
        >>> from safetensors.torch import load_file
        >>> student.load_state_dict(load_file(path), strict=True)
        <All keys matched successfully>
    """

    student: nn.Module
    accuracy: float
    history: list[dict[str, float]] = field(repr=False)
    ema: nn.Module | None = field(default=None, repr=False)
    ema_accuracy: float | None = None
    folder: Path | None = None
    marks: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path, ema: bool = False) -> Path:
        """Write the student's weights: as safetensors if `path` ends so, else as torch.save does.

        The file holds the state dict of the bare network, which `load_state_dict(strict=True)` loads.

        Args:
            ema: write the averaged weights.

        Returns:
            The path.

        Raises:
            UserError: the file cannot be written, or there are no averaged weights.

        Example:
            >>> import torch, mdistiller
            >>> result = mdistiller.Result(torch.nn.Linear(2, 3), accuracy=75.0, history=[])
            >>> sorted(torch.load(result.save("student.pth"), weights_only=True))
            ['bias', 'weight']
        """
        network = self.ema if ema else self.student
        if network is None:
            raise UserError("there are no averaged weights; call distill with ema=0.999, or leave out ema=True")
        place = Path(expanded(str(path)))
        state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        if place.suffix == SUFFIX:
            write_safetensors(state, place, self.marks)
        else:
            save_checkpoint(state, place)
        return place
