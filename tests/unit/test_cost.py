"""Multiply-adds against hand counts, and what timing in turn does."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LinearHead
from torch import Tensor, nn

from robusthash.analysis.model_cost import size_of, time_in_turn
from robusthash.models import Hasher, build_hasher


class Around(nn.Module):
    """Any module as an encoder; its output is flattened."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner(x).flatten(1), {}


def around(inner: nn.Module, width: int, bits: int = 4) -> Hasher:
    return Hasher({"image": Around(inner)}, {"image": LinearHead(torch.ones(bits, width))})


def test_convolutions_and_products_are_counted_by_hand():
    found = size_of(around(nn.Conv2d(3, 5, 3, padding=1), 5 * 6 * 6), {"image": torch.rand(1, 3, 6, 6)})
    assert found.macs == 5 * 36 * 27 + 4 * 180
    assert found.flops == 2 * found.macs
    assert found.parameters == 5 * 27 + 5 + 4 * 180


def test_attention_counts_however_it_is_computed():
    items, width, heads, hidden = 10, 32, 4, 64
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True)
    products = items * (4 * width * width + 2 * width * hidden)
    attention = 2 * items * items * width
    found = size_of(around(layer, items * width), {"image": torch.rand(1, items, width)})
    assert found.macs == products + attention + 4 * items * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_global_filter_counts_its_transforms_and_its_product():
    size, patch, dim = 32, 8, 16
    plain = {"name": "gfnet", "size": size, "patch": patch, "dim": dim, "depth": 1}
    image = {"image": torch.rand(1, 3, size, size)}
    one, two = (
        size_of(build_hasher(bits=8, image={**plain, "depth": depth}), image).macs for depth in (1, 2)
    )
    grid = size // patch
    transform = dim * 2.5 * grid**2 * math.log2(grid**2) / 2  # there and back are two of these
    filtered = 2 * transform + 4 * dim * grid * (grid // 2 + 1)
    assert two - one == filtered + 2 * 4 * dim * dim * grid**2


def test_a_purifier_counts_and_the_bare_hasher_does_not_have_it():
    gated = build_hasher(bits=8, image={"name": "small", "width": 4}, purifiers={"image": "spectral-gate"})
    image = {"image": torch.rand(1, 3, 16, 16)}
    whole, bare = size_of(gated, image), size_of(gated.bare(), image)
    assert (
        whole.macs >= bare.macs + 2 * 3 * 16 * 16 * 64
    )  # the block DCT there and back, beside the gate's own net
    assert whole.parameters > bare.parameters
    with pytest.raises(ValueError, match="one query"):
        size_of(gated, {"image": torch.rand(2, 3, 16, 16)})


def test_everything_is_timed_in_turn_after_warming_up():
    calls: list[str] = []
    found = time_in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "a", warmup=2, runs=3
    )
    assert "".join(calls) == "abab" + "abbaab"
    assert found["a"].ratio == 1.0
    assert found["b"].runs == 3
    assert found["b"].threads == torch.get_num_threads()
    assert found["b"].median <= found["b"].p95
    with pytest.raises(KeyError, match="no work is called 'c'"):
        time_in_turn({"a": int}, "c")
    with pytest.raises(ValueError, match="at least 1"):
        time_in_turn({"a": int}, "a", runs=0)


def test_the_ratio_is_that_of_the_times():
    matrix = torch.rand(160, 160)
    found = time_in_turn(
        {"once": lambda: matrix @ matrix, "often": lambda: [matrix @ matrix for _ in range(12)]},
        "once",
        runs=15,
    )
    assert found["often"].ratio > 3
