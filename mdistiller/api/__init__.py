"""mdistiller from Python: `distill`, `distiller`, and the names of networks, methods and data sets."""

from ..models.catalog import create_model, list_models
from .lists import list_datasets, list_methods
from .loss import Loss, distiller
from .result import Result
from .training import distill

__all__ = ["Loss", "Result", "create_model", "distill", "distiller", "list_datasets", "list_methods", "list_models"]
