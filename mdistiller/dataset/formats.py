"""The image formats that are read, and the endings of their files' names: what Pillow decodes on its own."""

from __future__ import annotations

from functools import cache

from PIL import Image

# Recognised by their first bytes, whatever the file's name says. The other formats are tried only on files whose
# name ends as theirs do: some begin so vaguely that a damaged JPEG would be taken for one of them.
COMMON = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
# Pillow starts Ghostscript for EPS, and opens whatever file an IPTC record holds. Of the others it knows only the
# header, and leaves the pixels to a program or a library.
REFUSED = frozenset({"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


@cache
def _by_suffix() -> dict[str, str]:
    """The format of each ending (".jpg"), of those that this Pillow can decode; with the plugins loaded by now."""
    known = Image.registered_extensions()
    found = {suffix: name for suffix, name in known.items() if name in Image.OPEN and name not in REFUSED}
    return found | {".mpo": "JPEG"}  # several JPEGs in one file: Pillow's JPEG plugin opens it


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of image files, in lower case with the dot: those of torchvision's image folders, and Pillow's."""
    return frozenset(_by_suffix())


def suffix_of(name: str) -> str:
    """The ending of a file's name, in lower case with the dot; "" if it has none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""


def formats_of(path: str) -> tuple[str, ...]:
    """The formats that the file `path` may have, for `Image.open`."""
    return _formats(suffix_of(path))


@cache
def _formats(suffix: str) -> tuple[str, ...]:
    own = _by_suffix().get(suffix)
    common = tuple(name for name in COMMON if name in Image.OPEN)  # an older Pillow has no AVIF
    return common if own is None or own in common else (*common, own)
