#!/usr/bin/env python
"""Images a second of the ImageNet loader alone, against a classic pipeline of PIL transforms; and each stage's time.

    python benchmarks/loader.py
    python benchmarks/loader.py --data /data/imagenet/val --workers 8 --images 20000 --json

Both read the same class folders, in worker processes, and yield normalised float32 batches on the CPU. The two
alternate; results are medians, lowest and highest.

Measured with `--images 1000 --rounds 5 --threads 1` on 1,000 images of 320x240 pixels in the median, two cores of an
AMD EPYC (Zen 4) with torch 2.15 and Pillow 13.0, 2026-11-23, nothing else running: 1.16 times the classic pipeline in
training, 1.14 in validation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed

import torch
from classic import imagenet_loader
from PIL import Image
from timing import ratio, spread, take_turns
from torch import Tensor
from torchvision import transforms as T

from mdistiller.dataset import imagenet
from mdistiller.dataset.folders import ImageFiles, labelled_files
from mdistiller.dataset.image_file import read_image, read_pixels, silent_pillow, to_pixels
from mdistiller.dataset.in_memory import Normalize

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample" / "val"
SPLITS = {"train": True, "val": False}


def image_files(folder: Path) -> ImageFiles:
    """Every image in the class folders of `folder`, for any number of classes."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = labelled_files(folder, classes)
    return ImageFiles.of(files, imagenet.train_view, imagenet.val_view, imagenet.MEAN, imagenet.STD)


def images_per_second(loader: Iterable[Any], batches: int) -> float:
    """Images a second over `batches` batches, timed after the first one, because workers take a moment to start."""
    pass_ = iter(loader)
    next(pass_)
    start, images = time.perf_counter(), 0
    for image, *_ in islice(pass_, batches):
        images += len(image)
    reached = images / (time.perf_counter() - start)
    for _ in pass_:  # else the batches that workers have begun would slow down the next turn
        pass
    return reached


def rates(folder: Path, batch: int, workers: int, images: int, rounds: int) -> dict[str, Any]:
    """Images a second of both loaders, in training and in validation."""
    data = image_files(folder)
    images = min(images, len(data.targets))
    if images < 2 * batch:
        raise SystemExit(f"error: {images} images are too few for batches of {batch}; take a smaller --batch")
    data = data.select(torch.arange(images))
    result: dict[str, Any] = {}
    for split, train in SPLITS.items():
        loaders: dict[str, Iterable[Any]] = {
            "classic": imagenet_loader(folder, images, batch, workers, train),
            "ours": data.loader(batch, workers, train),
        }
        works = {name: partial(images_per_second, loader, images // batch - 1) for name, loader in loaders.items()}
        take_turns(works, 1)  # to warm up
        reached = take_turns(works, rounds)
        result[split] = {name: spread(values) for name, values in reached.items()}
        result[split]["ratio"] = ratio(reached["ours"], reached["classic"])
    return result


def stages(paths: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds per image in each stage, in this process alone: the spread over `rounds`."""
    to_float = T.Compose([T.ToTensor(), T.Normalize(imagenet.MEAN, imagenet.STD)])
    normalize = Normalize(imagenet.MEAN, imagenet.STD, pixels=224 * 224)
    pillow, pixels = [read_image(path) for path in paths], [read_pixels(path) for path in paths]
    by_pillow = {
        "train": T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip()]),
        "val": T.Compose([T.Resize(256), T.CenterCrop(224)]),
    }
    crops = [by_pillow["val"](image) for image in pillow]
    floats, small = [to_float(crop) for crop in crops], [to_pixels(crop) for crop in crops]
    batch = torch.stack(small)

    def each(work: Callable[[Any], Any], items: list[Any]) -> float:
        return milliseconds(lambda: [work(item) for item in items]) / len(items)

    def classic(split: str) -> dict[str, Callable[[], float]]:
        return {
            "read": lambda: each(read_bytes, paths),
            "read and decode": lambda: each(lambda path: Image.open(path).convert("RGB"), paths),
            "transform": lambda: each(by_pillow[split], pillow),
            "to float": lambda: each(to_float, crops),
            "collate": lambda: milliseconds(lambda: torch.stack(floats)) / len(paths),
        }

    def ours(split: str) -> dict[str, Callable[[], float]]:
        return {
            "read": lambda: each(read_bytes, paths),
            "read and decode": lambda: each(*((read_pixels, paths) if split == "train" else (read_image, paths))),
            "transform": lambda: each(*((tensor_view, pixels) if split == "train" else (pillow_view, pillow))),
            "to float": lambda: milliseconds(lambda: normalize(batch)) / len(paths),
            "collate": lambda: milliseconds(lambda: torch.stack(small)) / len(paths),
        }

    works = {(split, kind.__name__): kind(split) for split in SPLITS for kind in (classic, ours)}
    flat = {"/".join((*key, stage)): work for key, all_ in works.items() for stage, work in all_.items()}
    taken = take_turns(flat, rounds)
    return {name: spread(values) for name, values in taken.items()}


def read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def tensor_view(pixels: Tensor) -> Tensor:
    return imagenet.TRAIN(pixels.permute(2, 0, 1)).permute(1, 2, 0)


def pillow_view(image: Image.Image) -> Tensor:
    return to_pixels(imagenet.VAL(image))


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def decoders(paths: list[str], rounds: int) -> dict[str, Any]:
    """Pillow's decoder against torchvision's (deprecated in its version 0.29), both to (H, W, 3) uint8 in memory."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    def torchvision(path: str) -> Tensor:
        return decode_jpeg(read_file(path), mode=ImageReadMode.RGB).permute(1, 2, 0)

    paths = [path for path in paths if read_bytes(path)[:3] == b"\xff\xd8\xff"]
    works = {
        name: partial(lambda work: milliseconds(lambda: [work(p) for p in paths]) / len(paths), work)
        for name, work in (("pillow", read_pixels), ("torchvision", torchvision))
    }
    with silent_pillow():
        same = sum(torch.equal(read_pixels(path), torchvision(path)) for path in paths)
        taken = take_turns(works, rounds)
    return {**{name: spread(values) for name, values in taken.items()}, "images": len(paths), "same_pixels": same}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    data = image_files(args.data)
    paths = [os.fsdecode(path) for path in data.paths[: args.staged]]
    return {
        "data": str(args.data), "batch": args.batch, "workers": args.workers, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "rounds": args.rounds, "images": min(args.images, len(data.targets)),
        "images_per_second": rates(args.data, args.batch, args.workers, args.images, args.rounds),
        "milliseconds": stages(paths, args.rounds),
        "decoders_milliseconds": decoders(paths, args.rounds),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown tables."""
    lines = ["| images/s | classic | ours | ours / classic |", "|---|---|---|---|"]
    for split, r in result["images_per_second"].items():
        lines.append(f"| {split} | {_show(r['classic'])} | {_show(r['ours'])} | {_show(r['ratio'], 2)} |")
    ms = result["milliseconds"]
    lines += ["", "| ms an image, one process | train, classic | ours | val, classic | ours |", "|---|---|---|---|---|"]
    for stage in ("read", "read and decode", "transform", "to float", "collate"):
        cells = [f"{ms[f'{split}/{kind}/{stage}']['median']:.3f}" for split in SPLITS for kind in ("classic", "ours")]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    d = result["decoders_milliseconds"]
    lines += ["", f"decoding: Pillow {_show(d['pillow'], 3)} ms, torchvision {_show(d['torchvision'], 3)} ms; "
              f"the same pixels in {d['same_pixels']} of {d['images']} images"]  # fmt: skip
    return "\n".join(lines)


def _show(s: dict[str, float], digits: int = 0) -> str:
    return f"{s['median']:.{digits}f} ({s['low']:.{digits}f}-{s['high']:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a folder with one folder of images per class")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=1000, help="images per turn at most")
    parser.add_argument("--staged", type=int, default=200, help="images used to time the stages")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each loader")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"no folder {args.data}; set --data to a folder with one folder of images per class")
    torch.set_num_threads(args.threads)
    result = measure(args)
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    main()
