"""Scoring codes of any other program: two files in, the values of a protocol out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import pack
from robusthash.core.labels import has_relevant
from robusthash.core.limited_files import read_npz
from robusthash.core.types import Codes
from robusthash.metrics.protocol import Protocol, load_protocol, measure
from robusthash.metrics.results import EvalResult, Setting
from robusthash.metrics.statistics import intervals

_SAVE = "save with np.savez(path, codes=..., labels=...)"
_BINARISE = "binarise before saving, e.g. codes = np.where(outputs >= 0, 1, -1)"
_BYTES = "np.ascontiguousarray(codes.reshape(len(codes), -1)).view(np.uint8)"


@dataclass(frozen=True, eq=False)
class CodeFile:
    """Codes and labels of one side, as read from a file or made in memory."""

    name: str  # for messages and records
    codes: Codes
    labels: Tensor  # (N,) int64 classes or (N, C) uint8 multi-hot


def read_codes(path: str | Path) -> CodeFile:
    """Read codes and labels from an ``.npz`` file, without executing anything in it (``allow_pickle=False``).

    Keys:
        codes: (N, K) in -1/+1, 0/1 or bool, any number type; or (N, ceil(K / 8)) uint8, packed with the first
            bit highest, as ``np.packbits`` does, together with ``bits``.
        labels: (N,) integer classes, or (N, C) multi-hot.
        bits: optional, K.
        ids: optional, (N,) unique integers; positions by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, the key, what is wrong and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {_SAVE}")
    arrays = _read_arrays(path)
    for key in ("codes", "labels"):
        if key not in arrays:
            keys = ", ".join(sorted(arrays)) or "none"
            raise ValueError(f"{path}: the key {key!r} is missing (found: {keys}); {_SAVE}")
    packed, bits = _codes(path, arrays["codes"], arrays.get("bits"))
    labels = _labels(path, arrays["labels"])
    if len(labels) != len(packed):
        raise ValueError(
            f"{path}: 'labels' has {len(labels)} rows and 'codes' {len(packed)}; they must match, in order"
        )
    ids = _ids(path, arrays.get("ids"), len(packed))
    digest = hashlib.sha256(packed.numpy().tobytes() + str(bits).encode()).hexdigest()[:16]
    return CodeFile(path.name, Codes(packed, bits, ids, origin=digest), labels)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as .npz of plain arrays ({error}); {_SAVE}, "
            "numbers only, no object arrays"
        ) from error


def _numbers(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    """``array``, checked to be finite numbers."""
    if array.dtype.kind not in "biuf":
        number = (
            "; number the classes by one list for both files: np.searchsorted(names, labels), names sorted"
        )
        raise ValueError(
            f"{path}: {key!r} has the type {array.dtype}; it must hold integers, floats or bools"
            + number * (key == "labels" and array.dtype.kind == "U")
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"{path}: {key!r} holds {bad} NaN or infinite values; the program that made it diverged"
        )
    return array


def _codes(path: Path, array: np.ndarray, bits_array: np.ndarray | None) -> tuple[Tensor, int]:
    """Packed codes and their length."""
    array = _numbers(path, "codes", array)
    bits = None if bits_array is None else _bits(path, bits_array)
    _refuse_words(path, array, bits)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"{path}: 'codes' must be (N, K) with N and K above 0, got shape {array.shape}")
    values, width = set(np.unique(array).tolist()), array.shape[1]
    if array.dtype == np.uint8 and (values - {0, 1} or (bits is not None and bits != width)):
        return _packed_codes(path, array, bits)
    if not (values <= {0, 1} or values <= {-1, 1}):
        other = sorted(values - {-1, 0, 1})
        example = f"such as {other[0]:g}" if other else "-1 and 0 together"
        raise ValueError(
            f"{path}: 'codes' must be all -1/+1 or all 0/1 (or bool), it holds values {example}; {_BINARISE}"
        )
    if bits is not None and bits != width:
        raise ValueError(f"{path}: 'bits' is {bits} but 'codes' has {width} columns; correct or drop 'bits'")
    return pack(torch.from_numpy((array > 0).astype(np.int8))), width


def _refuse_words(path: Path, array: np.ndarray, bits: int | None) -> None:
    """Refuse codes packed into words or into bytes of another type, with the line that makes bytes of them.

    Where bits lie in a word, and a top bit that is flipped in all codes, change no distance as long as both
    files are made alike.
    """
    if array.dtype.kind not in "iu" or array.dtype == np.uint8 or array.size == 0 or array.ndim not in (1, 2):
        return
    columns, each = array.size // len(array), 8 * array.itemsize
    if array.ndim == 2 and bits in (None, columns) and np.isin(array, (-1, 0, 1)).all():
        return
    outputs = f"; if they are rounded outputs, {_BINARISE}" if bits in (None, columns) else ""
    if array.dtype == np.int8:
        held = f"signed bytes, {columns} a row"
        save = f"codes.view(np.uint8) ^ 128 with bits={8 * columns if outputs else bits}, in both files"
    elif bits not in (None, columns) and columns == -(-bits // 8) and 0 <= array.min() <= array.max() < 256:
        held, save = f"bytes as {array.dtype}", "codes.astype(np.uint8)"
    elif array.ndim == 1 or bits == columns * each or array.max() >= 256 or array.min() < -256:
        held, save = (
            f"words of {each} bits, {columns} a row",
            f"{_BYTES} with bits={columns * each}, in both files",
        )
    else:
        return
    raise ValueError(f"{path}: 'codes' holds {held}; if they are packed codes, save {save}{outputs}")


def _packed_codes(path: Path, array: np.ndarray, bits: int | None) -> tuple[Tensor, int]:
    width = array.shape[1]
    if bits is None:
        raise ValueError(
            f"{path}: 'codes' is uint8 with values beyond 0 and 1, so it looks packed, but how many bits it "
            f"holds is unknown; add the key 'bits', e.g. "
            f"np.savez(path, codes=..., labels=..., bits={8 * width})"
        )
    if width != (bits + 7) // 8:
        raise ValueError(
            f"{path}: 'codes' has {width} bytes a row, but {bits} bits are {(bits + 7) // 8} bytes packed; "
            "correct 'bits', or save the codes unpacked as -1/+1"
        )
    beyond = 8 * width - bits
    if beyond and (array[:, -1] & ((1 << beyond) - 1)).any():
        raise ValueError(
            f"{path}: 'codes' has bits set beyond the {bits} that 'bits' names; pack with the first bit "
            "highest and zeros at the end, as np.packbits does"
        )
    return torch.from_numpy(np.ascontiguousarray(array)), bits


def _bits(path: Path, array: np.ndarray) -> int:
    values = _numbers(path, "bits", array).ravel()
    if values.size != 1 or values[0] != int(values[0]) or values[0] < 1:
        raise ValueError(f"{path}: 'bits' must be one positive integer, got {array.tolist()}")
    return int(values[0])


def _labels(path: Path, array: np.ndarray) -> Tensor:
    array = _numbers(path, "labels", array)
    if array.ndim == 1:
        if array.dtype.kind == "f" and (array != np.floor(array)).any():
            raise ValueError(f"{path}: 'labels' of shape (N,) must be integer classes, it holds fractions")
        classes = array.astype(np.int64)
        if len(classes) and classes.min() < 0:
            raise ValueError(f"{path}: 'labels' holds the class {classes.min()}; classes are 0 or above")
        return torch.from_numpy(classes)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(
            f"{path}: 'labels' must be (N,) classes or (N, C) multi-hot, got shape {array.shape}"
        )
    if array.shape[1] == 1:
        raise ValueError(
            f"{path}: 'labels' of shape {array.shape} are classes in a column, or a single label that items "
            "have or lack; save classes as labels.ravel(), a single label as np.pad(labels, ((0, 0), (0, 1)))"
        )
    if not ((array == 0) | (array == 1)).all():
        signs = ((array == -1) | (array == 1)).all()
        remedy = "save (labels > 0)" if signs else "for classes save shape (N,)"
        raise ValueError(f"{path}: 'labels' of shape (N, C) must be 0 or 1 (multi-hot); {remedy}")
    return torch.from_numpy(array.astype(np.uint8))


def _ids(path: Path, array: np.ndarray | None, count: int) -> Tensor:
    if array is None:
        return torch.arange(count)
    array = _numbers(path, "ids", array)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: 'ids' must be {count} integers, got {array.dtype} of shape {array.shape}")
    if len(np.unique(array)) != count:
        raise ValueError(f"{path}: 'ids' holds duplicates; every item needs an id of its own")
    return torch.from_numpy(array.astype(np.int64))


def score(
    query: CodeFile, database: CodeFile, protocol: str | Mapping[str, Any] | Protocol = "house"
) -> EvalResult:
    """Score codes of any origin under a protocol, with 95 % bootstrap intervals over queries.

    That queries and database hold different items cannot be checked here: a query that is also in the
    database finds itself and flatters the result.

    Raises:
        ValueError: code lengths, label kinds or label widths that differ between the two files.
    """
    protocol = load_protocol(protocol)
    if query.codes.bits != database.codes.bits:
        raise ValueError(
            f"{query.name} has codes of {query.codes.bits} bits and {database.name} of "
            f"{database.codes.bits}; both sides must come from the same model"
        )
    query_labels, labels = _same_labels(query, database)
    queries, left_out = query.codes, 0
    if protocol.empty == "skip":
        rows = torch.nonzero(has_relevant(query_labels, labels)).flatten()
        if len(rows) == 0:
            raise ValueError(f"no query of {query.name} has a relevant item in {database.name}")
        queries = Codes(queries.packed[rows], queries.bits, queries.ids[rows], queries.origin)
        left_out, query_labels = len(query_labels) - len(rows), query_labels[rows]
    measured = measure(protocol, queries, query_labels, database.codes, labels)
    digests = {
        "model": _digest(query.codes.packed),
        "codes": _digest(database.codes.packed),
        "queries": _digest(queries.ids, query_labels),
        "database": _digest(database.codes.ids, labels),
    }
    setting = Setting(
        model="codes from files",
        database=database.name,
        queries=query.name,
        protocol=protocol.settings(),
        direction="",
        bits=query.codes.bits,
        digests=digests,
    )
    result = EvalResult(setting=setting, interval=intervals(measured.per_query), **vars(measured))
    return replace(result, empty=measured.empty + left_out)


def _same_labels(query: CodeFile, database: CodeFile) -> tuple[Tensor, Tensor]:
    """(Q, C) and (N, C) multi-hot of the two files."""
    if query.labels.ndim != database.labels.ndim:
        forms = {1: "integer classes (N,)", 2: "multi-hot labels (N, C)"}
        raise ValueError(
            f"{query.name} has {forms[query.labels.ndim]} and {database.name} {forms[database.labels.ndim]}; "
            "save both in the same form"
        )
    if query.labels.ndim == 2:
        if query.labels.shape[1] != database.labels.shape[1]:
            raise ValueError(
                f"{query.name} has {query.labels.shape[1]} label columns and {database.name} "
                f"{database.labels.shape[1]}; both must list the same labels in the same order"
            )
        return query.labels, database.labels
    _, dense = torch.unique(torch.cat([query.labels, database.labels]), return_inverse=True)
    hot = torch.nn.functional.one_hot(dense).to(torch.uint8)
    return hot[: len(query.labels)], hot[len(query.labels) :]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
