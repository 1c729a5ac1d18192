"""A decoded image becomes upright 8-bit RGB of one size, in bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

Fit = Literal["crop", "stretch", "pad"]

MAX_PIXELS = 50_000_000  # width x height, 150 MB once decoded
_BAND = 1 << 20  # pixels that are converted at once where a conversion needs several copies
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {  # by its value
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoding:
    """Pixels that may be decoded at once in this process. An image of more is decoded alone.

    Large images are decoded in one thread: what they leave in the allocator is left once, not once a thread.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self.reset()

    def reset(self) -> None:
        """Forget what is held: in the child of a fork nothing is, and a lock may be held by nobody."""
        self._held, self._freed, self.lock = 0, threading.Condition(), threading.Lock()
        self._large = ThreadPoolExecutor(1, "large images")  # has no thread before it is needed

    def run(self, pixels: int, work: Callable[[], Tensor]) -> Tensor:
        """The result of ``work``, which decodes this many pixels, as soon as there is room."""
        with self._of(pixels):
            return work() if 4 * pixels <= self._room else self._large.submit(work).result()

    @contextmanager
    def _of(self, pixels: int) -> Iterator[None]:
        """Wait for room, and hold it inside."""
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + pixels <= self._room)
            self._held += pixels
        try:
            yield
        finally:
            with self._freed:
                self._held -= pixels
                self._freed.notify_all()


DECODING = Decoding(MAX_PIXELS)  # some eight bytes a pixel, so about 400 MB
os.register_at_fork(after_in_child=DECODING.reset)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says. No other tag is read, and none can do harm."""
    image.load()  # some formats keep their EXIF behind the pixels
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # strangers' bytes: Pillow's parser raises what it likes, and viewers show the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, by the rules that ``read_image`` states."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):  # in bands: whole, it takes five copies of the image
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        laid = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        rgb.paste(laid.convert("RGB"), (0, top))
    return rgb


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Wide integers or floats -> uint8, by the rule that ``read_image`` states."""
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = 0.0, 1.0 if values.dtype.kind == "f" else 65535.0
    least, largest = float(values.min()), float(values.max())
    if least < low or largest > high:
        low, high = least, largest
    scale = 255.0 / (high - low) if high > low else 0.0
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // values.shape[1])
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64)
        levels[top : top + rows] = np.rint((band - low) * scale)
    return levels


def resized(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    width, height = image.size
    bicubic = Image.Resampling.BICUBIC
    if fit == "stretch":
        return image.resize((size, size), bicubic)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), bicubic, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    inner = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), bicubic)
    square = Image.new("RGB", (size, size))
    square.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return square
