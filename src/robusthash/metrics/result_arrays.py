"""Arrays of a results file: a sidecar named by its content, and values in 16 bits each."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robusthash.core.atomic_files import write_aside
from robusthash.core.limited_files import regular


def _sidecar(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.stem}-{digest[:16]}.npz")


def write_with_arrays(path: Path, text: str, arrays: bytes, digest: str) -> None:
    """Write a JSON file that names the ``digest`` of its arrays, and these next to it as NAME-DIGEST.npz.

    The arrays come first and older ones go last: whenever it ends, the JSON finds those that it names.
    """
    sidecar, replaced = _sidecar(path, digest), path.is_file()
    with write_aside(sidecar) as aside:
        aside.write_bytes(arrays)
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    own = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}\.npz")
    older = [other for other in path.parent.iterdir() if own.fullmatch(other.name) and other != sidecar]
    for other in [*older, *([path.with_suffix(".npz")] if replaced else ())]:  # the last of earlier versions
        other.unlink(missing_ok=True)


def read_with_arrays(
    path: Path, document_of: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bytes]:
    """The document of a results file, and the content of the sidecar that it names.

    Raises:
        FileNotFoundError: the sidecar is missing.
        ValueError: the document names none, or its content is another.
    """

    for _ in range(3):  # a writer may replace both between the two readings
        document = document_of(path)
        digest = document.get("sidecar")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{path} is damaged: it names no sidecar")
        for sidecar in (_sidecar(path, digest), path.with_suffix(".npz")):
            with contextlib.suppress(FileNotFoundError):
                content = regular(sidecar).read_bytes()
                if hashlib.sha256(content).hexdigest() == digest:
                    return document, content
                raise ValueError(f"{sidecar} does not belong to {path.name}: its content is another")
    missing = _sidecar(path, str(digest)).name
    raise FileNotFoundError(f"{path} needs its per-query values in {missing}, which is missing")


_STEPS = 65_534  # of the largest value; the last of the 16 bits' numbers stands for NaN
_NAN = _STEPS + 1


def headline_fault(values: Mapping[str, float], per_query: Mapping[str, np.ndarray], names: list[str]) -> str:
    """The first of ``names`` whose value is not the mean over its queries, in words; "" of none.

    Packed values move a mean by half a step at most; a query without a value counts as 0, or not at all.
    """
    for name in names:
        if name not in values or not np.size(per_query.get(name, ())):
            continue
        column = np.asarray(per_query[name], dtype=np.float64)
        whole = float(np.nan_to_num(column).mean())
        means = [whole, whole * column.size / max(1, int((~np.isnan(column)).sum()))]
        step = max(1.0, float(np.nan_to_num(column).max())) / _STEPS
        if not any(abs(mean - values[name]) <= step for mean in means):
            return f"{name} is {values[name]:.6g}, and its queries have the mean {whole:.6g}"
    return ""


def pack_values(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Named (Q,) arrays as one flat array of whole steps; ``unpack_values`` gives them back.

    A step is 1/65534 of the largest value that an array can hold: 1, or the next whole number above its own
    largest. Equal values stay equal, and 0 and 1 exact; any other moves by half a step at most.

    Raises:
        ValueError: a negative or infinite value.
    """
    flat, tops = [], []
    for name, values in arrays.items():
        finite = values[~np.isnan(values)]
        if np.isinf(finite).any() or (finite < 0).any():
            raise ValueError(f"{name} holds a negative or infinite value, which is not packed")
        tops.append(max(1.0, float(np.ceil(finite.max(initial=0.0)))))
        flat.append(np.where(np.isnan(values), _NAN, np.rint(np.nan_to_num(values) / tops[-1] * _STEPS)))
    return {
        "names": np.array(list(arrays), dtype=np.str_),
        "lengths": np.array([len(values) for values in flat], dtype=np.int64),
        "tops": np.array(tops),
        "steps": np.concatenate([*flat, np.zeros(0)]).astype("<u2"),
    }


def unpack_values(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of ``pack_values`` as float64."""
    parts = np.split(packed["steps"], np.cumsum(packed["lengths"]))[:-1]
    columns = zip(packed["names"], parts, packed["tops"], strict=True)
    return {str(name): np.where(part == _NAN, np.nan, part / _STEPS * top) for name, part, top in columns}
