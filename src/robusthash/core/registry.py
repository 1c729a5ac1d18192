"""Registry of names: where text of a recipe or the command line becomes an object."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from robusthash.core.option_types import annotated, fits, words

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

PLUGINS = "ROBUSTHASH_PLUGINS"
"""Environment variable: modules, with commas, that runs may import."""

_STRANGER: ContextVar[str] = ContextVar("_STRANGER", default="")  # whose settings are being read


def register(kind: str, name: str, **facts: Any) -> Callable[[Factory], Factory]:
    """Register a class or function as ``name`` of ``kind``; ``facts`` are other fields of its ``Card``."""

    def record(make: Factory) -> Factory:
        if not _is_own(make):  # the package's own names come first
            _import_unread()
        if (kind, name) in _CARDS:
            raise ValueError(f"{kind} {name!r} is already registered by {_CARDS[kind, name].make.__module__}")
        summary = (inspect.getdoc(make) or "").partition("\n")[0]
        _CARDS[kind, name] = Card(kind, name, make, summary=summary, **facts)
        return make

    return record


def _is_own(make: Callable[..., Any]) -> bool:
    return make.__module__.startswith(f"{_PACKAGE}.")


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
        ImportError: no such module.
        ValueError: a module that the settings of a stranger name, see ``without_new_code``.
    """
    if ":" in name:
        named, (module, _, name) = name, name.partition(":")
        if not re.fullmatch(r"\w+(\.\w+)*", module):
            raise KeyError(f"{kind} {named!r} names no module before the colon; write module:name")
        _import_plugin(module, named)
    if (kind, name) not in _CARDS:
        _import_unread()
    if (kind, name) not in _CARDS:
        names = [known for other, known in _CARDS if other == kind]
        raise KeyError(f"no {kind} is called {name!r}{nearest(name, names)}")
    return _CARDS[kind, name]


@contextmanager
def without_new_code(source: object) -> Iterator[None]:
    """Refuse ``module:name`` in a block that reads ``source``, a file that may be a stranger's, as a run.

    Modules that are imported already may be named, and those of the environment variable ``PLUGINS``.
    """
    token = _STRANGER.set(str(source))
    try:
        yield
    finally:
        _STRANGER.reset(token)


def _import_plugin(module: str, named: str) -> None:
    source, allowed = _STRANGER.get(), os.environ.get(PLUGINS, "").split(",")
    if source and module not in sys.modules and module not in map(str.strip, allowed):
        raise ValueError(
            f"{source} names {named!r}, code of a module outside of this package; if you trust it, let it "
            f"be imported: {PLUGINS}={module}"
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "?"):
            raise  # the module is there, and something that it imports is not
        remedy = "put its folder on PYTHONPATH, or install it"
        raise ModuleNotFoundError(f"no Python module {module!r} (wanted by {named!r}); {remedy}") from error


def card_of(make: Callable[..., Any]) -> Card | None:
    """The card of a class or function; None where it is not registered."""
    return next((known for known in _CARDS.values() if known.make is make), None)


def check(kind: str, settings: str | Mapping[str, Any]) -> tuple[Card, dict[str, Any]]:
    """The card and the checked options of ``settings``: "csq", or {"name": "csq", "quantisation": 1e-4}.

    Raises:
        KeyError: no name, an unknown name, or an unknown option; the nearest is offered.
        ValueError: neither a name nor a mapping; an option of another type or word.
    """
    if not isinstance(settings, str | Mapping):
        raise ValueError(f"{kind} is a name, or a mapping with 'name' and options, got {settings!r}")
    options = {"name": settings} if isinstance(settings, str) else dict(settings)
    if not isinstance(options.get("name", ""), str):
        raise ValueError(f"the name of a {kind} is a text, got {options['name']!r}")
    if "name" not in options:
        raise KeyError(f"{kind} needs a 'name', got {dict(options)}")
    entry = card(kind, options.pop("name"))
    accepted = inspect.signature(entry.make).parameters
    for key, value in options.items():
        if key not in accepted:
            raise KeyError(f"{kind} {entry.name!r} takes no {key!r}{nearest(key, accepted)}")
        wanted = annotated(entry.make).get(key, Any)
        if not fits(value, wanted):
            raise ValueError(f"{key} of {kind} {entry.name!r} must be {words(wanted)}, got {value!r}")
        if type(value) is int and not 0 <= value < 2**63 and _is_own(entry.make):  # counts, sizes, seeds
            fault = "must not be below 0" if value < 0 else "is too large"
            raise ValueError(f"{key} of {kind} {entry.name!r} {fault}, got {value:.6g}")
    return entry, options


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
    except (TypeError, ZeroDivisionError, IndexError, OverflowError) as error:
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
