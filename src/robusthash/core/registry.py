"""Registry of names: where text of a recipe or the command line becomes an object."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from robusthash.core.option_types import annotated, fault
from robusthash.core.plugins import GROUP, import_plugin

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
_POINTS = [GROUP]  # groups of entry points that are not imported yet

_HOW = "docs/add-a-method.md"


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
    """The card of a registered name, or of ``module:name`` outside the package (``core.plugins``).

    Raises:
        KeyError: no such name, or of another kind; the nearest known one is offered.
        ImportError, ValueError: as of ``import_plugin``.
    """
    if ":" in name:
        return _plugin_card(kind, name)
    if (kind, name) not in _CARDS:
        _import_unread()
    if (kind, name) not in _CARDS:
        if ("question-search", name) in _CARDS:
            raise KeyError(
                f"no {kind} is called {name!r}, which is a search by oracle queries: "
                f"'robusthash questions RUN --search {name}' runs it"
            )
        names = [known for other, known in _CARDS if other == kind]
        raise KeyError(f"no {kind} is called {name!r}{nearest(name, names)}")
    return _CARDS[kind, name]


def _plugin_card(kind: str, named: str) -> Card:
    """The card of ``module:name``, the Python name, or the one that the module registers."""
    module, name = import_plugin(named)
    member = getattr(module, name, None)
    entry = next((entry for entry in _CARDS.values() if entry.kind == kind and entry.make is member), None)
    entry = entry or _CARDS.get((kind, name))
    if entry is not None and (entry.make is member or not _is_own(entry.make)):
        return entry
    if (other := None if member is None else card_of(member)) is not None:
        raise KeyError(f"{named!r} is registered as {other.kind} {other.name!r}; here goes: {kind}")
    if callable(member):
        raise KeyError(f"{named!r} is not registered: write @register({kind!r}, {name!r}) above it ({_HOW})")
    theirs = [c for c in _CARDS.values() if c.kind == kind and c.make.__module__ == module.__name__]
    known = {getattr(entry.make, "__name__", entry.name) for entry in theirs}
    close = difflib.get_close_matches(name, [*known, *(entry.name for entry in theirs)], n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    has = f" It has: {', '.join(sorted(known))}." if known else f" It registers no {kind}; see {_HOW}."
    raise KeyError(f"{module.__name__} has no {kind} {name!r}{hint}{has}")


def card_of(make: Callable[..., Any]) -> Card | None:
    """The card of a class or function; None where it is not registered."""
    return next((known for known in _CARDS.values() if known.make is make), None)


def name_of(part: object) -> str:
    """The registered name of an object's class, as recipes write it; else the name of the class."""
    known = card_of(type(part))
    return type(part).__name__ if known is None else known.name


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
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"the name of {article} {kind} is a text, got {options['name']!r}")
    if "name" not in options:
        raise KeyError(f"{kind} needs a 'name', got {dict(options)}")
    entry = card(kind, options.pop("name"))
    accepted = inspect.signature(entry.make).parameters
    for key, value in options.items():
        if key not in accepted:
            raise KeyError(f"{kind} {entry.name!r} takes no {key!r}{nearest(key, accepted)}")
        problem = fault(value, annotated(entry.make).get(key, Any))
        if type(value) is int and value < 0 and _is_own(entry.make):  # counts, sizes, seeds
            problem = problem or f"must not be below 0, got {value}"
        if problem:
            raise ValueError(f"{key} of {kind} {entry.name!r} {problem}")
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
    while _POINTS:
        _import_installed(_POINTS.pop())


def _import_installed(group: str) -> None:
    """Import the plug-ins of installed packages; a broken one is named, and the others go on."""
    from importlib.metadata import entry_points

    for point in entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # whatever the code of others raises
            fault = f"{type(error).__name__}: {error}"
            warnings.warn(f"plug-in {point.name!r} ({point.value}) is left out: {fault}", stacklevel=2)
