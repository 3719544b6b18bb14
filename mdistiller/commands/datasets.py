"""List the data sets, for DATASET.TYPE.

    mdistiller datasets
    mdistiller datasets '*imagenet*'
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence

from ..api.lists import list_datasets
from ..console import one_line, tool
from ..dataset import DatasetInfo, configured_dict, dataset_dict
from ..dataset.torchvision_sets import PREFIX, published
from ..registry import unknown_name
from ._arguments import command_parser


def dataset_lines(pattern: str = "*") -> Iterator[str]:
    """A line for each data set whose name fits `pattern`: `cifar100  100 classes, 32x32`.

    Raises:
        UnknownNameError: none fits; the message suggests near names.
    """
    names = list_datasets(pattern)
    if not names:
        raise unknown_name("data set", pattern, list_datasets())
    width = max(map(len, names))
    yield from (f"{name:{width}}  {_described(name)}" for name in names)


def _described(name: str) -> str:
    if name in dataset_dict:
        info: DatasetInfo = dataset_dict[name]
        return f"{info.num_classes} classes, {info.image_size}x{info.image_size}"
    if name.startswith(PREFIX):
        return f"{published[name.removeprefix(PREFIX)].classes} classes, downloaded by torchvision"
    return one_line((inspect.getdoc(configured_dict[name.partition("/")[0]]) or "").partition("\n\n")[0])


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("pattern", nargs="?", default="*", help="of the shell's kind, in quotes; case does not matter")
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    for line in dataset_lines(**vars(parse_args(arguments, prog))):
        print(line)
