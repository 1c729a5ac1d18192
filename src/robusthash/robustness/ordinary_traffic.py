"""Ordinary queries of honest clients, made of photographs, and how many of them a detector refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from robusthash.core.runtime import Draws, Progress, silent
from robusthash.data.copies import CHANGES
from robusthash.data.transforms import through_jpeg
from robusthash.defenses.query_detection import DetectionLimits, QueryDetector

_LARGE = 192  # pixels a side of the photographs that are changed
Query = tuple[str, Image.Image]
"""A client and what it sends."""


@dataclass(frozen=True)
class Refusals:
    """Number of queries of one kind of traffic, and of those that were slowed or refused."""

    kind: str
    words: str
    queries: int
    slowed: int
    refused: int


def ordinary_refusals(
    photographs: Sequence[Image.Image],
    side: int,
    limits: DetectionLimits = DetectionLimits(),
    seed: int = 0,
    progress: Progress = silent,
) -> list[Refusals]:
    """Send each kind of traffic through a detector of its own, and then all of it through one.

    Args:
        photographs: different ones, RGB, at least two.
        side: pixels a side that the model takes.
    """
    if len(photographs) < 2:
        raise ValueError(f"traffic is made of at least 2 photographs, got {len(photographs)}")
    square = [ImageOps.fit(photograph, (_LARGE, _LARGE)) for photograph in photographs]
    draws = Draws(seed).within("ordinary traffic")
    together = QueryDetector(limits, salt=b"all ordinary traffic")
    kinds, total = [], [0, 0, 0]
    for number, (kind, (words, traffic)) in enumerate(TRAFFIC.items()):
        alone = QueryDetector(limits, salt=b"one kind of ordinary traffic")
        counts = [0, 0, 0]
        for client, image in traffic(square, draws.within(kind)):
            pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
            verdicts = [
                detector.see(pixels, f"{kind} {client}", 0.0).verdict for detector in (alone, together)
            ]
            for count, verdict in ((counts, verdicts[0]), (total, verdicts[1])):
                count[0] += 1
                count[1] += verdict == "slow"
                count[2] += verdict == "refuse"
        kinds.append(Refusals(kind, words, *counts))
        progress(number + 1, len(TRAFFIC), "ordinary traffic")
    return [*kinds, Refusals("all of it", "through one detector, within its memory", *total)]


def _numbers(draws: Draws, *shape: int) -> np.ndarray:
    """Keyed uniform numbers in [0, 1)."""
    return draws.uniform(torch.arange(shape[0]), shape[1:]).double().numpy()


def _part(image: Image.Image, size: float, across: float, down: float) -> Image.Image:
    """A square part: its share of the side, and where of the rest it lies."""
    side = size * image.width
    left, top = (image.width - side) * across, (image.height - side) * down
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _crops(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    for image, each in zip(images, _numbers(draws, len(images), 12, 3), strict=True):
        yield "one", image
        for size, across, down in each:
            yield "one", _part(image, 0.6 + 0.35 * size, across, down)


def _edits(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    for image in images:
        yield "one", image
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        for change in CHANGES:
            yield "one", _image(change(pixels)[0] * 255)


def _resends(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    for image in images:
        for _ in range(30):
            yield "one", image
        for quality in range(40, 96, 5):
            yield "one", _image(through_jpeg(np.asarray(image), quality))


def _catalogue(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    for number, (image, views) in enumerate(zip(images, _numbers(draws, len(images), 8, 4), strict=True)):
        size = int(90 + 60 * views[0, 0])
        cut = _part(image, 0.5, *views[0, 1:3]).resize((size, size))
        for view, (turn, across, down, colour) in enumerate(views):
            item = _coloured(cut, round(2 * colour)) if view % 2 else cut
            item = item.rotate(10 * turn - 5, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
            page = Image.new("RGB", image.size, (255, 255, 255))
            rest = _LARGE - size
            page.paste(item, (int(rest * (0.4 + 0.2 * across)), int(rest * (0.4 + 0.2 * down))))
            yield ("importer" if number % 2 else "shop"), page


def _frames(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    for image in images[: len(images) // 2]:
        for frame in range(40):
            yield "one", _part(image, 0.7, frame / 39, 0.5)


def _popular(images: Sequence[Image.Image], draws: Draws) -> Iterator[Query]:
    popular = images[: max(1, len(images) // 20)]
    for image, each in zip(popular, _numbers(draws, len(popular), 200, 4), strict=True):
        for client, (size, across, down, quality) in enumerate(each):
            cut = _part(image, 0.85 + 0.15 * size, across, down)
            yield f"{client}", _image(through_jpeg(np.asarray(cut), 50 + int(45 * quality)))


def _coloured(image: Image.Image, turn: int) -> Image.Image:
    """The same with red, green and blue exchanged in a circle."""
    parts = image.split()
    return Image.merge("RGB", parts[turn:] + parts[:turn])


def _image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) of 0 to 255."""
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


Traffic = Callable[[Sequence[Image.Image], Draws], Iterator[Query]]

TRAFFIC: dict[str, tuple[str, Traffic]] = {
    "crops": ("each photograph and 12 parts of it, 60 to 95 % of its sides, by one client", _crops),
    "edits": ("each and 10 edits: saved again, cut, reduced, blurred, lit, mirrored", _edits),
    "resends": ("each 30 times as it is, then saved at 12 qualities", _resends),
    "catalogue": ("products on white, 8 views each: turned by 5 degrees, moved, other colours", _catalogue),
    "frames": ("40 frames of a slow pan over each of half of them, by one client", _frames),
    "popular": ("a twentieth of them, each sent by 200 clients, cut and saved in their own ways", _popular),
}
"""Kinds of ordinary traffic: what is sent, in words, and the queries."""
