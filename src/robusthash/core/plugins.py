"""Code from outside of the package: where ``module:name`` is looked for, and at whose word it is imported.

A user's own recipes and commands may name any module: it is looked for next to the recipe, in the current
folder, and among what is installed. A run or an exported model may be a stranger's: there a module is
imported only if it is the very source file that was recorded, and one that an own command imported before.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PLUGINS = "ROBUSTHASH_PLUGINS"
"""Environment variable: modules, with commas, that runs may import whatever their source is by now."""

GROUP = "robusthash.plugins"
"""Entry points of installed packages: modules that register names when they are imported."""

Sources = Mapping[str, Mapping[str, str]]
"""``file`` and ``sha256`` of the source of each module."""

_PACKAGE = __name__.partition(".")[0]
_NAMED = re.compile(r"(\w+(?:\.\w+)*):[\w.-]+")


class PluginError(ImportError):
    """Code that a file names and that is not imported at its word; the message says how to allow it."""


@dataclass(frozen=True)
class _Opened:
    """Settings that are being read and may be a stranger's, and the sources that they were made with."""

    source: str
    recorded: Sources


_OPENED: ContextVar[_Opened | None] = ContextVar("_OPENED", default=None)
_FOLDERS: ContextVar[tuple[Path, ...]] = ContextVar("_FOLDERS", default=())


@contextmanager
def module_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Look for modules in ``folders`` too, those of an own recipe; without effect in ``without_new_code``."""
    token = _FOLDERS.set(tuple(folders))
    try:
        yield
    finally:
        _FOLDERS.reset(token)


@contextmanager
def without_new_code(source: object, recorded: Sources | None = None) -> Iterator[None]:
    """Refuse ``module:name`` in a block that reads ``source``, which may be a stranger's, as a run.

    Imported are modules of ``recorded`` whose source file is where it was, has not changed, and was
    imported by an own command before. Modules that are imported already may be named, unless they were
    recorded with another source, and those of the environment variable ``PLUGINS``.
    """
    token = _OPENED.set(_Opened(str(source), recorded or {}))
    try:
        yield
    finally:
        _OPENED.reset(token)


def import_plugin(named: str) -> tuple[ModuleType, str]:
    """Module and name of ``module:name``.

    Raises:
        KeyError: no module before the colon.
        ImportError: no such module, or one that fails while it is imported.
        PluginError: a module that ``without_new_code`` refuses; one whose name another file has taken.
    """
    module, _, name = named.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        raise KeyError(f"{named!r} names no module before the colon; write module:name")
    opened = _OPENED.get()
    foreign = module.partition(".")[0] != _PACKAGE
    folders = _own_folders() if opened is None else _checked(opened, module, named) if foreign else []
    try:
        with _first_on_path(folders):
            loaded = _imported(module, named, folders)
    except ImportError as error:
        if opened is None:
            raise
        raise PluginError(f"{opened.source}: {error}") from error
    expected, file = _file_in(folders, module), file_of(loaded)
    if expected is not None and file is not None and not expected.samefile(file):
        raise PluginError(
            f"{named!r} is {expected}, and this process has imported {file} by that name; rename one of them"
        )
    if opened is None and foreign and file is not None:
        _remember(file)
    return loaded, name


def file_of(module: ModuleType | None) -> Path | None:
    """The source file of a module; None of one that has none."""
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).absolute()


def sources(*settings: Any) -> dict[str, dict[str, str]]:
    """Source file and sha256 of every module that settings name as ``module:name``, as far as imported."""
    modules = sorted({module for value in settings for module in _modules_in(value)})
    files = {module: file_of(sys.modules.get(module)) for module in modules}
    return {
        module: {"file": str(file), "sha256": _sha256(file)}
        for module, file in files.items()
        if file is not None and module.partition(".")[0] != _PACKAGE
    }


def source_digests(*settings: Any) -> list[str]:
    """SHA-256 of the sources of settings, for keys of what is stored; empty where they name no plug-in."""
    return [facts["sha256"] for facts in sources(*settings).values()]


def as_sources(value: Any) -> Sources:
    """``sources`` as read from a file; KeyError, TypeError or AttributeError of anything else."""
    return {module: {key: str(facts[key]) for key in ("file", "sha256")} for module, facts in value.items()}


def changed(before: Sources, now: Sources) -> list[str]:
    """The files of modules whose source differs from that of ``before``."""
    return [now[m]["file"] for m in now if m in before and before[m]["sha256"] != now[m]["sha256"]]


def _modules_in(value: Any) -> Iterator[str]:
    if isinstance(value, str) and (match := _NAMED.fullmatch(value)):
        yield match[1]
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _modules_in(part)


def _own_folders() -> list[Path]:
    try:
        return [*(folder.absolute() for folder in _FOLDERS.get()), Path.cwd()]
    except FileNotFoundError:  # the current folder was deleted
        return list(_FOLDERS.get())


def _checked(opened: _Opened, module: str, named: str) -> list[Path]:
    """The folder of a recorded module that may be imported; a PluginError says why it may not."""
    loaded, here = module in sys.modules, _recorded_folder(opened, module)
    if module in _allowed():
        return [] if loaded else [*here, Path.cwd()]
    if fault := _fault(opened, module):
        refused = [m for m in dict.fromkeys([module, *opened.recorded]) if _fault(opened, m)]
        allow = f"{PLUGINS}={','.join(m for m in refused if m not in _allowed())}"
        raise PluginError(f"{opened.source} names {named!r}, {fault}: {allow}")
    return [] if loaded else here


def _allowed() -> list[str]:
    return [name.strip() for name in os.environ.get(PLUGINS, "").split(",")]


def _fault(opened: _Opened, module: str) -> str:
    """The reason why a module is not imported, and the remedy; "" where it may be."""
    recorded, loaded = opened.recorded.get(module), sys.modules.get(module)
    if recorded is None:
        reason = "code of a module outside of this package; if you trust it, let it be imported"
        return "" if loaded is not None else reason
    file = file_of(loaded) or Path(recorded["file"])
    if loaded is None and not _recorded_folder(opened, module):
        return (
            f"and its source file {file} is gone; put it back, or let one in the current folder or an "
            "installed one take its place"
        )
    if _sha256(file) != recorded["sha256"]:
        return f"and {file} has changed since this was made; put it back, or let it be imported as it is now"
    if loaded is None and not _marker(file).is_file():
        return f"code in {file} that no command of yours has used yet; if you trust it, let it be imported"
    return ""


def _recorded_folder(opened: _Opened, module: str) -> list[Path]:
    """The folder in which a module is its recorded file; none where that is gone, or of another module."""
    file = Path(opened.recorded.get(module, {}).get("file", ""))
    for folder in list(file.parents)[module.count(".") :][:2]:
        if file.is_file() and _file_in([folder], module) == file:
            return [folder]
    return []


def _imported(module: str, named: str, folders: Sequence[Path]) -> ModuleType:
    if module not in sys.modules:
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            places = " and ".join(dict.fromkeys(str(folder) for folder in folders))
            remedy = "" if _OPENED.get() else ", put it next to the recipe"  # of a run there is none
            raise ModuleNotFoundError(
                f"no Python module {error.name!r} (wanted by {named!r}) in {places or 'sys.path'}, and none "
                f"is installed; go to its folder{remedy}, or install it"
            ) from error
        raise ImportError(f"{named!r} needs a module that is not there: {error}") from error
    except Exception as error:  # whatever the code of others raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        file, line = (
            getattr(error, "filename", None) or place.filename,
            getattr(error, "lineno", place.lineno),
        )
        reason = next(iter(str(error).splitlines()), "")
        raise ImportError(
            f"{named!r} cannot be imported: {type(error).__name__}: {reason} ({file}, line {line})"
        ) from error


@contextmanager
def _first_on_path(folders: Sequence[Path]) -> Iterator[None]:
    """Folders first on the path; afterwards last, for what the module imports later."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    try:
        yield
    finally:
        for name in names:
            sys.path.remove(name)
            if name not in sys.path:
                sys.path.append(name)


def _file_in(folders: Sequence[Path], module: str) -> Path | None:
    for folder in folders:
        base = folder.joinpath(*module.split("."))
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _marker(file: Path) -> Path:
    """An empty file of this user, which says that an own command imported this content from this place."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    key = hashlib.sha256(f"{file.resolve()}\0{_sha256(file)}".encode()).hexdigest()
    return Path(state) / _PACKAGE / "plugins" / key


def _remember(file: Path) -> None:
    """Best effort: where nothing can be written, runs that need the module ask for ``PLUGINS``."""
    try:
        marker = _marker(file)
        if not marker.is_file():
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    except OSError:
        return
