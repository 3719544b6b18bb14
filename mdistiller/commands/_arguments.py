"""Arguments and checks that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..arguments import PathArgument, with_numbers
from ..dataset import DatasetInfo
from ..errors import UserError

# Settings that messages about data and networks name, and what the commands that read no configuration have instead.
_OPTIONS = {
    "set DATASET.SKIP_BROKEN True": "add --skip-broken", "DATASET.SKIP_BROKEN": "--skip-broken",
    "DATASET.TYPE digits (configs/digits)": "-d digits", "DATASET.ROOT": "--data-root",
    "DATASET.NUM_WORKERS": "--num-workers",
}  # fmt: skip


@contextmanager
def options_for_settings() -> Iterator[None]:
    """In a UserError, name the options of this command instead of settings, which it cannot set."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for setting, option in _OPTIONS.items():
            text = text.replace(setting, option)
        if text == str(error):
            raise
        raise UserError(text) from None


def command_parser(description: str | None, prog: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help shows `description` line by line.

    Args:
        description: its examples begin with `mdistiller COMMAND`, which `prog` replaces.
        prog: what the user typed, such as "python tools/train.py"; None for the name of the script.
        options: other arguments of ArgumentParser.
    """
    if description and prog:
        description = re.sub(r"^    mdistiller [a-z-]+", f"    {prog}", description, flags=re.MULTILINE)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter, **options)
    return with_numbers(parser)


def override_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the positional arguments KEY VALUE ..., as `opts`."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=help)


def local_rank_argument(parser: argparse.ArgumentParser) -> None:
    """Accept the number of the process that `python -m torch.distributed.launch` appends; LOCAL_RANK has it too."""
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


def trained_network_arguments(parser: argparse.ArgumentParser, batch_size: int, of_run: bool = False) -> None:
    """Add the arguments of a command that runs a trained network on a data set; `batch_size` is the default.

    Args:
        of_run: without -m, the config.yaml beside the checkpoint names network and data set.
    """
    from_config = "; without it, config.yaml next to the checkpoint says how the run deploys it" if of_run else ""
    parser.add_argument("-m", "--model", required=not of_run, help=f"the network's name, such as resnet20{from_config}")
    parser.add_argument(
        "-c", "--ckpt", action=PathArgument, default="pretrain",
        help="its checkpoint; `pretrain` (default): the published one",
    )  # fmt: skip
    parser.add_argument(
        "-d", "--dataset", default=None if of_run else "cifar100",
        help="cifar100 (default), tiny_imagenet, imagenet or digits; folder: class folders of your own (docs/data.md)",
    )  # fmt: skip
    parser.add_argument(
        "-bs", "--batch-size", type=int, default=batch_size, help=f"images in a batch (default: {batch_size})"
    )
    parser.add_argument(
        "--data-root", action=PathArgument,
        help="the folder that holds the data sets, or the images themselves (default: ./data"
        + ("; without -m that of the run)" if of_run else ")"),
    )  # fmt: skip
    parser.add_argument("--num-workers", type=int, default=2, help="processes that decode images (default: 2)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read, and warn")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")


def check_labelled(info: DatasetInfo, dataset: str) -> None:
    """Refuse to score on images without labels.

    Raises:
        UserError: they have none.
    """
    if not info.labelled:
        raise UserError(f"the images of -d {dataset} have no labels to score by; class folders (-d folder) have them")


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1.

    Raises:
        UserError: it is below 1.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be a whole number >= 1, not {batch_size}")
