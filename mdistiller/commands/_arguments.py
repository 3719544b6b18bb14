"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def trained_network_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add what tools ask that run a trained network over a data set."""
    parser.add_argument("-m", "--model", required=True, help="the network's name, such as resnet20")
    parser.add_argument("-c", "--ckpt", default="pretrain", help="checkpoint; `pretrain` (default) is published")
    parser.add_argument("-d", "--dataset", default="cifar100", help="cifar100, tiny_imagenet, imagenet or digits")
    parser.add_argument("-bs", "--batch-size", type=int, default=batch_size)
    parser.add_argument("--data-root", default="./data", help="the folder that holds the data sets")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
