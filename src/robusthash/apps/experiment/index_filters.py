"""Filters as they are written on a command line, and the removal of items of a library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robusthash.apps.experiment.index_items import key_of, named_file, path_payload
from robusthash.core.registry import nearest
from robusthash.data.image_files import path_text
from robusthash.index import CodeIndex, address_of, open_index

_EXAMPLE = "--where takes a mapping such as '{label: cat}'"


@dataclass(frozen=True)
class Removed:
    """The outcome of a removal.

    Attributes:
        removed, left: numbers of items.
        missing: the ids and paths that no item has.
    """

    removed: int
    left: int
    missing: tuple[int | str, ...] = ()


def read_filter(text: str) -> dict[str, Any]:
    """A filter as YAML, every value as it is written: 2 and 007 are texts, no is the text or false.

    Raises:
        ValueError: no YAML, or no mapping.
    """
    try:
        where = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{_EXAMPLE}, got {text!r}: {' '.join(str(error).split())}") from None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{_EXAMPLE}, got {text!r}")
    words = yaml.SafeLoader.bool_values

    def options(value: Any) -> list[Any]:
        several = value if isinstance(value, list) else [value]
        truths = [words[one.lower()] for one in several if isinstance(one, str) and one.lower() in words]
        return [*several, *truths]

    return {key: options(value) for key, value in where.items()}


def values_of(directory: str | Path, where: str) -> str:
    """A line on a filter that allowed no item: the values that items have under its keys."""
    with open_index(address_of(directory), create=False) as index:
        return _values(index, where)


def remove_items(
    directory: str | Path, ids: Sequence[int] = (), paths: Sequence[Path] = (), where: str | None = None
) -> Removed:
    """Remove items by id, by path (a folder's path removes all below it) or by filter: one of them.

    Raises:
        ValueError: none of them, several, or no item is meant.
    """
    if (len(ids) > 0) + (len(paths) > 0) + (where is not None) != 1:
        raise ValueError("name ids, --path or --where '{label: cat}': one of them")
    with open_index(address_of(directory), create=False) as index:
        missing: Sequence[int | str] = ()
        if where is not None:
            removed = index.remove(read_filter(where))
            reason = "" if removed else _values(index, where)
        elif paths:
            keys = {path_text(path): _keys(index, path) for path in paths}
            missing = absent = [path for path, matches in keys.items() if not matches]
            removed = index.remove(keys=[key for matches in keys.values() for key in matches])
            reason = f"no item is at or below {absent[0]}{_near(index, absent[0])}" if absent else ""
        else:
            missing = _lacking(index, ids)
            removed = index.remove(list(ids))
            reason = f"no item has the id {missing[0]}" if missing else ""
        if not removed:
            raise ValueError(f"{reason}; nothing was removed of {index.count()} items")
        return Removed(removed, index.count(), tuple(missing))


def _values(index: CodeIndex, where: str) -> str:
    values = {key: index.values(key, 11) for key in read_filter(where)}
    has = [
        f"{key} {', '.join(map(_written, some[:10])) or '(nothing)'}{', ...' * (len(some) > 10)}"
        for key, some in values.items()
    ]
    return f"no item passes the filter {where}; items have {'; '.join(has)}"


def _written(value: Any) -> str:
    """A value as a filter writes it; quoted where the bare text would be read as something else."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        plain = yaml.load(f"{{k: [{value}, x]}}", yaml.BaseLoader) == {"k": [value, "x"]}
    except yaml.YAMLError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


def _keys(index: CodeIndex, path: Path) -> list[str]:
    """The keys of a file, or of all below a folder; the name may be as it is, or as it is shown."""
    own = path_payload(path)
    text, written = own["path"], own.get("path_hex")
    below = index.keys(f"{text}/")
    if written is not None:
        below = [key for key in below if named_file(key, key.rpartition("#")[2], written + b"/".hex())]
    elif not index.held([text]):
        readable = index.keys(f"{text}#")
        below += [key for key in readable if named_file(key, key[len(text) + 1 :])]
    return [*index.held([key_of(path)]), *below]


def _near(index: CodeIndex, path: str) -> str:
    """Names next to a path that no item has."""
    folder = path_payload(path)["path"].rpartition("/")[0]
    siblings = sorted({key[len(folder) + 1 :].partition("/")[0] for key in index.keys(f"{folder}/")})
    if siblings:
        return nearest(path.rpartition("/")[2], siblings[:1000])
    first = index.keys()[:1]
    return f"; the index holds paths such as {first[0]}" if first else "; the index holds no paths"


def _lacking(index: CodeIndex, ids: Sequence[int]) -> list[int]:
    """Those ids that no item has."""
    lacking = []
    for item in ids:
        try:
            index.payload([item])
        except KeyError:
            lacking.append(item)
    return lacking
