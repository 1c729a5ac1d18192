"""The everyday changes of a picture by which hashes for copies are measured, and the photographs for it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from robusthash.data.image_files import pixels_of
from robusthash.data.transforms import through_jpeg

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
