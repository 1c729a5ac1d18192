"""The perceptual hashes that people run: pHash, dHash and the wavelet hash of ``imagehash``, and PDQ of
``pdqhash``.

They are callables from images to bits, without gradients, to be audited like any foreign model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from robusthash.core.registry import nearest
from robusthash.data.transforms import to_pixels


@dataclass(frozen=True)
class Perceptual:
    """A perceptual hash.

    Called with (B, 3, H, W) float images in [0, 1], rounded to eight bits, it answers (B, K) bool.
    """

    name: str
    title: str
    bits: int
    radius: int  # bits that may differ between two pictures that count as the same, as its users set it
    compute: Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 -> (K,) bits

    def __call__(self, images: Tensor) -> np.ndarray:
        return np.stack([self.compute(pixels) for pixels in to_pixels(images)]).astype(bool)


def perceptual(name: str) -> Perceptual:
    """``phash``, ``dhash``, ``whash`` (64 bits each) or ``pdq`` (256 bits).

    The radii are customs, not laws: 10 of 64 bits, and for PDQ 31 of 256, which its authors recommend.

    Raises:
        KeyError: another name.
        ImportError: the extra ``audit`` is not installed.
    """
    if name not in NAMES:
        raise KeyError(f"no perceptual hash is called {name!r}{nearest(name, NAMES)}")
    try:
        return _pdq() if name == "pdq" else _imagehash(name)
    except ImportError as error:
        raise ImportError(
            f"perceptual hashes need an extra: pip install 'robusthash[audit]' ({error})"
        ) from error


TITLES = {"phash": "pHash", "dhash": "dHash", "whash": "wavelet hash", "pdq": "PDQ"}
NAMES = tuple(TITLES)


def _imagehash(name: str) -> Perceptual:
    import imagehash

    hashed: Callable[[Image.Image], Any] = getattr(imagehash, name)

    def compute(pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = hashed(Image.fromarray(pixels)).hash.flatten()
        return found

    return Perceptual(name, TITLES[name], 64, 10, compute)


def _pdq() -> Perceptual:
    import pdqhash

    def compute(pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = pdqhash.compute(pixels)[0]
        return found

    return Perceptual("pdq", TITLES["pdq"], 256, 31, compute)
