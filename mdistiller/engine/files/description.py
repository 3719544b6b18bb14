"""What a checkpoint says of the images that its network was trained on: the names of their classes, and their form.

They lie beside the weights, under keys of their own: `CLASS_NAMES`, a list by label; `INPUT`, a dictionary of "mean",
"std" and "image_size". In a safetensors file they are JSON in the metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError

CLASS_NAMES, INPUT = "class_names", "input"
_MEAN, _STD, _SIZE = "mean", "std", "image_size"


def described(
    content: Mapping[str, Any],
    class_names: Sequence[str] | None = (),
    mean: Sequence[float] | None = (),
    std: Sequence[float] | None = (),
    image_size: int | None = 0,
) -> dict[str, Any]:
    """The content of a checkpoint with a description of the images; what is not known is left out.

    Args:
        class_names: the name of every class, by label.
        mean, std: per channel, of values in [0, 1], by which the images are normalised.
        image_size: height and width of the images, in pixels.
    """
    given = {_MEAN: [*map(float, mean or ())], _STD: [*map(float, std or ())], _SIZE: int(image_size or 0)}
    form = {name: value for name, value in given.items() if value}
    description = {CLASS_NAMES: [*map(str, class_names or ())], INPUT: form}
    return {**content, **{key: value for key, value in description.items() if value}}


def description_of(content: Any) -> dict[str, Any]:
    """The entries `CLASS_NAMES` and `INPUT` of a loaded checkpoint, as `described` writes them; without what is not so.

    Files of others may hold anything under these keys.
    """
    known = content if isinstance(content, Mapping) else {}
    form = known.get(INPUT)
    form = form if isinstance(form, Mapping) else {}
    size = form.get(_SIZE)
    return described(
        {},
        _listed(known.get(CLASS_NAMES), str),
        _listed(form.get(_MEAN), (int, float)),
        _listed(form.get(_STD), (int, float)),
        size if isinstance(size, int) else 0,
    )


def description_by(loader: Any) -> dict[str, Any]:
    """The description that a loader gives of its batches by its attributes, as far as it has them as lists."""
    names, mean, std = (getattr(loader, key, None) for key in (CLASS_NAMES, _MEAN, _STD))
    form = {_MEAN: mean, _STD: std, _SIZE: getattr(loader, _SIZE, 0)}
    return description_of({CLASS_NAMES: [*map(str, _listed(names, object))], INPUT: form})


def _listed(values: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """`values`, if they are a list or tuple of that kind; else none."""
    fits = isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)
    return list(values) if fits else []


def to_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    """The entries of a checkpoint beside its weights as the metadata of a safetensors file."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in content.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in the metadata of a safetensors file; see `description_of`."""
    found = {}
    for key in (CLASS_NAMES, INPUT):
        try:
            found[key] = json.loads(metadata.get(key, "null"))
        except (ValueError, RecursionError):
            continue
    return description_of(found)


def check_classes(content: Any, path: str | Path, class_names: Sequence[str] | None) -> None:
    """Refuse a checkpoint of other classes than those of the data that it meets.

    A file without names, and data without, are not compared.

    Args:
        content: of the checkpoint, loaded.
        path: for the message.
        class_names: those of the data, by label.

    Raises:
        UserError: names the first label of which the names differ, and says how many do.
    """
    saved, own = description_of(content).get(CLASS_NAMES, []), [*map(str, class_names or ())]
    if not saved or not own or saved == own:
        return
    longest = max(len(saved), len(own))
    there, here = (names + [""] * (longest - len(names)) for names in (saved, own))
    differing = [label for label in range(longest) if there[label] != here[label]]
    first = differing[0]
    raise UserError(
        f"{path} was trained on other classes than the data has: label {first} is {_shown(there[first])} in the "
        f"checkpoint and {_shown(here[first])} in the data; {len(differing)} of {longest} labels differ. "
        f"{_remedy(saved, own)}"
    )


def _shown(name: str) -> str:
    return repr(name) if name else "no class"


def _remedy(saved: list[str], own: list[str]) -> str:
    """How the two lists of names compare as sets, and the next step."""
    missing, extra = (sorted((Counter(a) - Counter(b)).elements()) for a, b in ((saved, own), (own, saved)))
    if not missing and not extra:
        return "The names are the same in another order: sort the data's classes as the checkpoint has them"
    some = [
        f"only the {where} has {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"
        for where, names in (("checkpoint", missing), ("data", extra))
        if names
    ]
    return f"{' and '.join(some).capitalize()}: take the data that it was trained on, or another checkpoint"
