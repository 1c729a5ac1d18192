"""Data-parallel training: each process hashes its share of every batch, and all processes see all codes.

A recipe and its losses run alike in every process, on whole batches. The hasher alone is divided: it hashes
the rows of its process and gathers the outputs of the others, with gradients; those of attacked inputs are
gathered in the same way. So each loss sees the codes of all, and the code memories stay in step. The result
is that of one process with the same batches, up to rounding; but numbers that a net draws while it hashes
(dropout, the gates of SFCL) are drawn alike for every share, and so differ from those of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusthash.core.processes import rank, world
from robusthash.core.types import Inputs, Outputs
from robusthash.models.hasher import Hasher


class _OwnRows(torch.autograd.Function):
    """The rows of this process; backward gathers the gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        start = sum(sizes[: rank()])
        return values[start : start + sizes[rank()]].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.sizes), None


class _AllRows(torch.autograd.Function):
    """The rows of all processes; backward keeps those of this one, since each has the whole loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        start = sum(ctx.sizes[: rank()])
        return grad[start : start + ctx.sizes[rank()]], None


def _gather(rows: Tensor, sizes: list[int]) -> Tensor:
    """(own, ...) -> (B, ...); shares of unequal size are padded on the way."""
    if len(set(sizes)) == 1:
        together = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_gather(list(together.split(sizes)), rows.contiguous())
        return together
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@contextlib.contextmanager
def divided_among_processes(hasher: Hasher) -> Iterator[None]:
    """Divide the batches that the hasher gets among the processes; nothing where there is one."""
    if world() == 1:
        yield
        return
    layers = [module for module in hasher.modules() if isinstance(module, _BatchNorm)]
    whole = hasher.forward

    def forward(inputs: Inputs) -> Outputs:
        count = len(next(iter(inputs.values())))
        if count < world():
            raise ValueError(
                f"a batch of {count} items cannot be divided among {world()} processes; choose a batch_size "
                "that leaves at least as many in the last batch"
            )
        sizes = shares(count)
        outputs = whole({name: _OwnRows.apply(values, sizes) for name, values in inputs.items()})
        return {name: _gathered(output, sizes) for name, output in outputs.items()}

    hasher.forward = forward  # type: ignore[method-assign]
    for layer in layers:
        layer.forward = MethodType(_batchnorm, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in (hasher, *layers):
            del module.__dict__["forward"]


def shares(count: int) -> list[int]:
    """The numbers of rows that the processes take of ``count``; they differ by one at most."""
    return [len(part) for part in torch.arange(count).tensor_split(world())]


def _gathered(output: Any, sizes: list[int]) -> Any:
    """A ``HashOutput`` of all rows, by one exchange for each kind of number."""
    fields = {"logits": output.logits, "code": output.code, "features": output.features}
    named = {**fields, **{f"aux.{name}": value for name, value in output.aux.items()}}
    rows: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in named.values()):  # in one order in all processes
        same = {name: value for name, value in named.items() if value.dtype == dtype}
        flat = torch.cat([value.reshape(len(value), -1) for value in same.values()], 1)
        parts = _AllRows.apply(flat, sizes).split([value[0].numel() for value in same.values()], 1)
        for (name, value), part in zip(same.items(), parts, strict=True):
            rows[name] = part.reshape(-1, *value.shape[1:])
    aux = {name: rows[f"aux.{name}"] for name in output.aux}
    scale = output.scale
    if scale != 1.0:  # a running mean, of which each process saw a share
        share = sizes[rank()] / sum(sizes)
        total = torch.tensor(scale * share, dtype=torch.float64, device=output.logits.device)
        dist.all_reduce(total)
        scale = float(total)
    return replace(output, **{name: rows[name] for name in fields}, aux=aux, scale=scale)


class _SharedBatchNorm(torch.autograd.Function):
    """Batch normalisation by the statistics of all rows; torch's own does that on GPUs alone.

    Returns the values, and (without gradients) mean and unbiased variance of all rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        zeros = torch.zeros_like(weight)  # of its precision are the statistics, also of halves
        mean, variance = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
        count = torch.full_like(mean[:1], x.numel() // x.shape[1])
        sums = torch.cat([count * mean, count * (variance + mean.square()), count])
        dist.all_reduce(sums)
        total = sums[-1]
        mean, square = (part / total for part in sums[:-1].chunk(2))
        variance = (square - mean.square()).clamp_min(0)
        unbiased = variance * total / (total - 1)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, unbiased)
        return nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, spread, total = ctx.saved_tensors
        sums_alone = [False, True, True]  # the gradient of x takes those of all rows
        _, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, spread, True, ctx.eps, sums_alone
        )
        shared = torch.cat([to_weight, to_bias])
        dist.all_reduce(shared)
        scale = weight * spread
        off_slope, off_start = (shared / total).chunk(2)
        slope = -scale * spread * off_slope
        start = -scale * off_start - slope * mean
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        moved = torch.addcmul(start.view(shape), x, slope.view(shape)).addcmul_(grad, scale.view(shape))
        return moved.to(grad.dtype), to_weight, to_bias, None


def _batchnorm(layer: _BatchNorm, x: Tensor) -> Tensor:
    """The forward pass of a layer whose batch is divided."""
    if not layer.training:
        return type(layer).forward(layer, x)
    weight = torch.ones_like(x[0, :1].flatten()).expand(x.shape[1]) if layer.weight is None else layer.weight
    bias = torch.zeros_like(weight) if layer.bias is None else layer.bias
    result, mean, unbiased = _SharedBatchNorm.apply(x, weight, bias, layer.eps)
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        layer.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum  # type: ignore[arg-type]
        layer.running_mean.lerp_(mean, share)
        layer.running_var.lerp_(unbiased, share)
    return result


def reduce_gradients(hasher: Hasher, parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of the hasher over the processes, and average those that each has whole."""
    if world() == 1:
        return
    own = {id(parameter) for parameter in hasher.parameters()}
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    if not learning:
        return
    scale = [1.0 if id(parameter) in own else 1.0 / world() for parameter in learning]
    flat = torch.cat([p.grad.flatten() * factor for p, factor in zip(learning, scale, strict=True)])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
        parameter.grad = part.view_as(parameter)


def average_buffers(hasher: Hasher, count: int) -> None:
    """Average what the parts of the hasher track of a batch of ``count`` rows, of which each saw a share."""
    buffers = [buffer for buffer in hasher.buffers() if buffer.is_floating_point()]
    if world() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers]) * (shares(count)[rank()] / count)
    dist.all_reduce(flat)
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
