"""Checks of a hash for copies that need data: weights, radii, and recall under everyday changes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from robusthash.apps.experiment.search_model import SearchModel
from robusthash.apps.image_hash.copy_entry import (
    EntryCheck,
    certified_shares,
    photograph_hashes,
    pixels_for,
    shares_text,
)
from robusthash.apps.image_hash.copy_weights import made_hasher
from robusthash.core.hamming import as_words
from robusthash.core.runtime import Progress
from robusthash.data.image_files import pixels_of
from robusthash.data.own_data import OneImage
from robusthash.data.transforms import through_jpeg
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


SIDE = 256  # of the photographs that are changed


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    return Image.fromarray(through_jpeg(np.asarray(image), quality).permute(1, 2, 0).numpy())


def _crop(image: Image.Image, share: float) -> Image.Image:
    wide, high = image.size
    return image.crop((wide * share / 2, high * share / 2, wide * (1 - share / 2), high * (1 - share / 2)))


def _smaller(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)


def _bar(image: Image.Image) -> Image.Image:
    """White words on a black bar over the lowest 14 %."""
    image, (wide, high) = image.copy(), image.size
    draw, bar = ImageDraw.Draw(image), 0.14 * high
    draw.rectangle((0, high - bar, wide, high), fill="black")
    font = ImageFont.load_default(size=0.6 * bar)
    draw.text((0.06 * wide, high - 0.85 * bar), "When the robot dreams again", "white", font)
    return image


def _words(image: Image.Image) -> Image.Image:
    """White words with a black edge above and below."""
    image, (wide, high) = image.copy(), image.size
    font = ImageFont.load_default(size=0.1 * high)
    for place in (0.05, 0.8):
        at, line = (0.08 * wide, place * high), "TOP TEXT LINE HERE"
        ImageDraw.Draw(image).text(at, line, "white", font, stroke_width=2, stroke_fill="black")
    return image


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 30": lambda x: _jpeg(x, 30),
    "crop 10 %": lambda x: _crop(x, 0.1),
    "crop 20 %": lambda x: _crop(x, 0.2),
    "half size": lambda x: _smaller(x, 0.5),
    "quarter size": lambda x: _smaller(x, 0.25),
    "blur": lambda x: x.filter(ImageFilter.GaussianBlur(max(0.5, 0.006 * min(x.size)))),
    "20 % brighter": lambda x: x.point(lambda level: min(255, level * 1.2)),
    "20 % darker": lambda x: x.point(lambda level: level * 0.8),
    "caption bar": _bar,
    "words": _words,
    "rotation 3 degrees": lambda x: x.rotate(3, Image.Resampling.BICUBIC),
    "mirrored": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def coco_photographs(data: Path) -> list[Image.Image]:
    """Those of ``coco_mini.tar``, as central squares of SIDE pixels."""
    with tarfile.open(data / "coco_mini.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.lower().endswith(".jpg"))
        files = [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    return [Image.fromarray(pixels_of(one, SIDE).permute(1, 2, 0).numpy()) for one in opened]


def cifar_photographs(data: Path) -> Iterator[Image.Image]:
    """The test photographs of ``cifar10.npz``, at 128 px."""
    with np.load(data / "cifar10.npz") as arrays:
        places, files, test = arrays["offset"], arrays["jpeg"], np.flatnonzero(arrays["is_test"] == 1)
    for row in test:
        image = Image.open(io.BytesIO(files[places[row] : places[row + 1]].tobytes())).convert("RGB")
        yield image.resize((128, 128), Image.Resampling.BICUBIC)
