"""What there is, by name: methods and data sets. `models.catalog` lists the networks."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..dataset import OWN_LOADER, configured_dict, dataset_dict
from ..dataset.torchvision_sets import PREFIX, published
from ..distillers import distiller_dict


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that fit a pattern of the shell's kind, such as "*KD*", in any case; sorted."""
    return sorted((name for name in names if fnmatchcase(name.lower(), pattern.lower())), key=str.lower)


def list_methods(pattern: str = "*") -> list[str]:
    """The names of the methods, for `method` of `distill` and for DISTILLER.TYPE; sorted.

    Args:
        pattern: of the shell's kind; case does not matter.

    Example:
        >>> import mdistiller
        >>> mdistiller.list_methods("dcgd*")
        ['DCGD', 'DCGD_CE', 'DCGD_DKD', 'DCGD_KD']
    """
    return matching(distiller_dict, pattern)


def list_datasets(pattern: str = "*") -> list[str]:
    """The names of the data sets, for DATASET.TYPE; sorted. Those of one's own are "folder" and its like.

    Args:
        pattern: of the shell's kind; case does not matter.

    Example:
        >>> import mdistiller
        >>> mdistiller.list_datasets("*imagenet")
        ['imagenet', 'tiny_imagenet']
    """
    of_torchvision = {f"{PREFIX}{name}" for name in published}
    return matching({*dataset_dict, *configured_dict, *of_torchvision} - {OWN_LOADER, PREFIX[:-1]}, pattern)
