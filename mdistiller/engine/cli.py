"""What the command-line tools share: errors of the user's as one line and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around reading the input and building the parts: a ValueError or OSError becomes `error: ...`, exit status 2.

    Training itself runs outside it: an error there is ours, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
