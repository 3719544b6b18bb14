"""tools/train.py for a student that draws random numbers while it trains, and signals its process at a chosen moment.

    SIGNAL_AT="train 5 15" python train_dropout.py ...     signal 15 in the 5th forward pass of training
    SIGNAL_AT="validate 9 9" ...                           signal 9 in the validation after the 9th

`SEEN`, a method, writes the indices of the images of every step of rank N to the file seen.N.
"""

import os
import random

import numpy as np
import torch
import torch.nn as nn

from mdistiller.commands.train import main
from mdistiller.distillers import Vanilla, register
from mdistiller.models import cifar_model_dict


class DropoutNet(nn.Module):
    """image (B, 3, H, W) -> logits (B, C); draws from torch's, NumPy's and Python's generators in training."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)
        self.passes = 0

    def forward(self, image):
        self.passes += self.training
        if self.training or torch.is_inference_mode_enabled():  # not where the network is only checked
            signal_at(f"{'train' if self.training else 'validate'} {self.passes}")
        pooled = self.dropout(self.bn(self.conv(image)).relu().mean((2, 3)))
        scale = 1 + random.random() + np.random.rand() if self.training else 1
        return self.fc(pooled) * scale, {"pooled_feat": pooled}


def signal_at(moment):
    """Signal this process if this is the moment, once."""
    wanted, _, number = os.environ.get("SIGNAL_AT", "").rpartition(" ")
    if wanted == moment:
        del os.environ["SIGNAL_AT"]
        os.kill(os.getpid(), int(number))


@register("SEEN")
class Seen(Vanilla):
    needs_batch = ("index",)
    teacher_outputs = ()

    def forward_train(self, image, target, index, **kwargs):
        with open(f"seen.{os.environ.get('RANK', 0)}", "a") as file:
            print(*index.tolist(), file=file)
        return super().forward_train(image, target)


if __name__ == "__main__":
    cifar_model_dict.register("dropout_net")(DropoutNet)
    main()
