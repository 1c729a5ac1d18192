"""What a training step of a defense costs beside one of CgAT with the same net, batch and inner steps.

One step is all that the loop does with a batch: inner attack, attacked and clean pass, memory, loss,
backward, SGD. The two sides are timed in turn, in alternating order; the ratio is the median over the pairs
of processor time, which other load on the machine hardly touches (the ratio of wall times stands in the
detail). Run it on one thread, on the CPU. Images and labels are random; nets have random weights: neither
changes the cost.

To add a defense: write a function like ``saah`` and name it in ``DEFENSES`` with its target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _timing import in_turn

from robusthash.attacks import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.defenses import AdversarialTraining, CgATOuter, SAAHOuter
from robusthash.models import build_hasher
from robusthash.objectives import DPSH
from robusthash.training import Moment, Recipe
from robusthash.training.recipe import FIGURES

BITS, CLASSES, STEPS = 32, 10, 7
Image = dict[str, Any]
Make = Callable[[Image], Recipe]


def inner(name: str, objective: DPSH, **options: Any) -> Attack:
    """The inner attack of the papers: 7 steps of 2/255 in a ball of 8/255."""
    return build(
        "attack", {"name": name, "steps": STEPS, "step_size": 2 / 255, **options}, objective=objective
    )


def cgat(image: Image) -> Recipe:
    """CgAT: the reference."""
    objective = DPSH()
    return AdversarialTraining(
        build_hasher(bits=BITS, image=image), objective, inner("cgat", objective, slope="one"), CgATOuter()
    )


def saah(image: Image) -> Recipe:
    """SAAH: gate, attack on the objective, stability and retention."""
    objective = DPSH()
    hasher = build_hasher(bits=BITS, image=image, purifiers={"image": "spectral-gate"})
    return AdversarialTraining(hasher, objective, inner("pgd", objective, random_start=False), SAAHOuter())


DEFENSES: dict[str, tuple[Make, float]] = {"saah": (saah, 1.10)}
"""Defenses and the largest ratio that they should reach on the AlexNet-shaped net."""


def random_data(items: int, side: int) -> RetrievalData:
    """Random images of random classes; only the training split is used."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (items + 2, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.eye(CLASSES)[torch.randint(0, CLASSES, (items + 2,), generator=generator)]
    source = ArraySource({"image": pixels})
    rows = {
        "train": torch.arange(items),
        "query": torch.tensor([items]),
        "database": torch.tensor([items + 1]),
    }
    hashes = source.hashes()
    splits = {
        name: Split(name, source, chosen, labels[chosen], hashes[chosen]) for name, chosen in rows.items()
    }
    return RetrievalData("random", **splits, label_names=tuple("abcdefghij"))


def stepper(recipe: Recipe, data: RetrievalData, batch: Batch) -> Callable[[], None]:
    """One training step as the loop takes it."""
    recipe.setup(data, 0, 32)
    groups = recipe.parameter_groups()
    optimisers = {
        name: torch.optim.SGD(found, 1e-4, momentum=0.9, weight_decay=5e-4) for name, found in groups.items()
    }

    def step() -> None:
        for group, terms in recipe.step(batch, Moment(0, 0.0, Draws(0))):
            if group == FIGURES:
                continue
            loss = torch.stack(list(terms.values())).sum()
            optimisers[group].zero_grad(set_to_none=True)
            loss.backward()
            optimisers[group].step()

    return step


def parameters(recipe: Recipe) -> int:
    """Of the hasher alone."""
    return sum(parameter.numel() for parameter in recipe.hasher.parameters())


def measure(
    name: str, net: str, target: float | None, image: Image, side: int, count: int, items: int, pairs: int
) -> dict[str, Any]:
    """One row: a step of the defense over a step of CgAT."""
    data = random_data(items, side)
    batch = data.train.batch(torch.arange(count))
    recipes = DEFENSES[name][0](image), cgat(image)
    works = [stepper(recipe, data, batch) for recipe in recipes]
    compared = in_turn(*works, pairs)
    sizes = [parameters(recipe) for recipe in recipes]
    detail = {
        "step_s": round(compared.ours, 4),
        "cgat_step_s": round(compared.theirs, 4),
        "wall_ratio": round(compared.wall_ratio, 4),
        "parameters": sizes[0],
        "more_parameters": round(sizes[0] / sizes[1] - 1.0, 6),
        "pixels": side,
        "batch": count,
        "inner_steps": STEPS,
        "training_items": items,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    row = {
        "bench": f"defense-cost-{name}-{net}",
        "ratio": round(compared.ratio, 4),
        "target": target,
        "better": "lower",
    }
    return {**row, "detail": detail}


def run() -> Iterator[dict[str, Any]]:
    """Every defense on an AlexNet-shaped net at 224 px, and beside it on the small net at 32 px, without a
    target."""
    small = {"name": "small", "width": 32}
    for name, (_, target) in DEFENSES.items():
        yield measure(name, "alexnet", target, {"name": "alexnet"}, side=224, count=4, items=16, pairs=5)
        yield measure(name, "small", None, small, side=32, count=64, items=500, pairs=8)


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row), flush=True)
