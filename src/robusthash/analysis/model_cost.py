"""The cost of a hasher: parameters, multiply-adds, the time of one query."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from robusthash.core.types import Inputs
from robusthash.models.encoding import plain_attention
from robusthash.models.hasher import Hasher, frozen

Work = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """Parameters and multiply-adds (MACs) of one query; floating-point operations are twice the MACs."""

    parameters: int
    macs: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


def size_of(hasher: Hasher, inputs: Inputs) -> Size:
    """Parameters that ``inputs`` pass, in encoders, heads and purifiers, and the multiply-adds of one item.

    Counted as the operations are dispatched: convolutions, matrix products and attention exactly, a Fourier
    transform of N complex numbers as 5 N log2 N floating-point operations and a real one as half of that (the
    convention of FFTW), a product of two complex numbers as 4 multiply-adds. Other elementwise work,
    normalisation and pooling are left out, as papers leave them out.

    Args:
        inputs: one item by modality, (1, ...).
    """
    if any(len(values) != 1 for values in inputs.values()):
        raise ValueError(f"give one query's size, not { {n: tuple(v.shape) for n, v in inputs.items()} }")
    groups = hasher.encoders, hasher.heads, hasher.purifiers
    parts = [group[name] for group in groups for name in inputs if name in group]
    parameters = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters()}
    counter = FlopCounterMode(display=False, custom_mapping=_more_formulas())
    with frozen(hasher), torch.no_grad(), plain_attention(), counter:
        hasher(inputs)
    return Size(sum(parameters.values()), counter.get_total_flops() // 2)


def _more_formulas() -> dict[Any, Any]:
    """Operations unknown to torch's own counter: (arguments..., out_val) -> floating-point operations."""

    def transformed(values: Tensor, dims: list[int]) -> float:
        return 5.0 * values.numel() * math.log2(math.prod(values.shape[dim] for dim in dims))

    def complex_to_complex(x: Tensor, dims: list[int], *_: Any, out_val: Tensor, **__: Any) -> int:
        return round(transformed(x, dims))

    def real_to_complex(x: Tensor, dims: list[int], *_: Any, out_val: Tensor, **__: Any) -> int:
        return round(transformed(x, dims) / 2)

    def complex_to_real(x: Tensor, dims: list[int], *_: Any, out_val: Tensor, **__: Any) -> int:
        return round(transformed(out_val, dims) / 2)

    def product(x: Any, y: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
        both = all(isinstance(side, Tensor) and side.is_complex() for side in (x, y))
        return 8 * out_val.numel() if both else 0

    raw: tuple[Any, ...] = (complex_to_complex, real_to_complex, complex_to_real, product)
    for formula in raw:
        formula._get_raw = True  # torch hands such a formula tensors, others their shapes

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    aten = torch.ops.aten
    return {
        aten._fft_c2c: complex_to_complex,
        aten._fft_r2c: real_to_complex,
        aten._fft_c2r: complex_to_real,
        aten.mul: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one query, by wall clock, and the ratio to a reference timed in turn with it."""

    median: float
    p95: float
    ratio: float  # median over the rounds of its time / the reference's; 1 for the reference itself
    runs: int
    threads: int


def time_in_turn(
    works: Mapping[str, Work], reference: str, *, warmup: int = 10, runs: int = 100
) -> dict[str, Latency]:
    """Time pieces of work in turn, so that all other load of the machine falls on all of them.

    Args:
        works: by name, the reference among them; each is called ``warmup`` times before ``runs`` timed calls.

    Raises:
        KeyError: no work of the reference's name.
        ValueError: fewer than 1 run.
    """
    if reference not in works:
        raise KeyError(f"no work is called {reference!r}; there are {', '.join(works)}")
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs must be at least 1 and warmup at least 0, got {runs} and {warmup}")
    for _ in range(warmup):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(runs):
        for name in names if number % 2 == 0 else names[::-1]:
            started = time.perf_counter()
            works[name]()
            times[name].append(time.perf_counter() - started)
    base = np.array(times[reference])
    return {
        name: Latency(
            median=1e3 * float(np.median(seconds)),
            p95=1e3 * float(np.percentile(seconds, 95)),
            ratio=float(np.median(np.array(seconds) / base)),
            runs=runs,
            threads=torch.get_num_threads(),
        )
        for name, seconds in times.items()
    }


def single_query(hasher: Hasher, inputs: Inputs, search: Callable[[Tensor], object]) -> Work:
    """One query from input to answer: encode, with purifiers and gates, then ``search`` its (1, K) logits."""
    (modality,) = inputs

    def run() -> None:
        with torch.no_grad():
            search(hasher(inputs)[modality].logits)

    hasher.eval()
    return run
