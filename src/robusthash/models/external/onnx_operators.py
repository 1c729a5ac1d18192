"""Operators of ONNX in torch, differentiable; a table by name.

Each takes the inputs of a node (None where one is left out), and its attributes with ``opset`` and
``outputs``, their number. Integer tensors, of which shapes are computed, go the same way as images.

Source: the ONNX operator specification, opsets 7 to 21.
"""

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


def _dtype(number: int) -> torch.dtype:
    """The dtype of an ONNX number; FLOAT is torch's default, so that models can be computed in double."""
    integers = {2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool}
    floats = {1: torch.get_default_dtype(), 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
    known = {**integers, **floats}
    if number not in known:
        raise Unsupported(f"Cast to the ONNX type {number}")
    return known[number]


def _numbers(values: Any) -> list[int]:
    """A shape or axes, as a tensor or an attribute."""
    return [int(each) for each in values]


def _option(x: Inputs, at: int, attributes: Attributes, name: str, default: Any = None) -> Any:
    """What older opsets give as an attribute and newer ones as an input."""
    if len(x) > at and x[at] is not None:
        return x[at]
    return attributes.get(name, default)


# ------------------------------------------------------------------------------------------- convolutions


def _padding(x: Tensor, kernel: Sequence[int], a: Attributes, dims: int) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis."""
    strides, dilations = a.get("strides", [1] * dims), a.get("dilations", [1] * dims)
    way = a.get("auto_pad", "NOTSET")
    if way in ("SAME_UPPER", "SAME_LOWER"):
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        steps = zip(x.shape[2:], strides, reach, strict=True)
        whole = [max(0, (math.ceil(size / s) - 1) * s + r - size) for size, s, r in steps]
        small, large = [each // 2 for each in whole], [each - each // 2 for each in whole]
        return (small, large) if way == "SAME_UPPER" else (large, small)
    pads = list(a.get("pads", [0] * 2 * dims)) if way == "NOTSET" else [0] * 2 * dims
    return pads[:dims], pads[dims:]


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float) -> Tensor:
    """Padded along the last axes."""
    flat = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(x: Inputs, a: Attributes) -> Tensor:
    image, weight = x[0], x[1]
    dims = weight.ndim - 2
    before, after = _padding(image, weight.shape[2:], a, dims)
    if before != after:
        image, before = _padded(image, before, after, 0.0), [0] * dims
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    strides, dilations = a.get("strides", [1] * dims), a.get("dilations", [1] * dims)
    return function(image, weight, _bias(x), strides, before, dilations, a.get("group", 1))


def _conv_transpose(x: Inputs, a: Attributes) -> Tensor:
    dims = x[1].ndim - 2
    before, after = _padding(x[0], x[1].shape[2:], a, dims)
    if before != after or a.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in a:
        raise Unsupported("ConvTranspose with uneven padding")
    function: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    strides, dilations = a.get("strides", [1] * dims), a.get("dilations", [1] * dims)
    more = a.get("output_padding", [0] * dims)
    return function(x[0], x[1], _bias(x), strides, before, more, a.get("group", 1), dilations)


def _bias(x: Inputs) -> Tensor | None:
    return x[2] if len(x) > 2 else None


def _pool(x: Inputs, a: Attributes, largest: bool) -> Tensor:
    if a["outputs"] > 1:
        raise Unsupported("MaxPool with indices")
    image, kernel = x[0], a["kernel_shape"]
    dims = len(kernel)
    before, after = _padding(image, kernel, a, dims)
    strides, up = a.get("strides", [1] * dims), bool(a.get("ceil_mode", 0))
    dilations = a.get("dilations", [1] * dims)
    if largest:
        pool: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
        return pool(_padded(image, before, after, -torch.inf), kernel, strides, 0, dilations, up)
    if set(dilations) != {1}:
        raise Unsupported("AveragePool with dilation")
    mean: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    if before == after:
        return mean(image, kernel, strides, before, up, bool(a.get("count_include_pad", 0)))
    sums = mean(_padded(image, before, after, 0.0), kernel, strides, 0, up)
    if a.get("count_include_pad", 0):
        return sums
    return sums / mean(_padded(torch.ones_like(image), before, after, 0.0), kernel, strides, 0, up)


def _spatial(image: Tensor) -> list[int]:
    return list(range(2, image.ndim))


# ------------------------------------------------------------------------------------------ normalisations


def _batch_norm(x: Inputs, a: Attributes) -> Tensor:
    image, scale, bias, mean, variance = x
    return F.batch_norm(image, mean, variance, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


def _layer_norm(x: Inputs, a: Attributes) -> Tensor:
    shape = x[0].shape[a.get("axis", -1) :]
    return F.layer_norm(x[0], shape, x[1], _bias(x), a.get("epsilon", 1e-5))


def _group_norm(x: Inputs, a: Attributes) -> Tensor:
    channels, groups = x[0].shape[1], a["num_groups"]
    scale, bias = (each.repeat_interleave(channels // len(each)) for each in x[1:3])
    return F.group_norm(x[0], groups, scale, bias, a.get("epsilon", 1e-5))


def _lp_norm(x: Inputs, a: Attributes) -> Tensor:
    return x[0] / x[0].norm(a.get("p", 2), a.get("axis", -1), keepdim=True)


def _softmax(x: Inputs, a: Attributes, function: Callable[..., Tensor]) -> Tensor:
    if a["opset"] >= 13:
        return function(x[0], dim=a.get("axis", -1))
    return function(x[0].flatten(a.get("axis", 1)), dim=-1).reshape(x[0].shape)


# --------------------------------------------------------------------------------------------- reductions


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def reduce(x: Inputs, a: Attributes) -> Tensor:
        axes = _option(x, 1, a, "axes")
        if (axes is None or len(axes) == 0) and a.get("noop_with_empty_axes", 0):
            return x[0]
        which = list(range(x[0].ndim)) if axes is None or len(axes) == 0 else _numbers(axes)
        return function(x[0], which, bool(a.get("keepdims", 1)))

    return reduce


def _arg(x: Inputs, a: Attributes, function: Callable[..., Tensor]) -> Tensor:
    return function(x[0], dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))


# -------------------------------------------------------------------------------------------------- shapes


def _reshape(x: Inputs, a: Attributes) -> Tensor:
    shape = _numbers(x[1])
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
    axis, sizes = a.get("axis", 0), _option(x, 1, a, "split")
    if sizes is None:
        return x[0].split(-(-x[0].shape[axis] // a.get("num_outputs", a["outputs"])), axis)
    return x[0].split(_numbers(sizes), axis)


def _slice(x: Inputs, a: Attributes) -> Tensor:
    starts, ends = _numbers(_option(x, 1, a, "starts")), _numbers(_option(x, 2, a, "ends"))
    axes, steps = _option(x, 3, a, "axes"), x[4] if len(x) > 4 else None
    which = range(len(starts)) if axes is None else _numbers(axes)
    strides = [1] * len(starts) if steps is None else _numbers(steps)
    for axis, start, end, step in zip(which, starts, ends, strides, strict=True):
        places = range(*slice(start, end, step).indices(x[0].shape[axis]))
        chosen = torch.tensor(places, dtype=torch.int64, device=x[0].device)
        x = [x[0].index_select(axis, chosen)]
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
    axes = _option(x, 1, a, "axes")
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(_numbers(axes)))


def _unsqueeze(x: Inputs, a: Attributes) -> Tensor:
    axes = _numbers(_option(x, 1, a, "axes"))
    rank, values = x[0].ndim + len(axes), x[0]
    for axis in sorted(axis % rank for axis in axes):
        values = values.unsqueeze(axis)
    return values


def _pad(x: Inputs, a: Attributes) -> Tensor:
    pads, mode = _numbers(_option(x, 1, a, "pads")), a.get("mode", "constant")
    value = _option(x, 2, a, "value", 0.0)
    axes = _numbers(x[3]) if len(x) > 3 and x[3] is not None else list(range(x[0].ndim))
    before, after = [0] * x[0].ndim, [0] * x[0].ndim
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    if mode == "constant":
        return _padded(x[0], before, after, float(value))
    flat = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x[0], flat, mode={"edge": "replicate"}.get(mode, mode))


def _resize(x: Inputs, a: Attributes) -> Tensor:
    image, mode = x[0], a.get("mode", "nearest")
    place, rounding = a.get("coordinate_transformation_mode", "half_pixel"), a.get("nearest_mode", "")
    scales = x[2] if len(x) > 2 and x[2] is not None and len(x[2]) else None
    if scales is None:
        shape = _numbers(x[3])
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


# ------------------------------------------------------------------------------------------------ numbers


def _matmul_and_add(x: Inputs, a: Attributes) -> Tensor:
    left = x[0].T if a.get("transA", 0) else x[0]
    right = x[1].T if a.get("transB", 0) else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    return product if _bias(x) is None else product + a.get("beta", 1.0) * x[2]


def _div(x: Inputs, a: Attributes) -> Tensor:
    return x[0] / x[1] if x[0].is_floating_point() else torch.div(x[0], x[1], rounding_mode="trunc")


def _clip(x: Inputs, a: Attributes) -> Tensor:
    low, high = _option(x, 1, a, "min"), _option(x, 2, a, "max")
    values = x[0] if low is None else torch.maximum(x[0], torch.as_tensor(low, dtype=x[0].dtype))
    return values if high is None else torch.minimum(values, torch.as_tensor(high, dtype=x[0].dtype))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def fold(x: Inputs, a: Attributes) -> Tensor:
        value = x[0]
        for other in x[1:]:
            value = function(value, other)
        return value

    return fold


def _constant_of_shape(x: Inputs, a: Attributes) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return value.reshape(()).expand(_numbers(x[0])).clone()


def _shape(x: Inputs, a: Attributes) -> Tensor:
    return torch.tensor(x[0].shape[a.get("start", 0) : a.get("end", None)], dtype=torch.int64)


def _cumsum(x: Inputs, a: Attributes) -> Tensor:
    if a.get("exclusive", 0) or a.get("reverse", 0):
        raise Unsupported("CumSum backwards")
    return x[0].cumsum(int(x[1]))


def _gelu(x: Inputs, a: Attributes) -> Tensor:
    return F.gelu(x[0], approximate=a.get("approximate", "none"))


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x, a: function(x[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda x, a: function(x[0], x[1])


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "Identity": lambda x: x, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt,
    "Tanh": torch.tanh, "Dropout": lambda x: x,
    "GlobalAveragePool": lambda x: x.mean(_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(_spatial(x), keepdim=True),
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "MatMul": torch.matmul, "Mul": torch.mul,
    "Or": torch.logical_or, "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
    "Pow": torch.pow, "Sub": torch.sub, "Add": torch.add,
    "CastLike": lambda x, like: x.to(like.dtype),
    "Tile": lambda x, times: x.repeat(_numbers(times)),
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, _numbers(shape))),
}  # fmt: skip
_REDUCED: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}

OPERATORS: dict[str, Operator] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{name: _reduced(function) for name, function in _REDUCED.items()},
    "ArgMax": lambda x, a: _arg(x, a, torch.argmax),
    "ArgMin": lambda x, a: _arg(x, a, torch.argmin),
    "AveragePool": lambda x, a: _pool(x, a, largest=False),
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, a: x[0].to(_dtype(a["to"])),
    "Clip": _clip,
    "Concat": lambda x, a: torch.cat(list(x), a["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Einsum": lambda x, a: torch.einsum(a["equation"], *x),
    "Elu": lambda x, a: F.elu(x[0], a.get("alpha", 1.0)),
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _matmul_and_add,
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda x, a: (a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5)).clamp(0, 1),
    "InstanceNormalization": lambda x, a: F.instance_norm(
        x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5)
    ),
    "LRN": lambda x, a: F.local_response_norm(
        x[0], a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0)
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "LogSoftmax": lambda x, a: _softmax(x, a, F.log_softmax),
    "LpNormalization": _lp_norm,
    "Max": _folded(torch.maximum),
    "MaxPool": lambda x, a: _pool(x, a, largest=True),
    "Mean": lambda x, a: _folded(torch.add)(x, a) / len(x),  # type: ignore[operator]
    "Min": _folded(torch.minimum),
    "Mod": lambda x, a: torch.fmod(x[0], x[1]) if a.get("fmod", 0) else torch.remainder(x[0], x[1]),
    "Pad": _pad,
    "Range": lambda x, a: torch.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype),
    "Reshape": _reshape,
    "Resize": _resize,
    "ScatterND": _scatter_nd,
    "Selu": lambda x, a: F.selu(x[0]),
    "Shape": _shape,
    "Size": lambda x, a: torch.tensor(x[0].numel()),
    "Slice": _slice,
    "Softmax": lambda x, a: _softmax(x, a, F.softmax),
    "SpaceToDepth": lambda x, a: _space_to_depth(x[0], a["blocksize"]),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _folded(torch.add),
    "Transpose": _transpose,
    "Trilu": lambda x, a: (torch.triu if a.get("upper", 1) else torch.tril)(
        x[0], int(x[1]) if len(x) > 1 else 0
    ),
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, a: torch.where(x[0], x[1], x[2]),
}


def _space_to_depth(image: Tensor, side: int) -> Tensor:
    batch, channels, height, width = image.shape
    parts = image.reshape(batch, channels, height // side, side, width // side, side)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // side, width // side)
