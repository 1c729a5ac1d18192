"""Operators of ONNX in torch, differentiable; a table by name.

Each takes the inputs of a node (None where one is left out), and its attributes with ``opset`` and
``outputs``, their number. Integer tensors, of which shapes are computed, go the same way as images.

Source: the ONNX operator specification, opsets 7 to 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robusthash.models.external.onnx_shapes import (
    SHAPES,
    Attributes,
    Inputs,
    Operator,
    Unsupported,
    numbers,
    option,
    padded,
)


def _dtype(number: int) -> torch.dtype:
    """The dtype of an ONNX number; FLOAT is torch's default, so that models can be computed in double."""
    integers = {2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool}
    floats = {1: torch.get_default_dtype(), 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
    known = {**integers, **floats}
    if number not in known:
        raise Unsupported(f"Cast to the ONNX type {number}")
    return known[number]


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


def _conv(x: Inputs, a: Attributes) -> Tensor:
    image, weight = x[0], x[1]
    dims = weight.ndim - 2
    before, after = _padding(image, weight.shape[2:], a, dims)
    if before != after:
        image, before = padded(image, before, after, 0.0), [0] * dims
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
        return pool(padded(image, before, after, -torch.inf), kernel, strides, 0, dilations, up)
    if set(dilations) != {1}:
        raise Unsupported("AveragePool with dilation")
    mean: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    if before == after:
        return mean(image, kernel, strides, before, up, bool(a.get("count_include_pad", 0)))
    sums = mean(padded(image, before, after, 0.0), kernel, strides, 0, up)
    if a.get("count_include_pad", 0):
        return sums
    return sums / mean(padded(torch.ones_like(image), before, after, 0.0), kernel, strides, 0, up)


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
        axes = option(x, 1, a, "axes")
        if (axes is None or len(axes) == 0) and a.get("noop_with_empty_axes", 0):
            return x[0]
        which = list(range(x[0].ndim)) if axes is None or len(axes) == 0 else numbers(axes)
        return function(x[0], which, bool(a.get("keepdims", 1)))

    return reduce


def _arg(x: Inputs, a: Attributes, function: Callable[..., Tensor]) -> Tensor:
    return function(x[0], dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))


# ------------------------------------------------------------------------------------------------ numbers


def _matmul_and_add(x: Inputs, a: Attributes) -> Tensor:
    left = x[0].T if a.get("transA", 0) else x[0]
    right = x[1].T if a.get("transB", 0) else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    return product if _bias(x) is None else product + a.get("beta", 1.0) * x[2]


def _div(x: Inputs, a: Attributes) -> Tensor:
    return x[0] / x[1] if x[0].is_floating_point() else torch.div(x[0], x[1], rounding_mode="trunc")


def _clip(x: Inputs, a: Attributes) -> Tensor:
    low, high = option(x, 1, a, "min"), option(x, 2, a, "max")
    values = x[0] if low is None else torch.maximum(x[0], torch.as_tensor(low, dtype=x[0].dtype))
    return values if high is None else torch.minimum(values, torch.as_tensor(high, dtype=x[0].dtype))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def fold(x: Inputs, a: Attributes) -> Tensor:
        value = x[0]
        for other in x[1:]:
            value = function(value, other)
        return value

    return fold


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
    "Tile": lambda x, times: x.repeat(numbers(times)),
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, numbers(shape))),
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
    **SHAPES,
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
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumsum,
    "Div": _div,
    "Einsum": lambda x, a: torch.einsum(a["equation"], *x),
    "Elu": lambda x, a: F.elu(x[0], a.get("alpha", 1.0)),
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
    "Mean": lambda x, a: torch.stack(torch.broadcast_tensors(*x)).mean(0),
    "Min": _folded(torch.minimum),
    "Mod": lambda x, a: torch.fmod(x[0], x[1]) if a.get("fmod", 0) else torch.remainder(x[0], x[1]),
    "Range": lambda x, a: torch.arange(x[0].item(), x[1].item(), x[2].item(), dtype=x[0].dtype),
    "Selu": lambda x, a: F.selu(x[0]),
    "Size": lambda x, a: torch.tensor(x[0].numel()),
    "Softmax": lambda x, a: _softmax(x, a, F.softmax),
    "Sum": _folded(torch.add),
    "Trilu": lambda x, a: (torch.triu if a.get("upper", 1) else torch.tril)(
        x[0], int(x[1]) if len(x) > 1 else 0
    ),
    "Where": lambda x, a: torch.where(x[0], x[1], x[2]),
}
