"""A few queries of an evaluation with what was found before and after the attack, as pictures of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robusthash.apps.experiment.run_files import reading
from robusthash.core.atomic_files import write_aside
from robusthash.core.embeddings import Searched, nearest
from robusthash.core.labels import relevant
from robusthash.core.limited_files import read_npz
from robusthash.data.base import Split
from robusthash.data.splits import stable_subset
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import EvalResult

EXAMPLES = "examples.npz"

_QUERIES, _HITS = 3, 5
_SIDE, _SMALL = 192, 96  # pixels of a query and of a hit at most
_NEIGHBOUR_FIELDS = ("hits", "names", "far", "right")
_ARRAYS = [
    *("attack", "gain", "queries", "names", "ap", "images", "attacked", "change"),
    *(f"{when}_{what}" for when in ("clean", "after") for what in _NEIGHBOUR_FIELDS),
]


@dataclass(frozen=True)
class AttackedRows:
    """Attacked inputs of the few queries, and what the search compares of them."""

    images: Tensor
    codes: Searched


def picked(context: EvaluationContext) -> Tensor:
    """(3,) positions of the queries of the pictures: by their content, whatever came out."""
    return stable_subset(context.queries, _QUERIES)


def attacked_rows(context: EvaluationContext, attacked: AttackedBlock) -> AttackedRows:
    """The few queries of attacked ones."""
    rows = picked(context)
    return AttackedRows(attacked.inputs[rows].clone(), context.query.of(attacked.signs[rows, 0]))


def save_examples(
    folder: Path,
    context: EvaluationContext,
    results: Mapping[str, EvalResult],
    attacked: Mapping[str, AttackedRows],
) -> None:
    """Write ``examples.npz``: queries under the strongest untargeted attack, before and after.

    Nothing is written where images do not search images, where no such attack was run, or where the strongest
    is one of an earlier call, whose pictures are there.

    Args:
        results: ``clean`` and the attacks, by name.
        attacked: rows of those that were run now, by the same names.
    """
    measure = results["clean"].setting.headline
    strength = {name: result[measure] for name, result in results.items() if measure in result.values}
    name = min(strength, key=lambda each: (each == "clean", strength[each]))
    rows = picked(context)
    images = context.queries.batch(rows).inputs[context.direction[0]]
    if context.direction != ("image", "image") or images.dim() != 4 or name not in attacked:
        return
    after = attacked[name]
    difference = after.images - images
    gain = max(1, int(0.5 / max(float(difference.abs().max()), 1e-6)))
    per_query = [results[each].per_query[measure][rows] for each in ("clean", name)]
    arrays: dict[str, Any] = {
        "attack": np.array(name),
        "gain": np.array(gain),
        "queries": rows.numpy(),
        "names": _names(context, context.query_labels[rows]),
        "ap": torch.stack(per_query, 1).numpy(),
        "images": _pixels(_shrunk(images, _SIDE)),
        "attacked": _pixels(_shrunk(after.images, _SIDE)),
        "change": _pixels(_shrunk(0.5 + gain * difference, _SIDE, "nearest")),
        **_neighbours(context, rows, context.query.take(rows), "clean"),
        **_neighbours(context, rows, after.codes, "after"),
    }
    with write_aside(folder / EXAMPLES) as aside, aside.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _neighbours(
    context: EvaluationContext, rows: Tensor, codes: Searched, when: str
) -> dict[str, np.ndarray]:
    """The nearest items of some queries: thumbnails, names, distances, and whether they are relevant."""
    positions, far = nearest(codes, context.database, _HITS)
    labels = context.database_labels[positions.flatten()].view(*positions.shape, -1)
    own = context.query_labels[rows]
    right = torch.stack([relevant(one[None], hits)[0] for one, hits in zip(own, labels, strict=True)])
    return {
        f"{when}_hits": _thumbnails(context.data.database, positions),
        f"{when}_names": np.array([_names(context, each) for each in labels]),
        f"{when}_far": far.double().numpy(),
        f"{when}_right": right.numpy(),
    }


def _thumbnails(split: Split, positions: Tensor) -> np.ndarray:
    images = split.batch(positions.flatten()).inputs["image"]
    small = _pixels(_shrunk(images, _SMALL))
    return small.reshape(*positions.shape, *small.shape[1:])


def _names(context: EvaluationContext, labels: Tensor) -> np.ndarray:
    """The first label of each row of (N, C) labels, as far as the data name it."""
    known = context.data.label_names
    firsts = [row.nonzero().flatten().tolist() for row in labels > 0]
    return np.array([str(known[hits[0]])[:40] if known and hits else "" for hits in firsts])


def _shrunk(images: Tensor, side: int, mode: str = "area") -> Tensor:
    """Images whose longer side is at most ``side``; smaller ones as they are."""
    share = side / max(images.shape[-2:])
    if share >= 1:
        return images
    return interpolate(images, [max(1, round(length * share)) for length in images.shape[-2:]], mode=mode)


def _pixels(images: Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()


def load_examples(folder: Path) -> dict[str, Any] | None:
    """The pictures as the template ``run_report`` takes them, or None where a run has none.

    Raises:
        RunError: a file that cannot be read.
    """
    path = folder / EXAMPLES
    if not path.is_file():
        return None
    with reading(path, "delete it, or evaluate the run again"):
        arrays = read_npz(path, _ARRAYS)
        pictures = {name: torch.from_numpy(arrays[name]) for name in ("images", "attacked", "change")}
        searches = [
            {
                "position": int(arrays["queries"][row]),
                "name": str(arrays["names"][row]),
                **{name: images[row] for name, images in pictures.items()},
                "ap": [float(value) for value in arrays["ap"][row]],
                "found": [_hits(arrays, when, row) for when in ("clean", "after")],
            }
            for row in range(len(arrays["queries"]))
        ]
        return {"attack": str(arrays["attack"]), "gain": int(arrays["gain"]), "searches": searches}


def _hits(arrays: Mapping[str, np.ndarray], when: str, row: int) -> list[dict[str, Any]]:
    """The items that one search found, nearest first."""
    pictures = torch.from_numpy(arrays[f"{when}_hits"][row])
    facts = zip(*(arrays[f"{when}_{what}"][row] for what in ("names", "far", "right")), strict=True)
    return [
        {"picture": picture, "name": str(name), "far": float(far), "right": bool(right)}
        for picture, (name, far, right) in zip(pictures, facts, strict=True)
    ]
