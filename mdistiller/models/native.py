"""The images that a network was made for: their size and normalisation."""

from __future__ import annotations

from .sources import FAMILIES, NativeInput, family_of, source_of

__all__ = ["FAMILIES", "NativeInput", "family_of", "native_input"]


def native_input(name: str, image_size: int = 0) -> NativeInput:
    """The images that the network `name` was made for, which is not built.

    Args:
        name: of any source; see `sources`.
        image_size: see `family_of`; for names of this library alone.

    Raises:
        UserError: no such source or network.
    """
    source, own = source_of(name)
    return source.native_input(own, image_size)
