"""Cells of a manifest that hold labels or captions, in the notations that other programs write."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Cell = tuple[int, Any]
"""Line of a manifest and the value of one column in it: a text of CSV, any value of JSON."""

_MISSING = frozenset({"nan", "none", "null", "nil", "n/a", "#n/a", "<na>", "nat"})
_TRUTH = ("true", "false")
_BITS = {"0": 0, "0.": 0, "0.0": 0, "false": 0, "1": 1, "1.": 1, "1.0": 1, "true": 1}
_DECIMAL = re.compile(r"[+-]?\d+(\.\d*)?")
_BIT = r"(?:[01](?:\.0?)?|true|false)"
_VECTOR = re.compile(rf"[\[(]?\s*{_BIT}(?:[\s,;|]+{_BIT})+\s*[\])]?", re.IGNORECASE)
_NUMBERS = re.compile(r"\d+(\s+\d+)+")
_LIST = 'write the labels with ";" between, or in JSON lines as a list of texts'


def label_rows(cells: Sequence[Cell], where: str) -> tuple[list[tuple[str, ...]], str]:
    """The labels of each item, sorted and without repetitions, and a note on their form ("" of names).

    Read are a list of names or whole numbers, names with ``;`` between, {name: 0 or 1}, the same as Python
    prints them, and vectors of 0 and 1 (or true and false), where all items have one of the same length: its
    places 0, 1, ... become the labels. Empty cells, null and JSON's NaN are items without a label.

    Args:
        where: manifest and column, for messages.

    Raises:
        ValueError: a cell that may mean something else, with its line and how to write it.
    """
    values = [(line, _opened(value, f"{where}, line {line}: ")) for line, value in cells]
    present = [value for _, value in values if value is not None and value != []]
    vectors = [value for value in present if isinstance(value, list) and len(value) > 1 and _are_bits(value)]
    if vectors and len(vectors) == len(present) and len({len(vector) for vector in vectors}) == 1:
        rows = [tuple(str(n) for n, bit in enumerate(value or ()) if _bit(bit)) for _, value in values]
        return [
            tuple(sorted(row)) for row in rows
        ], f"Labels are the {len(vectors[0])} places of 0/1 vectors."
    rows = [tuple(sorted(set(_names(value, f"{where}, line {line}: ")))) for line, value in values]
    _refuse_two_notations(cells, rows, where)
    return rows, ""


def caption_texts(value: Any) -> tuple[str, ...]:
    """The captions of a cell: a list, one text, or a list of texts as Python prints it."""
    if isinstance(value, str) and value.strip().startswith("["):
        parsed = _literal(value.strip())
        value = parsed if isinstance(parsed, list) and all(isinstance(t, str) for t in parsed) else value
    parts = value if isinstance(value, list) else [value]
    return tuple(text for part in parts if not _lacking(part) and (text := str(part).strip()))


def _lacking(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _literal(text: str) -> Any:
    """The list, tuple, set or dict that Python printed; None of any other text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _opened(value: Any, start: str) -> Any:
    """A cell as JSON would hold it: None, a text without structure, a number, a list or a mapping."""
    if _lacking(value):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _VECTOR.fullmatch(text):
        return re.findall(_BIT, text, re.IGNORECASE)
    if text[:1] in ("[", "(", "{") and text[-1:] in ("]", ")", "}"):
        parsed = _literal(text)
        if isinstance(parsed, list | tuple | set | dict):
            return parsed if isinstance(parsed, dict) else list(parsed)
    if ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    if _NUMBERS.fullmatch(text):
        raise ValueError(f"{start}{text!r} is a list of numbers; {_LIST}")
    if marks := [mark for mark in ",|[]{}" if mark in text]:
        one = f", or end the cell with ';' where {text!r} is one name" if marks[0] in ",|" else ""
        raise ValueError(f"{start}{text!r} may be several labels ({marks[0]!r}); {_LIST}{one}")
    return text or None


def _bit(value: Any) -> int | None:
    """The 0 or 1 that a number, a truth value or a text is; None of any other."""
    if isinstance(value, str):
        return _BITS.get(value.strip().lower())
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def _are_bits(values: Sequence[Any]) -> bool:
    return all(_bit(value) is not None for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(_DECIMAL.fullmatch(value)))


def _names(value: Any, start: str) -> list[str]:
    """The names of a cell that is no vector."""
    if isinstance(value, Mapping):
        if not _are_bits(list(value.values())):
            raise ValueError(f"{start}{value!r} holds other values than 0 and 1; list the labels that it has")
        value = [name for name, has in value.items() if _bit(has)]
    if not isinstance(value, list):
        return [] if value is None else [_name(value, start)]
    numbers = [float(part) for part in value if _is_number(part)]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{start}{value!r} repeats a number, as a vector of 0 and 1 does, but not all items have such "
            f"a vector of one length; {_LIST}"
        )
    return [_name(part, start) for part in value if part != ""]


def _name(value: Any, start: str) -> str:
    """A label as text; a whole number as an integer."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _TRUTH):
        raise ValueError(f"{start}{value!r} is a truth value, not a label; write the name of what is true")
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip().lower() not in _MISSING:
        return value.strip()
    if isinstance(value, str) or _lacking(value):
        raise ValueError(
            f"{start}{value!r} looks like a missing value; leave the cell (or the list) empty where an item "
            "has no label, or give the class another name"
        )
    raise ValueError(f"{start}{value!r} is no label; labels are texts or whole numbers: {_LIST}")


def _refuse_two_notations(cells: Sequence[Cell], rows: Sequence[Sequence[str]], where: str) -> None:
    """Refuse labels that are one number written in two ways, such as 7 and 007, or 1 and 1.0."""
    first: dict[float, tuple[str, int]] = {}
    for (line, _), row in zip(cells, rows, strict=True):
        for label in row:
            if not _DECIMAL.fullmatch(label):
                continue
            known, at = first.setdefault(float(label), (label, line))
            if known != label:
                raise ValueError(
                    f"{where}: {known!r} (line {at}) and {label!r} (line {line}) are one number in two "
                    "notations; write it one way"
                )
