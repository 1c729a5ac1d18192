"""Registry of names: where text of a recipe or the command line becomes an object."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

Factory = TypeVar("Factory", bound=Callable[..., Any])
Evidence = Literal["paper+code", "paper", "reconstruction", "own", "library"]
State = Literal["tested", "measured"]
"""``measured``: on real data, in a table of the documents; ``tested``: by the tests alone."""


@dataclass(frozen=True)
class Card:
    """Entry of a registered name, as ``robusthash list`` shows it."""

    kind: str
    name: str
    make: Callable[..., Any]
    paper: str = ""
    evidence: Evidence = "own"
    modality: str = "any"
    supervised: bool = True
    targeted: bool = False
    summary: str = ""
    state: State = "tested"
    published: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the paper's own evaluation where they are not the defaults."""


_PACKAGE = __name__.partition(".")[0]
_CARDS: dict[tuple[str, str], Card] = {}
_UNREAD: list[str] = []  # packages whose modules register names and are not imported yet


def register(kind: str, name: str, **facts: Any) -> Callable[[Factory], Factory]:
    """Register a class or function as ``name`` of ``kind``; ``facts`` are the other fields of its ``Card``.

    Raises:
        ValueError: the name is taken.
    """

    def record(make: Factory) -> Factory:
        if not make.__module__.startswith(f"{_PACKAGE}."):  # of others: the package's own names come first
            _import_unread()
        if (kind, name) in _CARDS:
            raise ValueError(f"{kind} {name!r} is already registered by {_CARDS[kind, name].make.__module__}")
        summary = (inspect.getdoc(make) or "").partition("\n")[0]
        _CARDS[kind, name] = Card(kind, name, make, summary=summary, **facts)
        return make

    return record


def nearest(word: str, known: Any) -> str:
    """A hint that names the likeliest of ``known`` for a mistyped ``word``, and lists up to 40 of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f"{hint or '.'} Known: {', '.join(known)}."
    return listed if len(known) <= 40 else hint


def card(kind: str, name: str) -> Card:
    """The card of a registered name; ``module:name`` imports code from outside the package first.

    Raises:
        KeyError: with the nearest known name.
    """
    if ":" in name:
        module, _, name = name.partition(":")
        importlib.import_module(module)
    if (kind, name) not in _CARDS:
        _import_unread()
    if (kind, name) not in _CARDS:
        names = [known for other, known in _CARDS if other == kind]
        raise KeyError(f"no {kind} is called {name!r}{nearest(name, names)}")
    return _CARDS[kind, name]


def card_of(make: Callable[..., Any]) -> Card | None:
    """The card of a class or function; None where it is not registered."""
    return next((known for known in _CARDS.values() if known.make is make), None)


def check(kind: str, settings: str | Mapping[str, Any]) -> tuple[Card, dict[str, Any]]:
    """The card and the checked options of ``settings``: "csq", or {"name": "csq", "quantisation": 1e-4}.

    Raises:
        KeyError: no name, an unknown name, or an unknown option; the nearest is offered.
        ValueError: neither a name nor a mapping; a ``Literal`` option with another word.
    """
    if not isinstance(settings, str | Mapping):
        raise ValueError(f"{kind} is a name, or a mapping with 'name' and options, got {settings!r}")
    options = {"name": settings} if isinstance(settings, str) else dict(settings)
    if "name" not in options:
        raise KeyError(f"{kind} needs a 'name', got {dict(options)}")
    entry = card(kind, options.pop("name"))
    accepted = inspect.signature(entry.make).parameters
    for key, value in options.items():
        if key not in accepted:
            raise KeyError(f"{kind} {entry.name!r} takes no {key!r}{nearest(key, accepted)}")
        words = _words(entry.make).get(key)
        if words is not None and value not in words:
            *most, last = map(repr, words)
            choice = " or ".join(text for text in (", ".join(most), last) if text)
            raise ValueError(f"{key} of {kind} {entry.name!r} must be {choice}, got {value!r}")
    return entry, options


@cache
def _words(make: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The words of each option that is annotated as a ``Literal``."""
    try:
        parameters = inspect.signature(make, eval_str=True).parameters
    except NameError:  # a name imported for type checkers alone
        return {}
    return {
        name: get_args(parameter.annotation)
        for name, parameter in parameters.items()
        if get_origin(parameter.annotation) is Literal
    }


def build(kind: str, settings: str | Mapping[str, Any], **context: Any) -> Any:
    """Make the object that ``settings`` name, with the parts of ``context`` that it takes.

    Raises:
        KeyError, ValueError: what ``check`` refuses; an option that is missing or of a wrong type.
    """
    entry, options = check(kind, settings)
    parameters = inspect.signature(entry.make).parameters
    arguments = {**options, **{key: value for key, value in context.items() if key in parameters}}
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and key not in arguments:
            raise KeyError(f"{kind} {entry.name!r} needs {key!r}")
    try:
        return entry.make(**arguments)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"{kind} {entry.name!r} cannot be made with {options}: {error}") from error


def catalogue(kind: str | None = None) -> list[Card]:
    """All cards, or those of one kind, ordered by kind and name."""
    _import_unread()
    return sorted((c for c in _CARDS.values() if kind in (None, c.kind)), key=lambda c: (c.kind, c.name))


def discover(*packages: str) -> None:
    """Let the modules of ``packages`` register their names, when an unknown name is first looked up."""
    _UNREAD.extend(packages)


def _import_unread() -> None:
    for package in list(_UNREAD):
        path = getattr(importlib.import_module(package), "__path__", ())  # a plain module has none
        for module in pkgutil.walk_packages(path, f"{package}."):
            importlib.import_module(module.name)
        if package in _UNREAD:  # a module that looks names up while it is imported comes through here as well
            _UNREAD.remove(package)
