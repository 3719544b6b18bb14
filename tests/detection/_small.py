"""Narrow networks and a synthetic COCO set of 80 categories, for training within seconds on a CPU."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes, Instances
from PIL import Image

from detection import HERE
from detection.model.config import load_cfg

# Narrower pyramids, heads and teachers, and a short schedule; the method stays that of the config. No weights exist for
# such networks, so the teacher is random.
NARROW = shlex.split("""
MODEL.DEVICE cpu MODEL.WEIGHTS "" KD.RANDOM_TEACHER True
MODEL.FPN.OUT_CHANNELS 16 TEACHER.MODEL.FPN.OUT_CHANNELS 16
MODEL.ROI_BOX_HEAD.FC_DIM 32 TEACHER.MODEL.ROI_BOX_HEAD.FC_DIM 32
MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_MASK_HEAD.NUM_CONV 1
TEACHER.MODEL.RESNETS.DEPTH 18 TEACHER.MODEL.RESNETS.RES2_OUT_CHANNELS 64
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.POST_NMS_TOPK_TEST 20
SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.0001 SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0
DATALOADER.NUM_WORKERS 0 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
""")  # fmt: skip
ON_SYNTHETIC = ("DATASETS.TRAIN", "('synthetic_train',)", "DATASETS.TEST", "('synthetic_val',)")

CONFIGS = sorted(
    str(path.relative_to(HERE / "configs").with_suffix(""))
    for folder in ("DKD", "ReviewKD")
    for path in (HERE / "configs" / folder).glob("*.yaml")
)


def load(name, *opts):
    """The published config `name`, overridden by NARROW and `opts`."""
    return load_cfg(HERE / "configs" / f"{name}.yaml", [*NARROW, *opts])


def make_datasets(folder: Path) -> Path:
    """Write `folder`/coco with 5 images to train on and 3 to evaluate on, and register both."""
    for split, count in (("train", 5), ("val", 3)):
        images = folder / "coco" / f"{split}2017"
        annotations = folder / "coco" / "annotations" / f"instances_{split}2017.json"
        images.mkdir(parents=True)
        annotations.parent.mkdir(exist_ok=True)
        annotations.write_text(json.dumps(_write_images(images, count)))
        register_coco_instances(f"synthetic_{split}", {}, str(annotations), str(images))
    return folder


def _write_images(folder: Path, count: int) -> dict:
    rs = np.random.RandomState(count)
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    assert len(categories) == 80
    images, annotations = [], []
    for number in range(1, count + 1):
        width, height = (96, 64) if number % 2 else (64, 96)  # both orientations
        pixels = rs.randint(0, 256, (height, width, 3), dtype=np.uint8)
        for _ in range(2):
            x, y, w, h = rs.randint(0, 24), rs.randint(0, 24), rs.randint(16, 40), rs.randint(16, 40)
            pixels[y : y + h, x : x + w] = rs.randint(0, 256, 3)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "iscrowd": 0, "area": int(w * h),
                    "bbox": [int(x), int(y), int(w), int(h)],
                    "category_id": categories[rs.randint(80)]["id"],
                    "segmentation": [[int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]],
                }
            )  # fmt: skip
        name = f"{number:012d}.jpg"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    return {"images": images, "annotations": annotations, "categories": categories}


def batch(count: int = 2, seed: int = 0) -> list[dict]:
    """What detectron2's mapper returns for `count` images of 96x64 with two objects each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i in range(count):
        truth = Instances((64, 96))
        truth.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0], [30.0, 10.0 + i, 90.0, 60.0]]))
        truth.gt_classes = torch.tensor([3, 17 + i])
        image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": truth, "height": 64, "width": 96})
    return inputs
