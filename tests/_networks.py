"""Small networks, and what is done to networks, in several tests."""

import torch
import torch.nn as nn

from mdistiller.models import build_model, cifar_model_dict

CLASSES = 3


class Net(nn.Module):
    """The smallest student: one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, image):
        pooled = self.conv(image).mean((2, 3))
        return self.fc(pooled), {"pooled_feat": pooled}


class TwoMaps(nn.Module):
    """Two equal maps of 4 channels, a stem's and a stage's, and neither BatchNorm nor stage channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return x.mean((2, 3)), {"feats": [x, x], "preact_feats": [x, x], "pooled_feat": x.mean((2, 3))}


class Deployed(nn.Module):
    """The student's pooled feature through a projector, then the teacher's classifier: image -> logits."""

    def __init__(self, student, teacher, width):
        super().__init__()
        self.student, self.classifier = student, teacher.fc
        self.projector = nn.Linear(width, width)

    def forward(self, image):
        return self.classifier(self.projector(self.student(image)[1]["pooled_feat"]))


def write_untrained(path, name, seed):
    """Write an untrained network for ten classes, in the original's format; returns `path`."""
    torch.manual_seed(seed)
    torch.save({"model": build_model(cifar_model_dict, name, 10).state_dict()}, path)
    return path


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan
