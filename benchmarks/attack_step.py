"""What one step of PGD costs beyond the forward and backward pass that it cannot do without.

An attack of ten steps and ten bare passes (forward, the same loss, backward to the input, of the same frozen
model on the same batch) are timed in turn, in alternating order; the ratio is the median over the pairs of
processor time, which other load on the machine hardly touches (the ratio of wall times stands in the detail).
Run it with one thread and on the CPU. Everything counts as the attack's but its guide: random start, checks
for NaN, sign steps, projection, freezing. Images are channels-last from the start, so that neither side pays
for a conversion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from _timing import in_turn
from torch import Tensor

from robusthash.attacks import mainstay
from robusthash.attacks.base import Guide
from robusthash.core.hamming import pack, sign
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, Goal, Guidance
from robusthash.metrics.distance_histogram import prepare, prepared_profile
from robusthash.metrics.ranking_measures import average_precision
from robusthash.models import Hasher, build_hasher
from robusthash.models.hasher import frozen

STEPS = 10
EVERY = 10  # steps between two looks at the exact AP
ITEMS = 100_000


@dataclass(frozen=True)
class Given(Guide):
    """A guide that costs nothing: the codes are known."""

    codes: Tensor

    def __call__(self, victim: Hasher, batch: Batch, goal: Goal, reference: Any, draws: Draws) -> Guidance:
        return Guidance(self.codes)


def measure(
    benchmark: str, target: float, image: dict[str, Any], side: int, count: int, pairs: int
) -> dict[str, Any]:
    """One row: the attack's time per step over that of a bare pass."""
    victim = build_hasher(bits=32, image=image).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    batch, goal = Batch({"image": images}, None, torch.arange(count)), Goal(None, -1)
    codes = sign(torch.randn(count, 32, generator=generator))
    attack = replace(mainstay(steps=STEPS), guide=Given(codes))

    def attacked() -> None:
        attack.perturb(victim, batch, goal, None, draws=Draws(0))

    def bare() -> None:
        with frozen(victim):
            for _ in range(STEPS):
                leaf = images.detach().requires_grad_(True)
                value = -(victim({"image": leaf})["image"].relaxed(1.0) * codes).mean(1)
                torch.autograd.grad(value.sum(), leaf)

    compared = in_turn(attacked, bare, pairs)
    detail = {
        "step_ms": round(1e3 * compared.ours / STEPS, 3),
        "pass_ms": round(1e3 * compared.theirs / STEPS, 3),
        "wall_ratio": round(compared.wall_ratio, 4),
        "pixels": side,
        "batch": count,
        "steps": STEPS,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return {
        "bench": benchmark,
        "ratio": round(compared.ratio, 4),
        "target": target,
        "better": "lower",
        "detail": detail,
    }


def selection(
    benchmark: str, target: float, image: dict[str, Any], side: int, count: int, pairs: int
) -> dict[str, Any]:
    """One row: exact AP of a batch against 100,000 items, as it falls on each of ten steps, over a bare
    pass."""
    victim = build_hasher(bits=32, image=image).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    signs = sign(torch.randn(count, 32, generator=generator))
    labels = (torch.rand(ITEMS + count, 24, generator=generator) < 3 / 24).float()
    packed = torch.randint(0, 256, (ITEMS, 4), generator=generator, dtype=torch.uint8)
    database = prepare(Codes(packed, 32, torch.arange(ITEMS)), labels[:ITEMS])

    def selected() -> None:
        asked = Codes(pack(signs), 32, torch.arange(count))
        average_precision(prepared_profile(asked, labels[ITEMS:], database))

    def bare() -> None:
        with frozen(victim):
            leaf = images.detach().requires_grad_(True)
            value = -(victim({"image": leaf})["image"].relaxed(1.0) * signs).mean(1)
            torch.autograd.grad(value.sum(), leaf)

    compared = in_turn(selected, bare, pairs)
    detail = {
        "selection_ms": round(1e3 * compared.ours, 3),
        "pass_ms": round(1e3 * compared.theirs, 3),
        "items": ITEMS,
        "batch": count,
        "every": EVERY,
        "pixels": side,
        "compiled": find_spec("numba") is not None,
    }
    ratio = round(compared.ratio / EVERY, 4)
    return {"bench": benchmark, "ratio": ratio, "target": target, "better": "lower", "detail": detail}


def run() -> list[dict[str, Any]]:
    """Overhead of a step on an AlexNet-shaped net and on the small net, and of exact-AP selection on both."""
    return [
        selection("selection-per-step-alexnet", 0.01, {"name": "alexnet"}, side=224, count=8, pairs=8),
        selection(
            "selection-per-step-small", 0.05, {"name": "small", "width": 32}, side=32, count=128, pairs=10
        ),
        measure("attack-step-alexnet", 1.05, {"name": "alexnet"}, side=224, count=8, pairs=6),
        measure("attack-step-small", 1.10, {"name": "small", "width": 32}, side=32, count=128, pairs=8),
    ]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
