"""Per-query values in 16 bits each, for results that are kept for good: a fifth of their size in a run
directory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_STEPS = 65_534  # of the largest value; the last of the 16 bits' numbers stands for NaN
_NAN = _STEPS + 1


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Named (Q,) arrays as one flat array of whole steps; ``unpack`` gives them back.

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


def unpack(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of ``pack`` as float64."""
    steps, made, start = packed["steps"], {}, 0
    for name, length, top in zip(packed["names"], packed["lengths"], packed["tops"], strict=True):
        part = steps[start : start + int(length)]
        made[str(name)] = np.where(part == _NAN, np.nan, part / _STEPS * top)
        start += int(length)
    return made
