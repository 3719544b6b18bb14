"""`mdistiller.distill` on timm networks with real weights and a DataLoader of one's own (docs/results.md).

    python benchmarks/own_loader.py data/twenty data/pretrained --epochs 12 --seeds 0 1

The first folder holds train/<class>/... and val/<class>/..., the second one tf_efficientnet_lite0.safetensors and
tf_efficientnet_lite2.safetensors. EfficientNet-Lite2 is fine-tuned on the classes, then teaches EfficientNet-Lite0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import mdistiller

MEAN = STD = (0.5, 0.5, 0.5)  # of both networks
BICUBIC = v2.InterpolationMode.BICUBIC


def loaders(data: Path, size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Training and validation images (B, 3, size, size) with their labels."""
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1), interpolation=BICUBIC)
    train = ImageFolder(str(data / "train"), v2.Compose([crop, v2.RandomHorizontalFlip(), *tail]))
    val = ImageFolder(str(data / "val"), v2.Compose([v2.Resize((size, size), interpolation=BICUBIC), *tail]))
    order = torch.Generator().manual_seed(seed)
    return DataLoader(train, 20, shuffle=True, generator=order), DataLoader(val, 30)


def network(name: str, weights: Path, classes: int) -> nn.Module:
    """A timm network with its ImageNet weights and a new head."""
    net: nn.Module = timm.create_model(name)
    net.load_state_dict(load_file(weights / f"{name}.safetensors"))
    net.reset_classifier(classes)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["NONE", "KD", "DKD", "RKD", "ReviewKD"])
    args = parser.parse_args()
    for seed in args.seeds:
        teacher = None
        for name, method in [("tf_efficientnet_lite2", "NONE"), *(("tf_efficientnet_lite0", m) for m in args.methods)]:
            train, val = loaders(args.data, args.size, seed)
            torch.manual_seed(seed)
            student = network(name, args.weights, len(train.dataset.classes))  # type: ignore[attr-defined]
            started = time.perf_counter()
            result = mdistiller.distill(
                student, teacher if name.endswith("lite0") else None, train, val, method=method, epochs=args.epochs,
                lr=0.001, seed=seed, settings={"SOLVER.TYPE": "AdamW"}, verbose=False,
            )  # fmt: skip
            teacher = teacher or result.student
            print(
                f"seed {seed}, {name}, {method}: top-1 last {result.history[-1]['test_acc']:.2f}, "
                f"best {result.accuracy:.2f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
