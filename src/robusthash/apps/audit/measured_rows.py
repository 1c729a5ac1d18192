"""What an audit measured, row by row, and the pictures that it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.evaluation.copy_detection import CopiesFound, KindFound
from robusthash.metrics.distortion import pixel_norms

Done = Literal["same", "everyday", "noise", "hide", "hide-worst", "imitate", "imitate-worst"]
Role = Literal["own", "target", "other"]


@dataclass(frozen=True)
class Row:
    """What one change does to a search. Shares are of the photographs that asked."""

    name: str
    words: str
    visible: str
    kind: Done
    asked: int
    map: float  # mean of 1 / rank: of the own copy, or under ``imitate`` of the other photograph's
    first: float  # share whose copy (or target) came first
    recognised: float | None = None  # share within the radius; None where there are no codes
    bits: float | None = None  # mean bits that differ from the copy (or target)
    largest: float = 0.0  # largest change of a pixel, of 255
    psnr: float | None = (
        None  # dB, of the mean squared change over all photographs; None where nothing changed
    )
    per_photo: tuple[float, ...] = ()  # 1 / rank of each
    same_kind: float | None = (
        None  # MAP of finding the other photographs of the same kind; None without kinds
    )
    same_kind_chance: float | None = None  # that of a random order
    same_kind_each: tuple[float | None, ...] = ()  # AP of each; None for the only one of its kind


@dataclass(frozen=True)
class Shot:
    """One picture that a search returned."""

    picture: Tensor  # (3, h, w) uint8
    name: str
    distance: int | None
    role: Role


@dataclass(frozen=True)
class Example:
    """A photograph, what was done to it, and what the search returned before and after."""

    title: str
    text: str
    original: Tensor  # (3, S, S) float
    changed: Tensor
    gain: float  # by which the difference is amplified
    before: tuple[Shot, ...]
    after: tuple[Shot, ...]


def make_row(
    name: str,
    words: str,
    visible: str,
    kind: Done,
    found: CopiesFound,
    radius: int,
    images: tuple[Tensor, Tensor] | None = None,
) -> Row:
    """The row of one change.

    Args:
        images: (Q, 3, S, S) before and after, both float in [0, 1].
    """
    largest, psnr = 0.0, None
    if images is not None:
        largest, psnr = difference(*images)
    return Row(
        name,
        words,
        visible,
        kind,
        len(found.ap),
        float(found.ap.mean()),
        float(found.first.mean()),
        float(found.within(radius).mean()),
        float(found.bits.double().mean()),
        largest,
        psnr,
        tuple(found.ap.tolist()),
        **kind_columns(found.kind),
    )


def kind_columns(found: KindFound | None) -> dict[str, Any]:
    """The columns of a row on photographs of the same kind; nothing without kinds."""
    if found is None:
        return {}
    each = tuple(None if math.isnan(value) else value for value in found.ap.tolist())
    if not any(value is not None for value in each):
        return {"same_kind_each": each}
    return {
        "same_kind": float(found.ap.nanmean()),
        "same_kind_chance": float(found.chance.nanmean()),
        "same_kind_each": each,
    }


def difference(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """Largest change of a pixel in levels of 255, and PSNR in dB, None where nothing changed."""
    norms = [pixel_norms(a, b) for a, b in zip(before.split(32), after.split(32), strict=True)]
    mse = float(torch.cat([each["mse"] for each in norms]).mean())
    largest = float(torch.cat([each["linf"] for each in norms]).amax()) * 255
    return largest, None if mse == 0 else -10 * math.log10(mse)


def worst_of(found: Sequence[CopiesFound], imitate: bool = False) -> tuple[CopiesFound, Tensor]:
    """Each photograph's worst case over several attacks, and which attack it was by rank.

    Rank, coming first and distance are each taken at their own worst, which for imitation is their best. The
    kind is taken at its worst in both.
    """
    ap, bits = torch.stack([each.ap for each in found]), torch.stack([each.bits for each in found])
    first = torch.stack([each.first for each in found])
    # of equal ranks, the attack that moved more bits
    score = (ap if imitate else -ap) + (bits if not imitate else -bits).double() * 1e-9
    winner = score.argmax(0)
    packed = torch.stack([each.packed for each in found])[winner, torch.arange(len(winner))]
    kinds = [each.kind for each in found if each.kind is not None]
    kind = KindFound(torch.stack([each.ap for each in kinds]).amin(0), kinds[0].chance) if kinds else None
    if imitate:
        return CopiesFound(ap.amax(0), first.amax(0), bits.amin(0), packed, kind), winner
    return CopiesFound(ap.amin(0), first.amin(0), bits.amax(0), packed, kind), winner


def kept(row: Row, summary: Mapping[str, Any]) -> float:
    """The share that the page speaks of: within the radius where the search has one, else coming first."""
    if summary["matches by"] == "radius" and row.recognised is not None:
        return row.recognised
    return row.first


def kept_words(summary: Mapping[str, Any]) -> str:
    """What ``kept`` counts, as a reader says it."""
    return "recognised" if summary["matches by"] == "radius" else "found first"
