"""Which of a network's outputs are read, by name: "logits", "pooled_feat", "feats" (all maps), "feats[3]" (one map)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_ONE_MAP = re.compile(r"(\w+)\[(-?\d+)\]")


def feature_of(output: str) -> str:
    """The feature that an output is, or is one map of: "feats" for "feats[3]"."""
    match = _ONE_MAP.fullmatch(output)
    return match[1] if match else output


def restricted(
    features: Mapping[str, Any], outputs: Iterable[str], instead: Callable[[str], Any] = lambda name: None
) -> dict[str, Any]:
    """The features that `outputs` name; in a list of which they name some maps, every other map is replaced.

    Args:
        instead: name of a map, such as "feats[0]" -> what stands in its place.
    """
    names = set(outputs)
    kept: dict[str, Any] = {name: features[name] for name in features if name in names}
    for name in features.keys() - kept.keys():
        indices = {int(m[2]) for m in map(_ONE_MAP.fullmatch, names) if m and m[1] == name}
        if indices:
            maps = features[name]
            wanted = {range(len(maps))[i] for i in indices}
            kept[name] = [own if i in wanted else instead(f"{name}[{i}]") for i, own in enumerate(maps)]
    return kept


def output_names(features: Mapping[str, Any]) -> list[str]:
    """The names of all outputs of a network that returns these features beside its logits."""
    lists = {name: len(own) for name, own in features.items() if isinstance(own, (list, tuple))}
    return ["logits", *features, *(f"{name}[{i}]" for name, count in lists.items() for i in range(-count, count))]
