"""Teachers with BatchNorms as after training, methods that read them, and a loader of forty images."""

import torch
import torch.nn as nn

from mdistiller.dataset import ImageArray
from mdistiller.dataset.augment import CropFlip
from mdistiller.distillers import KD, Distiller
from mdistiller.engine.cfg import CFG
from mdistiller.models import build_model, cifar_model_dict


def trained(name, num_classes=10):
    """A network whose BatchNorms are not the identity, as after training."""
    torch.manual_seed(0)
    network = build_model(cifar_model_dict, name, num_classes).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network


def config(method="KD", **distiller):
    cfg = CFG.clone()
    cfg.DATASET.TYPE = "digits"
    cfg.DISTILLER.TYPE = method
    cfg.DISTILLER.update(distiller)
    return cfg


def loader(flip=True, seed=0, padding=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=generator, dtype=torch.uint8)
    data = ImageArray(images, torch.arange(40) % 10, (0.5,) * 3, (0.25,) * 3, CropFlip(padding, flip))
    return data.loader(8, 0, True, seed)


def distiller(cls=KD, cfg=None):
    return cls(build_model(cifar_model_dict, "resnet8", 10), trained("resnet14"), cfg or config())


class Reads(Distiller):
    """Returns what it is told to read of the teacher, by a function of the features."""

    def __init__(self, outputs, read=dict):
        super().__init__(build_model(cifar_model_dict, "resnet8", 10), trained("resnet14"))
        self.add_frozen("teacher", self.teacher, outputs)
        self.read = read

    def forward_train(self, image, target, **kwargs):
        logits, features = self.teacher_forward(image)
        return logits, self.read(features)


def counting(network):
    """The network's function, and the number of images of each call."""
    seen = []

    def run(image):
        seen.append(len(image))
        with torch.no_grad():
            return network(image)

    return run, seen
