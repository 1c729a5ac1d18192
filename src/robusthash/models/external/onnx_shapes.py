"""Operators of ONNX that move numbers without changing them, in torch; see ``onnx_operators``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Sequence[Any]  # tensors, None where one is left out
Attributes = Mapping[str, Any]
Operator = Callable[[Inputs, Attributes], Tensor | Sequence[Tensor]]


class Unsupported(ValueError):
    """An operator, or a way of using one, that has no form in torch here."""


def numbers(values: Any) -> list[int]:
    """A shape or axes, as a tensor or an attribute."""
    return [int(each) for each in values]


def option(x: Inputs, at: int, attributes: Attributes, name: str, default: Any = None) -> Any:
    """A setting that is an attribute in older opsets and an input in newer ones."""
    if len(x) > at and x[at] is not None:
        return x[at]
    return attributes.get(name, default)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float) -> Tensor:
    """Padded along the last axes."""
    flat = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _reshape(x: Inputs, a: Attributes) -> Tensor:
    shape = numbers(x[1])
    if not a.get("allowzero", 0):
        shape = [x[0].shape[at] if size == 0 else size for at, size in enumerate(shape)]
    return x[0].reshape(shape)


def _flatten(x: Inputs, a: Attributes) -> Tensor:
    axis = a.get("axis", 1)
    axis += x[0].ndim if axis < 0 else 0
    return x[0].reshape(math.prod(x[0].shape[:axis]), -1)


def _transpose(x: Inputs, a: Attributes) -> Tensor:
    return x[0].permute(a.get("perm", list(range(x[0].ndim))[::-1]))


def _split(x: Inputs, a: Attributes) -> Sequence[Tensor]:
    axis, sizes = a.get("axis", 0), option(x, 1, a, "split")
    if sizes is None:
        return x[0].split(-(-x[0].shape[axis] // a.get("num_outputs", a["outputs"])), axis)
    return x[0].split(numbers(sizes), axis)


def _slice(x: Inputs, a: Attributes) -> Tensor:
    starts, ends = numbers(option(x, 1, a, "starts")), numbers(option(x, 2, a, "ends"))
    axes, steps = option(x, 3, a, "axes"), x[4] if len(x) > 4 else None
    which = range(len(starts)) if axes is None else numbers(axes)
    strides = [1] * len(starts) if steps is None else numbers(steps)
    for axis, start, end, step in zip(which, starts, ends, strides, strict=True):
        places = range(*slice(start, end, step).indices(x[0].shape[axis]))
        positions = torch.tensor(places, dtype=torch.int64, device=x[0].device)
        x = [x[0].index_select(axis, positions)]
    return x[0]


def _gather(x: Inputs, a: Attributes) -> Tensor:
    values, places = x[0], x[1].long()
    axis = a.get("axis", 0) % values.ndim
    places = torch.where(places < 0, places + values.shape[axis], places)
    shape = (*values.shape[:axis], *places.shape, *values.shape[axis + 1 :])
    return values.index_select(axis, places.flatten()).reshape(shape)


def _gather_elements(x: Inputs, a: Attributes) -> Tensor:
    axis = a.get("axis", 0)
    places = torch.where(x[1] < 0, x[1] + x[0].shape[axis], x[1])
    return x[0].gather(axis, places)


def _scatter_nd(x: Inputs, a: Attributes) -> Tensor:
    if a.get("reduction", "none") != "none":
        raise Unsupported("ScatterND with a reduction")
    return x[0].index_put(tuple(x[1].unbind(-1)), x[2])


def _squeeze(x: Inputs, a: Attributes) -> Tensor:
    axes = option(x, 1, a, "axes")
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(numbers(axes)))


def _unsqueeze(x: Inputs, a: Attributes) -> Tensor:
    axes = numbers(option(x, 1, a, "axes"))
    rank, values = x[0].ndim + len(axes), x[0]
    for axis in sorted(axis % rank for axis in axes):
        values = values.unsqueeze(axis)
    return values


def _pad(x: Inputs, a: Attributes) -> Tensor:
    pads, mode = numbers(option(x, 1, a, "pads")), a.get("mode", "constant")
    value = option(x, 2, a, "value", 0.0)
    axes = numbers(x[3]) if len(x) > 3 and x[3] is not None else list(range(x[0].ndim))
    before, after = [0] * x[0].ndim, [0] * x[0].ndim
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    if mode == "constant":
        return padded(x[0], before, after, float(value))
    flat = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x[0], flat, mode="replicate" if mode == "edge" else str(mode))


def _resize(x: Inputs, a: Attributes) -> Tensor:
    image, mode = x[0], a.get("mode", "nearest")
    place, rounding = a.get("coordinate_transformation_mode", "half_pixel"), a.get("nearest_mode", "")
    scales = x[2] if len(x) > 2 and x[2] is not None and len(x[2]) else None
    if scales is None:
        shape = numbers(x[3])
    else:
        shape = [math.floor(n * float(s)) for n, s in zip(image.shape, scales, strict=True)]
    kernels = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}
    if len(shape) != image.ndim or list(image.shape[:2]) != shape[:2]:
        raise Unsupported("Resize of channels")
    if mode == "nearest" and (place, rounding) == ("asymmetric", "floor"):
        return F.interpolate(image, shape[2:], mode="nearest")
    kernel = kernels.get(mode, {}).get(image.ndim - 2)
    if kernel is None or place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise Unsupported(f"Resize ({mode}, {place})")
    smooth = bool(a.get("antialias", 0))
    return F.interpolate(image, shape[2:], mode=kernel, align_corners=place[0] == "a", antialias=smooth)


def _depth_to_space(x: Inputs, a: Attributes) -> Tensor:
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x[0], a["blocksize"])
    batch, channels, height, width = x[0].shape
    side = a["blocksize"]
    parts = x[0].reshape(batch, side, side, channels // side**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * side, width * side)


def _constant_of_shape(x: Inputs, a: Attributes) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(numbers(x[0])).clone()


def _shape(x: Inputs, a: Attributes) -> Tensor:
    return torch.tensor(x[0].shape[a.get("start", 0) : a.get("end", None)], dtype=torch.int64)


def _space_to_depth(image: Tensor, side: int) -> Tensor:
    batch, channels, height, width = image.shape
    parts = image.reshape(batch, channels, height // side, side, width // side, side)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // side, width // side)


SHAPES: dict[str, Operator] = {
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "SpaceToDepth": lambda x, a: _space_to_depth(x[0], a["blocksize"]),
}
