"""Labels and captions in the notations of other programs: cells of manifests, arrays, lists; no guesses."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import nearest

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


Labels = np.ndarray | Tensor | Sequence[Any]


def read_labels(
    labels: Labels, count: int, names: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of ``count`` items -> (N, C) multi-hot float32, and the names of the columns.

    Args:
        labels: N class numbers from 0, or names; (N, C) of 0 and 1; or a list of such labels for each item.
        names: of the columns; by default the classes that occur, or the column numbers.

    Raises:
        ValueError: another number of labels, NaN, None or negative numbers, names that are not among those
            given, or a form that can be read in two ways; the message names the item.
    """
    if not isinstance(labels, np.ndarray | Tensor) and not hasattr(labels, "__len__"):
        raise ValueError(f"labels are an array or a list, one for each item, got {type(labels).__name__}")
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} items; each item has its own")
    if isinstance(labels, np.ndarray | Tensor) and labels.ndim != 1:
        return _columns(np.asarray(labels), names)
    rows = list(labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels)
    if all(isinstance(row, np.ndarray | Tensor) and row.ndim == 1 for row in rows):
        widths = sorted({len(row) for row in rows})
        if len(widths) > 1:
            raise ValueError(f"multi-hot labels of {widths[0]} and {widths[-1]} columns; give lists instead")
        return _columns(np.stack([np.asarray(row) for row in rows]), names)
    several = [isinstance(row, list | tuple | set | frozenset) for row in rows]
    if any(several):
        if not all(several):
            raise ValueError(
                f"item {several.index(False)} has one label and item {several.index(True)} a list of labels; "
                "give each a list"
            )
        _refuse_ambiguous(rows)
    return _named([list(row) if several[0] else [row] for row in rows], names)


def _refuse_ambiguous(rows: Sequence[Sequence[Any]]) -> None:
    """Refuse lists that look like multi-hot rows: [0, 1, 0] is the second class of three, or 0 and 1."""
    short = {len(row) for row in rows}
    repeated = any(len(set(map(str, row))) < len(row) for row in rows)
    if len(short) == 1 and short.pop() > 1 and repeated and set().union(*map(set, rows)) <= {0, 1}:
        raise ValueError(
            f"labels such as {list(rows[0])} can be multi-hot rows or lists of the classes 0 and 1; give "
            "np.array(labels) for multi-hot, or names"
        )


def _columns(values: np.ndarray, names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Multi-hot rows."""
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(
            f"labels of shape {values.shape} are neither class numbers (N,) nor multi-hot (N, C) of two "
            "classes or more; use labels[:, 0] where one column holds the classes"
        )
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        others = values[~np.isin(values, (0, 1))] if values.dtype.kind in "biuf" else values.reshape(-1)
        raise ValueError(
            f"multi-hot labels are 0 and 1, got {others.tolist()[0]!r}; class numbers are of shape (N,)"
        )
    if names is not None and len(names) != values.shape[1]:
        raise ValueError(f"{len(names)} label names for {values.shape[1]} columns")
    named = tuple(map(str, range(values.shape[1]) if names is None else names))
    return torch.from_numpy(values.astype(np.float32)), named


def _named(rows: Sequence[Sequence[Any]], names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Lists of class numbers or names."""
    lists = [[_one(label, item) for label in row] for item, row in enumerate(rows)]
    labels = {label for row in lists for label in row}
    if not labels:  # for objectives that need none
        return torch.zeros(len(lists), 0), ()
    if len({type(label) for label in labels}) > 1:
        example = " and ".join(
            repr(next(each for each in labels if isinstance(each, kind))) for kind in (int, str)
        )
        raise ValueError(f"labels are numbers and names at once, such as {example}; give one kind")
    ordered: list[Any] = sorted(labels)
    if names is not None:
        ordered = list(range(len(names))) if isinstance(ordered[0], int) else list(names)
        if unknown := sorted(labels - set(ordered)):
            hint = nearest(str(unknown[0]), names)
            raise ValueError(f"label {unknown[0]!r} is not among the {len(names)} label names{hint}")
    column = {label: number for number, label in enumerate(ordered)}
    hot = torch.zeros(len(lists), len(ordered))
    for item, row in enumerate(lists):
        hot[item, [column[label] for label in row]] = 1
    return hot, tuple(map(str, ordered if names is None else names))


def _one(label: Any, item: int) -> int | str:
    """A class number or name; 1 and 1.0 are one class."""
    if isinstance(label, np.generic) or (isinstance(label, np.ndarray | Tensor) and label.ndim == 0):
        label = label.item()
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, int | float) and float(label).is_integer() and label >= 0:
        return int(label)
    raise ValueError(
        f"item {item} has the label {label!r}; labels are class numbers from 0, or names, and [] for none"
    )
