"""Identity of an attack or a suite: plain data of registered names and parameters, and its digest."""

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
"""Version of the rules below, hashed with every identity; it rises with a rule or a registered default."""

FIRST = 1  # digests of ``repr``, which carry no number


@runtime_checkable
class Options(Protocol):
    """A part whose parameters are not its dataclass fields."""

    def identity_options(self) -> Mapping[str, Any]:
        """The parameters that results depend on, by the names that the class takes them under."""


def describe(value: Any) -> Any:
    """A value as plain JSON data that names what results depend on, independent of its Python code.

    A part (guide, loss, search, view of the victim, ...) becomes its registered kind and name, or
    ``module:qualname``, with the parameters that differ from their defaults. Dataclass fields with
    ``compare=False`` are learned or derived and left out. Tensors become a digest; a whole float equals the
    int.

    Raises:
        TypeError: a closure, a lambda, an object with state that is no dataclass.
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
    """The dataclass fields of ``value`` without a default or unlike it, described."""
    options = {}
    for field in dataclasses.fields(value):
        if field.name in skip or not field.compare or not field.init:
            continue
        described = describe(getattr(value, field.name))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is dataclasses.MISSING or describe(default) != described:
            options[field.name] = described
    return options


def name_of(value: Any) -> dict[str, str]:
    """The registered kind and name of an object, or ``module:qualname`` of its class."""
    return _name(type(value))


def identity(value: Any, length: int = 12) -> str:
    """Digest of the description of a value and the number of the scheme."""
    return digest({"scheme": SCHEME, "identity": describe(value)}, length)


def marked_identity(value: Any) -> str:
    """``identity`` with the number of the scheme in front, as results carry it: "2-0f3a..."."""
    return f"{SCHEME}-{identity(value)}"


def scheme_of(marked: str) -> int:
    """The scheme of a digest in a stored result; the first wrote no number."""
    number, dash, _ = marked.partition("-")
    return int(number) if dash and number.isdecimal() else FIRST


def _name(make: Callable[..., Any]) -> dict[str, str]:
    card = card_of(make)
    if card is not None:
        return {"kind": card.kind, "name": card.name}
    return {"code": f"{make.__module__}:{make.__qualname__}"}


def _named_code(value: Callable[..., Any]) -> dict[str, str]:
    if not isinstance(value, type) and (not inspect.isfunction(value) or "<" in value.__qualname__):
        raise TypeError(f"{value!r} has no name to identify it by; use a function of a module or a dataclass")
    return _name(value)


def _part(value: Any) -> dict[str, Any]:
    if isinstance(value, Options):
        parameters = inspect.signature(type(value)).parameters.values()
        defaults = {p.name: describe(p.default) for p in parameters if p.default is not p.empty}
        described = {name: describe(option) for name, option in value.identity_options().items()}
        options = {k: v for k, v in described.items() if k not in defaults or defaults[k] != v}
    elif dataclasses.is_dataclass(value):
        options = changes(value)
    elif _stateless(value):
        options = {}
    else:
        raise TypeError(
            f"{type(value).__qualname__} has state and is no dataclass, so what its results depend on cannot "
            "be read; make it a frozen dataclass, or give it identity_options() -> dict of its parameters"
        )
    return {**name_of(value), **({"options": options} if options else {})}


def _stateless(value: Any) -> bool:
    """Tell whether an object holds nothing; one that pickles its own way, as ``partial``, may hide state."""
    return type(value).__reduce__ is object.__reduce__ and not value.__getstate__()


def _content(value: Tensor | np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
    content = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return {"shape": list(array.shape), "dtype": array.dtype.str, "content": content}
