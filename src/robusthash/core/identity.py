"""Identity: what makes an attack or a suite, as plain data of registered names, and the digest of that."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from robusthash.core.registry import card_of
from robusthash.core.runtime import digest

SCHEME = 2
"""Version of the rules below, hashed with every identity. It rises when a rule or a registered default
changes."""

FIRST = 1  # digests of ``repr``, which carry no number


@runtime_checkable
class Options(Protocol):
    """A part whose parameters are not its dataclass fields."""

    def identity_options(self) -> Mapping[str, Any]:
        """The parameters that results depend on, by the names that its class takes them under."""


def describe(value: Any) -> Any:
    """A value as plain JSON data that names what results depend on, and nothing of how it is written in
    Python.

    A part (guide, loss, search, view of the victim, ...) becomes its registered kind and name, or
    ``module:qualname`` where it has none, with the parameters that differ from their defaults. A dataclass
    field with ``compare=False`` holds what is learned or derived, and takes no part. Tensors become a digest
    of their content; a whole float equals the int.

    Raises:
        TypeError: what has no such description: a closure, a lambda, an object with state that is no
            dataclass.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else float(value)
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return _content(value)
    if inspect.isroutine(value) or isinstance(value, type):
        return _named_code(value)
    return _part(value)


def changes(value: Any, skip: Collection[str] = ()) -> dict[str, Any]:
    """The dataclass fields of ``value`` that differ from their defaults, described; those without a default
    always."""
    found = {}
    for field in dataclasses.fields(value):
        if field.name in skip or not field.compare or not field.init:
            continue
        described = describe(getattr(value, field.name))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING or describe(default) != described:
            found[field.name] = described
    return found


def name_of(value: Any) -> dict[str, str]:
    """The registered kind and name of an object, or ``module:qualname`` of its class."""
    return _name(type(value))


def identity(value: Any, length: int = 12) -> str:
    """Digest of the description of a value and the number of the scheme."""
    return digest({"scheme": SCHEME, "identity": describe(value)}, length)


def marked_identity(value: Any) -> str:
    """``identity`` with the number of the scheme before it, as results carry it: "2-0f3a...", by
    ``scheme_of``."""
    return f"{SCHEME}-{identity(value)}"


def scheme_of(marked: str) -> int:
    """The scheme that a digest in a stored result was made by; the first wrote no number."""
    number, dash, _ = marked.partition("-")
    return int(number) if dash and number.isdecimal() else FIRST


def _name(make: Callable[..., Any]) -> dict[str, str]:
    card = card_of(make)
    if card is not None:
        return {"kind": card.kind, "name": card.name}
    return {"code": f"{make.__module__}:{make.__qualname__}"}


def _named_code(value: Callable[..., Any]) -> dict[str, str]:
    if not isinstance(value, type) and (not inspect.isfunction(value) or "<" in value.__qualname__):
        raise TypeError(
            f"{value!r} has no name to identify it by; write it as a function of a module or a dataclass"
        )
    return _name(value)


def _part(value: Any) -> dict[str, Any]:
    if isinstance(value, Options):
        defaults = inspect.signature(type(value)).parameters
        described = {name: describe(option) for name, option in value.identity_options().items()}
        options = {
            name: option
            for name, option in described.items()
            if name not in defaults
            or defaults[name].default is inspect.Parameter.empty
            or describe(defaults[name].default) != option
        }
    elif dataclasses.is_dataclass(value):
        options = changes(value)
    elif _stateless(value):
        options = {}
    else:
        raise TypeError(
            f"{type(value).__qualname__} has state and is no dataclass, so what its results depend on cannot be "
            "read; make it a frozen dataclass, or give it identity_options() -> dict of its parameters"
        )
    return {**name_of(value), **({"options": options} if options else {})}


def _stateless(value: Any) -> bool:
    """Whether an object holds nothing; one that pickles in its own way, as a ``partial``, may hold what is
    not seen."""
    return type(value).__reduce__ is object.__reduce__ and not value.__getstate__()


def _content(value: Tensor | np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
    found = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return {"shape": list(array.shape), "dtype": array.dtype.str, "content": found}
