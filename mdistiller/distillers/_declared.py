"""What a method sees of a frozen network: the outputs that it declared, and an error by name for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from ..models.outputs import feature_of, restricted


class UndeclaredOutputError(LookupError):
    """A method reads an output of a frozen network that it did not declare."""


class DeclaredFeatures(dict[str, Any]):
    """The declared features. Asking for one that the network has, but that was not declared, raises.

    Args:
        features: all that the network returned, or those that its faster copy did.
        outputs: the declared names.
        owner: whose network it is, for the message.
    """

    def __init__(self, features: Mapping[str, Any], outputs: Sequence[str], owner: str) -> None:
        super().__init__(restricted(features, outputs, lambda name: UndeclaredOutput(name, outputs, owner)))
        self._outputs, self._owner = outputs, owner
        self._names = {feature_of(output) for output in outputs}

    def __missing__(self, name: str) -> NoReturn:
        if name in self._names:
            raise KeyError(name)  # declared, but the network has none
        raise undeclared(name, self._outputs, self._owner)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if self._has(name) else default

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(name, *default) if self._has(name) or default else self[name]

    def setdefault(self, name: str, default: Any = None) -> Any:
        return self[name] if self._has(name) else super().setdefault(name, default)

    def __contains__(self, name: object) -> bool:
        return self._has(name)

    def _has(self, name: object) -> bool:
        if name not in self._names:
            raise undeclared(str(name), self._outputs, self._owner)
        return super().__contains__(name)


class UndeclaredOutput:
    """Stands for logits, or for a map in a list, of a network of which only others were declared; any use raises."""

    def __init__(self, name: str, outputs: Sequence[str], owner: str) -> None:
        self._name, self._outputs, self._owner = name, outputs, owner

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copying and pickling ask for special methods
            raise AttributeError(name)
        raise undeclared(self._name, self._outputs, self._owner)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        values = [*args, *(kwargs or {}).values()]
        values += [item for value in values if isinstance(value, (list, tuple)) for item in value]
        own = next(value for value in values if isinstance(value, cls))
        raise undeclared(own._name, own._outputs, own._owner)

    def _refuse(self, *_: Any) -> NoReturn:
        raise undeclared(self._name, self._outputs, self._owner)

    # Python looks operators up on the class, past __getattr__.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __abs__ = __getitem__ = __len__ = __iter__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = _refuse


def undeclared(name: str, outputs: Sequence[str], owner: str) -> UndeclaredOutputError:
    """The error for reading the output `name` of a network of which only `outputs` were declared."""
    return UndeclaredOutputError(
        f"{owner}: {name!r} is read, but only {', '.join(map(repr, outputs)) or 'nothing'} is declared; add it to "
        "teacher_outputs, or to add_frozen's outputs"
    )


def declared(
    output: tuple[Any, Mapping[str, Any]], outputs: Sequence[str], owner: str
) -> tuple[Tensor, dict[str, Any]]:
    """A network's (logits, features), restricted to the declared `outputs`."""
    logits, features = output
    seen: Any = logits if "logits" in outputs else UndeclaredOutput("logits", outputs, owner)
    return seen, DeclaredFeatures(features, outputs, owner)
