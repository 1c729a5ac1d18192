"""Labels in the forms that programs have: class numbers and names, multi-hot rows, lists; none is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.core.registry import nearest

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
        raise ValueError(f"{len(labels)} labels for {count} images; each image has its own")
    if isinstance(labels, np.ndarray | Tensor) and labels.ndim != 1:
        return _columns(np.asarray(labels), names)
    rows = list(labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels)
    if all(isinstance(row, np.ndarray | Tensor) and row.ndim == 1 for row in rows):
        widths = sorted({len(row) for row in rows})
        if len(widths) > 1:
            raise ValueError(
                f"multi-hot labels of {widths[0]} and of {widths[-1]} columns; give lists instead"
            )
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
        some = values[~np.isin(values, (0, 1))][0] if values.dtype.kind in "biuf" else values.flat[0]
        raise ValueError(f"multi-hot labels are 0 and 1, got {some}; class numbers are of shape (N,)")
    if names is not None and len(names) != values.shape[1]:
        raise ValueError(f"{len(names)} label names for {values.shape[1]} columns")
    named = tuple(map(str, range(values.shape[1]) if names is None else names))
    return torch.from_numpy(values.astype(np.float32)), named


def _named(rows: Sequence[Sequence[Any]], names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Lists of class numbers or names."""
    lists = [[_one(label, item) for label in row] for item, row in enumerate(rows)]
    labels = {label for row in lists for label in row}
    if not labels:
        raise ValueError("no item has a label")
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
