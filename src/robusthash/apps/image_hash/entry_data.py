"""Checks of the registry entry of a hash for copies that need data: weights, radii and recall made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from robusthash.apps.experiment.search_model import SearchModel
from robusthash.apps.image_hash.copy_entry import (
    EntryCheck,
    certified_shares,
    photograph_hashes,
    pixels_for,
    shares_text,
)
from robusthash.apps.image_hash.copy_weights import made_hasher
from robusthash.apps.image_hash.everyday_changes import CHANGES, cifar_photographs, coco_photographs
from robusthash.core.hamming import as_words
from robusthash.core.runtime import Progress
from robusthash.data.own_data import OneImage
from robusthash.robustness.evidence.records import CopyClaim, CopyEntry

MAKING = ("ucmerced.tar", "ucmerced.jsonl")
MEASURING = ("coco_mini.tar", "cifar10.npz")

WEIGHTS_TOLERANCE = 1e-5
"""Largest difference of a weight that is made again, as a share of the largest: other libraries round."""

RECALL_TOLERANCE = 0.01
"""Largest difference of a recall, and of a rate of false matches as a share of it: other decoders round."""


def checks_on_data(
    entry: CopyEntry, model: SearchModel, data: Path, progress: Progress
) -> Iterator[EntryCheck]:
    """Weights by the files ``MAKING``, radii and recall by ``MEASURING``, as far as ``data`` holds them.

    Raises:
        FileNotFoundError, ValueError: ``data`` is no folder, or holds none of them.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data}")
    parts = (
        ("weights, made again", MAKING, lambda: _made_again(entry, model, data, progress)),
        ("radii and recall, made again", MEASURING, lambda: _measured_again(entry, model, data, progress)),
    )
    missing = {name: [file for file in files if not (data / file).is_file()] for name, files, _ in parts}
    if all(missing.values()):
        raise ValueError(f"{data} holds neither {' and '.join(MAKING)} nor {' and '.join(MEASURING)}")
    for name, _, checks in parts:
        if missing[name]:
            yield EntryCheck(name, "not checked", f"{data} has no {missing[name][0]}")
        else:
            yield from checks()


def _made_again(entry: CopyEntry, model: SearchModel, data: Path, progress: Progress) -> Iterator[EntryCheck]:
    again = made_hasher(data, progress)
    claimed, found = model.hasher.state_dict(), again.state_dict()
    fitting = {name: value.shape for name, value in claimed.items()} == {
        name: value.shape for name, value in found.items()
    }
    name = "weights, made again"
    if not fitting:
        yield EntryCheck(name, "fail", "tensors of other names or shapes")
        return
    largest = max(
        float((found[key] - value).abs().max() / value.abs().max()) for key, value in claimed.items()
    )
    text = f"they differ by {largest:.1g} of the largest, at most {WEIGHTS_TOLERANCE:g}"
    yield EntryCheck.of(name, largest <= WEIGHTS_TOLERANCE, text)
    hashes = photograph_hashes(SearchModel(again, model.side))
    other = [key for key, value in entry.photographs.hashes.items() if hashes.get(key) != value]
    yield EntryCheck.of("hashes by weights made again", not other, f"{len(other)} of {len(hashes)} differ")


def _measured_again(
    entry: CopyEntry, model: SearchModel, data: Path, progress: Progress
) -> Iterator[EntryCheck]:
    progress(0, len(CHANGES) + 2, "photographs")
    images = coco_photographs(data)
    own = packed_codes(model, images)
    every = np.concatenate([own, packed_codes(model, cifar_photographs(data))])
    changed = {}
    for number, (name, change) in enumerate(CHANGES.items(), 2):
        progress(number, len(CHANGES) + 2, "photographs")
        changed[name] = packed_codes(model, map(change, images))
    pixels = pixels_for(model, images)
    for claim in entry.claims:
        width = claim.bits // 8
        yield from _radii_again(claim, pair_counts(every[:, :width], claim.bits))
        apart = {name: distances(codes[:, :width], own[:, :width]) for name, codes in changed.items()}
        yield from _recall_again(claim, apart)
        shares, claimed = certified_shares(model, pixels, claim), claim.strictest.certified
        holds = all(abs(shares[level] - claimed[level]) <= RECALL_TOLERANCE for level in claimed)
        if shares:
            yield EntryCheck.of(f"{claim.bits} bits, certified", holds, shares_text(shares))


def _radii_again(claim: CopyClaim, counts: np.ndarray) -> Iterator[EntryCheck]:
    shares, pairs = counts.cumsum() / counts.sum(), int(counts.sum())
    for within in claim.within:
        radius = int((shares <= within.rate).sum()) - 1
        rate = float(shares[radius])
        near = abs(rate - within.false_matches) <= RECALL_TOLERANCE * within.false_matches
        claimed = f"claimed {within.radius} and {within.false_matches:.3g}"
        text = f"{radius} bits and {rate:.3g} of {pairs} pairs, {claimed}"
        holds = radius == within.radius and near and pairs == claim.pairs
        yield EntryCheck.of(f"{claim.bits} bits, radius at {within.rate:g}", holds, text)


def _recall_again(claim: CopyClaim, apart: dict[str, np.ndarray]) -> Iterator[EntryCheck]:
    for within in claim.within:
        found = {change: float((bits <= within.radius).mean()) for change, bits in apart.items()}
        off = [
            f"{change} {found[change]:.4f}, claimed {claimed:.4f}"
            if change in found
            else f"no change {change!r}"
            for change, claimed in within.changes.items()
            if not abs(found.get(change, 2) - claimed) <= RECALL_TOLERANCE
        ]
        text = (
            f"{len(within.changes) - len(off)} of {len(within.changes)} changes within {RECALL_TOLERANCE:g}"
        )
        text = "; ".join([text, *off])
        yield EntryCheck.of(f"{claim.bits} bits, recall at {within.rate:g}", not off, text)


def packed_codes(model: SearchModel, images: Iterable[OneImage]) -> np.ndarray:
    """(N, bytes) uint8."""
    return np.asarray(model.encode(images, progress=lambda *_: None).packed)


def pair_counts(packed: np.ndarray, bits: int) -> np.ndarray:
    """(bits + 1,) number of pairs of different rows by their distance."""
    words, counts = as_words(packed), np.zeros(bits + 1, dtype=np.int64)
    for row in range(len(words) - 1):
        apart = np.bitwise_count(words[row + 1 :] ^ words[row]).sum(1)
        counts += np.bincount(apart, minlength=bits + 1)
    return counts


def distances(packed: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) bits by which the rows of two (N, bytes) arrays differ."""
    return np.bitwise_count(as_words(packed) ^ as_words(other)).sum(1)
