"""Knowledge distillation in PyTorch: a faithful fork of MDistiller that carries DCGD.

From Python, `distill` trains a student of one's own from a teacher, `distiller` gives a method's loss for a loop of
one's own, and `create_model` and the lists name what there is. They are imported when they are first used, so that
`import mdistiller` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Loss, Result, create_model, distill, distiller, list_datasets, list_methods, list_models
    from .errors import UserError

__version__ = "0.1.0"

__all__ = [
    "Loss",
    "Result",
    "UserError",
    "create_model",
    "distill",
    "distiller",
    "list_datasets",
    "list_methods",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".errors" if name == "UserError" else ".api", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
