#!/usr/bin/env python
"""Copy a few training images of a COCO folder, with their annotations, into a new COCO folder.

    python detection/coco_subset.py --source ../shared/data/coco-tiny --images 8 --max-objects 5 -o datasets/coco

To try out a setup, write the copy to the folder in which the configs look for COCO. The images with the lowest ids are
taken.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.arguments import PathArgument
from mdistiller.console import one_line_errors
from mdistiller.errors import UserError
from mdistiller.user_files import read_text, writing

ANNOTATIONS = Path("annotations/instances_train2017.json")


def copy_subset(source: Path, target: Path, count: int, max_objects: int) -> list[int]:
    """Copy the first `count` images that show 1 to `max_objects` objects; return their ids.

    Raises:
        UserError: `source` has too few such images, or `target` already has annotations.
    """
    if (target / ANNOTATIONS).exists():
        raise UserError(f"{target / ANNOTATIONS} already exists: choose another folder")
    try:
        data = json.loads(read_text(source / ANNOTATIONS, "annotations", "--source must be a folder of COCO 2017"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{source / ANNOTATIONS} is not a JSON file: {error}") from None
    objects = Counter(annotation["image_id"] for annotation in data["annotations"])
    images = sorted((i for i in data["images"] if 1 <= objects[i["id"]] <= max_objects), key=lambda i: i["id"])[:count]
    if len(images) < count:
        raise UserError(f"{source} has only {len(images)} images of 1 to {max_objects} objects")
    chosen = {image["id"] for image in images}
    data |= {"images": images, "annotations": [a for a in data["annotations"] if a["image_id"] in chosen]}
    for image in images:
        with writing(target / "train2017" / image["file_name"]):
            shutil.copyfile(source / "train2017" / image["file_name"], target / "train2017" / image["file_name"])
    with writing(target / ANNOTATIONS):
        (target / ANNOTATIONS).write_text(json.dumps(data))
    return sorted(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", action=PathArgument, type=Path, required=True, help="a folder with annotations/ and train2017/"
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--max-objects", type=int, default=5, help="leave out images that show more (default 5)")
    parser.add_argument("-o", "--output", action=PathArgument, type=Path, required=True)
    with one_line_errors():
        args = parser.parse_args()
        print("images", *copy_subset(args.source, args.output, args.images, args.max_objects))


if __name__ == "__main__":
    main()
