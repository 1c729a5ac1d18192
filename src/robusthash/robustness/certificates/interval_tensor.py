"""Tensors known only to lie between two bounds, which pass through a net in place of its inputs.

Interval bound propagation (Gowal et al., "On the effectiveness of interval bound propagation for training
verifiably robust models", 2018: centre and radius of affine layers, both ends of monotone ones). Any code
that calls torch with such a tensor gets the bounds of the result; an operation without a rule is refused.
Each layer is bounded by itself, so bounds grow with depth: this is for small nets and budgets.
``auto_LiRPA``, which has tighter bounds, needs torch below 1.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.runtime import default_dtype
from robusthash.models.hasher import Hasher

_MONOTONE = (
    *("relu", "leaky_relu", "hardtanh", "relu6", "tanh", "sigmoid", "clamp", "clamp_min"),
    *("max_pool2d", "_max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sum"),
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "contiguous", "clone", "to", "float"),
    *("double", "detach", "cat"),
)
"""Functions that map smaller inputs to smaller outputs, elementwise: both ends pass through them. None works
in place: an interval is never changed, and a caller may look away from what is returned."""

_SHAPE = ("shape", "ndim", "dtype", "device", "requires_grad")


@dataclass(frozen=True)
class IntervalTensor:
    """All tensors x with ``lower`` <= x <= ``upper`` elementwise, of one shape."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return applied(function.__name__, function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name in _SHAPE:
            return getattr(self.lower, name)
        if name in ("dim", "size", "is_floating_point", "numel"):
            return getattr(self.lower, name)
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return lambda *args, **kwargs: applied(name, getattr(Tensor, name), (self, *args), kwargs)

    def __add__(self, other: Any) -> IntervalTensor:
        return _sum(self, other)

    def __sub__(self, other: Any) -> IntervalTensor:
        return _sum(self, _negative(other))

    def __rsub__(self, other: Any) -> IntervalTensor:
        return _sum(_negative(self), other)

    def __mul__(self, other: Any) -> IntervalTensor:
        return _scaled(self, other)

    def __truediv__(self, other: Any) -> IntervalTensor:
        return _scaled(self, _known(other, "a division by what depends on the input") ** -1)

    __radd__, __rmul__ = __add__, __mul__


def applied(name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The bounds of a function of torch, by its name.

    Raises:
        TypeError: no rule for it.
    """
    if name in _AFFINE:
        return _AFFINE[name](*args, **kwargs)
    if name in _MONOTONE or (name == "interpolate" and kwargs.get("mode", "nearest") in _AVERAGING):
        ends = [
            function(*(_end(each, side) for each in args), **{k: _end(v, side) for k, v in kwargs.items()})
            for side in ("lower", "upper")
        ]
        return IntervalTensor(*ends)
    raise TypeError(f"no interval bound is known for {name!r}")


_AVERAGING = ("nearest", "bilinear", "area")
"""Modes of ``interpolate`` whose weights are not negative."""


def _end(value: Any, side: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_end(each, side) for each in value)
    return getattr(value, side) if isinstance(value, IntervalTensor) else value


def _known(value: Any, what: str) -> Any:
    if isinstance(value, IntervalTensor):
        raise TypeError(f"no interval bound is known for {what}")
    return value


def _negative(value: Any) -> Any:
    return IntervalTensor(-value.upper, -value.lower) if isinstance(value, IntervalTensor) else -value


def _sum(left: Any, right: Any, alpha: float = 1) -> IntervalTensor:
    right = _scaled(right, alpha) if isinstance(right, IntervalTensor) else right * alpha
    return IntervalTensor(
        _end(left, "lower") + _end(right, "lower"), _end(left, "upper") + _end(right, "upper")
    )


def _difference(left: Any, right: Any) -> IntervalTensor:
    return _sum(left, _negative(right))


def _scaled(left: Any, right: Any) -> IntervalTensor:
    values, factor = (left, right) if isinstance(left, IntervalTensor) else (right, left)
    factor = _known(factor, "a product of two tensors that depend on the input")
    one, other = values.lower * factor, values.upper * factor
    return IntervalTensor(torch.minimum(one, other), torch.maximum(one, other))


def _affine(
    map_: Callable[..., Tensor], x: IntervalTensor, weight: Tensor, bias: Any = None, *rest: Any, **more: Any
) -> IntervalTensor:
    """Centre by the map itself, radius by its absolute weights."""
    weight = _known(weight, "weights that depend on the input")
    centre = map_((x.lower + x.upper) / 2, weight, bias, *rest, **more)
    radius = map_((x.upper - x.lower) / 2, weight.abs(), None, *rest, **more)
    return IntervalTensor(centre - radius, centre + radius)


def _batch_norm(
    x: IntervalTensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *unused: Any,
) -> IntervalTensor:
    """A fixed scale and shift of each channel, in eval mode."""
    if training or mean is None or variance is None:
        raise TypeError("no interval bound is known for batch normalisation by the batch itself")
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1, *[1] * (x.lower.dim() - 2))
    return _sum(_scaled(x, scale.view(shape)), shift.view(shape))


def _dropout(
    x: IntervalTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> IntervalTensor:
    """The identity, in eval mode."""
    if training:
        raise TypeError("no interval bound is known for dropout that is on")
    return x


_AFFINE: dict[str, Callable[..., IntervalTensor]] = {
    "linear": lambda *a, **k: _affine(functional.linear, *a, **k),
    "conv2d": lambda *a, **k: _affine(functional.conv2d, *a, **k),
    "batch_norm": _batch_norm,
    "dropout": _dropout,
    "add": _sum,
    "__radd__": _sum,
    "sub": _difference,
    "rsub": lambda left, right: _difference(right, left),
    "mul": _scaled,
    "__rmul__": _scaled,
    "div": lambda left, right: left / right,
}


ROUNDING = 1e-4
"""Share of a query's largest logit by which a bound must clear zero: bounds are computed in float64, codes in
float32."""


class IntervalBounds:
    """Logit bounds of a hasher in eval mode, on a float64 copy of it.

    Args:
        modality: of the input that changes.
    """

    def __init__(self, hasher: Hasher, modality: str) -> None:
        self.hasher, self.modality = copy.deepcopy(hasher).double().eval(), modality
        self._inside: list[str] = []
        for name, module in self.hasher.named_modules():
            if name:
                self._follow(name, module)

    def _follow(self, name: str, module: nn.Module) -> None:
        """Know by name the layers that are being computed, so that a refusal can say which has no bound."""
        module.register_forward_pre_hook(lambda *_: self._inside.append(name))
        module.register_forward_hook(lambda *_: self._inside.pop() and None)

    def __call__(self, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(B, K) float64 lower and upper logits over all images within ``eps`` of these, in [0, 1].

        Raises:
            ValueError: a layer without a rule, by name.
        """
        images, self._inside = images.to(self.hasher.device, torch.float64), []
        box: Any = IntervalTensor((images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0))
        try:
            with torch.inference_mode(), default_dtype(torch.float64):
                logits: Any = self.hasher({self.modality: box})[self.modality].logits
        except (TypeError, AttributeError) as error:
            layer = self._inside[-1] if self._inside else "the hasher"
            kind = type(self.hasher.get_submodule(layer)).__name__ if self._inside else "Hasher"
            remedy = "certify by smoothing, which works for any net"
            raise ValueError(f"no interval bounds through {layer} ({kind}): {error}; {remedy}") from None
        return logits.lower.cpu(), logits.upper.cpu()

    def free(self, images: Tensor, eps: float) -> Tensor:
        """(B, K) bool: the bits that are not proven to stay as they are within ``eps``."""
        lower, upper = self(images, eps)
        slack = ROUNDING * torch.maximum(lower.abs(), upper.abs()).amax(1, keepdim=True)
        return (lower <= slack) & (upper >= -slack)
