"""What SFCL costs beside CgAT (a training step) and beside the undefended net (a query), with the same
spatial net.

A training step is everything the loop does with a batch of pairs: inner attack, two forward passes, outer
loss, backward, Adam. Both sides take as many inner steps, hash images and texts and train on the same
objective. A query is one image encoded by the frozen model. The sides are timed in turn, in alternating
order; the ratio is the median over the pairs of processor time, which other load on the machine hardly
touches (the ratio of wall times stands in the detail). Run it with one thread and on the CPU.

Parameters and multiply-adds are of the image side, counted per image as ``robusthash cost`` counts them: a
transform of n real numbers as 1.25 n log2 n, a complex product as four. The targets are the ratios of the
paper's own table (18.8 to 13.4 minutes an epoch, 18.0 to 12.3 ms a query). A processor that is busy with
products will not meet them: GFNet-Ti has 1.8 times the multiply-adds of AlexNet, and comes on top.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from _timing import Work, in_turn
from torch import Tensor, nn

from robusthash.analysis.model_cost import size_of
from robusthash.attacks import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.defenses import AdversarialTraining
from robusthash.models import Hasher, build_hasher
from robusthash.models.hasher import frozen
from robusthash.objectives import DPSH
from robusthash.training import Moment, OptimConfig

WORDS, CLASSES, BITS = 200, 10, 32


def pairs_of(items: int, side: int) -> RetrievalData:
    """Random images, words and labels."""

    def split(number: int, name: str) -> Split:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (items, 3, side, side), generator=generator, dtype=torch.uint8)
        words = (torch.rand(items, WORDS, generator=generator) < 0.05).float()
        labels = nn.functional.one_hot(torch.arange(items) % CLASSES, CLASSES).float()
        source = ArraySource({"image": pixels, "text": words})
        return Split(name, source, torch.arange(items), labels, source.hashes())

    return RetrievalData(
        "random", split(0, "train"), split(1, "query"), split(2, "database"), tuple("abcdefghij")
    )


def hasher_of(image: Any) -> Hasher:
    text = {"name": "mlp", "widths": [512]}
    return build_hasher(bits=BITS, image=image, text=text, head={"name": "mlp"}, vocabulary=WORDS)


def trained_step(hasher: Hasher, attack: Attack, outer: str, data: RetrievalData, batch_size: int) -> Work:
    """One step of training as the loop takes it; each call takes the next."""
    recipe = AdversarialTraining(hasher, DPSH(), attack, build("outer", outer))
    recipe.setup(data, 0, batch_size)
    optimisers = {
        name: OptimConfig("adam", 1e-4, weight_decay=0.0).make(parameters)
        for name, parameters in recipe.parameter_groups().items()
    }
    batch = data.train.batch(torch.arange(batch_size))

    def step() -> None:
        for group, terms in recipe.step(batch, Moment(0, 0.5, Draws(0))):
            optimisers[group].zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            optimisers[group].step()

    return step


def query(hasher: Hasher, images: Tensor) -> Work:
    """Encode one image after the other."""

    def encode() -> None:
        with frozen(hasher), torch.inference_mode():
            for image in images.split(1):
                hasher({"image": image})

    return encode


def millions(hasher: Hasher, image: Tensor) -> dict[str, float]:
    """Parameters and multiply-adds for one image, in millions."""
    found = size_of(hasher, {"image": image})
    return {"parameters_m": round(found.parameters / 1e6, 3), "macs_m": round(found.macs / 1e6, 2)}


def rows(
    name: str, spatial: Any, frequency: Any, side: int, batch: int, steps: int, pairs: int, queries: int
) -> list[dict[str, Any]]:
    """Training step and query of SFCL on these two nets, against the spatial one alone."""
    data = pairs_of(max(batch, CLASSES), side)
    defended, plain = (
        hasher_of({"name": "sfcl", "spatial": spatial, "frequency": frequency}),
        hasher_of(spatial),
    )
    inner = {"steps": steps, "step_size": 2 / 255, "slope": "one"}
    images = torch.rand(queries, 3, side, side, generator=torch.Generator().manual_seed(0))
    shared = {
        "pixels": side,
        "ours": millions(defended, images[:1]),
        "theirs": millions(plain, images[:1]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    training = in_turn(
        trained_step(defended, build("attack", {"name": "dhta", **inner}), "sfcl", data, batch),
        trained_step(plain, build("attack", {"name": "cgat", **inner}), "cgat", data, batch),
        pairs,
    )
    asked = in_turn(query(defended, images), query(plain, images), 2 * pairs)
    made = []
    for benchmark, target, result, more in (
        (f"sfcl-step-{name}", 1.40, training, {"batch": batch, "inner_steps": steps, "against": "cgat"}),
        (f"sfcl-query-{name}", 1.46, asked, {"images": queries, "against": "undefended"}),
    ):
        times = {
            "ours_ms": 1e3 * result.ours,
            "theirs_ms": 1e3 * result.theirs,
            "wall_ratio": result.wall_ratio,
        }
        detail = {**{key: round(value, 4) for key, value in times.items()}, **more, **shared}
        made.append(
            {
                "bench": benchmark,
                "ratio": round(result.ratio, 4),
                "target": target,
                "better": "lower",
                "detail": detail,
            }
        )
    return made


def run() -> list[dict[str, Any]]:
    """The paper's pair at 224 px, and the small pair of our recipes at 64 px."""
    small, gfnet = (
        {"name": "small", "width": 16},
        {"name": "gfnet", "size": 64, "patch": 8, "dim": 64, "depth": 4},
    )
    return [
        *rows("small", small, gfnet, side=64, batch=32, steps=10, pairs=3, queries=16),
        *rows("alexnet", "alexnet", "gfnet", side=224, batch=4, steps=10, pairs=2, queries=4),
    ]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
