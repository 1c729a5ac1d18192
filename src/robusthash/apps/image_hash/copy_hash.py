"""The packaged hash for copies: 64, 128 or 256 bits of an image, without labels or training by the user.

Ours: thresholds of the principal components of a picture's block means, which a change that nobody sees
moves little (``models/block_dct.py``, ``scripts/make_copy_hash.py``). How well, and what is proved:
``docs/methods/copy-hash.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from robusthash.apps.experiment.search_model import SearchModel, load
from robusthash.apps.image_hash.copy_weights import linear_layer
from robusthash.core.hamming import pack
from robusthash.data.base import as_input
from robusthash.data.own_data import OneImage, one_image
from robusthash.models.block_dct import COPY_WINDOW
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher
from robusthash.robustness.certificates.linear_codes import most_flips

NAME = "copy-hash"
"""Of the model: ``rh.load("copy-hash")``, and wherever a run is named."""

RADIUS = {64: 9, 128: 22, 256: 47}
"""Bits by which two hashes of that length may differ to count as copies: of two different photographs 1 in
100,000 pairs are as near."""

PLAIN = 9 / 255
"""Deviation of an image's 16 x 16 blocks below which little tells it apart from others."""


@dataclass(frozen=True)
class ImageHash:
    """The hash of an image.

    Args:
        packed: 8, 16 or 32 bytes; those of a shorter hash are the first of a longer one.
        plain: the image has little contrast in its blocks, as one colour or one fine texture has, and its
            hash says little.
    """

    packed: bytes
    plain: bool = False

    @property
    def bits(self) -> int:
        return 8 * len(self.packed)

    def __str__(self) -> str:
        """Hex digits; the first bit is the highest of the first."""
        return self.packed.hex()

    def __sub__(self, other: ImageHash) -> int:
        """Number of bits in which two hashes differ; a ValueError where their lengths do."""
        if not isinstance(other, ImageHash):
            return NotImplemented
        if self.bits != other.bits:
            raise ValueError(f"hashes of {self.bits} and {other.bits} bits; compare those of one length")
        return (int.from_bytes(self.packed) ^ int.from_bytes(other.packed)).bit_count()

    def matches(self, other: ImageHash, radius: int | None = None) -> bool:
        """True for copies: both are not plain, and at most ``radius`` bits differ (``RADIUS`` by default)."""
        near = self - other <= check_radius(radius, self.bits)
        return near and not (self.plain or other.plain)


def hash_image(image: OneImage, bits: int = 256) -> ImageHash:
    """The hash of the central square of an image, by which its copies are found: saved again, smaller, cut,
    re-lit, written on.

    Args:
        image: a path, a PIL image, an (H, W) or (H, W, 3) array, or a (3, H, W) tensor, uint8.
        bits: 64, 128 or 256.

    Raises:
        OSError, ValueError: an image that cannot be read, or another number of bits.
    """
    check_bits(bits)
    return hashes(one_image(image, copy_model().side)[None], bits)[0]


def hashes(pixels: Tensor, bits: int = 256) -> list[ImageHash]:
    """The hashes of (N, 3, 64, 64) images as files give them: uint8, or floats in [0, 1]."""
    images = as_input(pixels)
    packed = pack(encode_signs(copy_model().hasher, "image", images))[:, : bits // 8]
    rows = zip(packed.tolist(), plain(images).tolist(), strict=True)
    return [ImageHash(bytes(row), one) for row, one in rows]


def plain(images: Tensor) -> Tensor:
    """(N,) bool: images of one colour, one fine texture or hardly any contrast."""
    return block_deviation(images) < PLAIN


def block_deviation(images: Tensor) -> Tensor:
    """(N,) deviation of the 16 x 16 block means from those of their channel, over all channels."""
    blocks = functional.avg_pool2d(images, images.shape[-1] // 16)
    return blocks.flatten(2).var(2).mean(1).sqrt()


def check_bits(bits: int) -> None:
    """ValueError unless the hash has such a length."""
    if type(bits) is not int or bits not in RADIUS:
        raise ValueError(f"the hash has {', '.join(map(str, RADIUS))} bits, got {bits!r}")


def check_radius(radius: int | None, bits: int) -> int:
    """The radius, by default that of the length; a ValueError where it cannot be one."""
    if radius is None:
        return RADIUS[bits]
    if type(radius) is not int or not 0 <= radius < bits // 2:
        raise ValueError(f"radius must lie in 0..{bits // 2 - 1} bits of {bits}, got {radius!r}")
    return radius


@cache
def copy_model() -> SearchModel:
    """The packaged model, on the CPU."""
    return load(NAME, "cpu")


MOST = 16
"""Largest level that is tried."""


def proved_levels(pixels: Tensor, bits: int = 256, radius: int | None = None) -> list[int]:
    """For each image the largest whole level of 255, 0 to 16: whatever changes no value of its square of 64 x
    64 pixels by more leaves the hash within ``radius`` bits (by default that of the length), and not plain.

    Args:
        pixels: (N, 3, 64, 64) as files give them: uint8, or floats in [0, 1].

    Raises:
        ValueError: another size, number of bits or radius.
    """
    check_bits(bits)
    radius, side = check_radius(radius, bits), copy_model().side
    if pixels.shape[1:] != (3, side, side):
        raise ValueError(f"pixels are (N, 3, {side}, {side}), got {tuple(pixels.shape)}")
    levels = range(1, MOST + 1)
    hasher, images = copy_model().hasher, as_input(pixels)
    held = torch.stack([withstand(hasher, images, level / 255, bits, radius) for level in levels])
    return held.cumprod(0).sum(0).tolist()


def withstand(hasher: Hasher, images: Tensor, eps: float, bits: int, radius: int) -> Tensor:
    """(N,) bool: no change within ``eps`` moves the hash out of the radius or makes the image plain.

    The deviation of the 16 x 16 blocks is a norm, which a change within eps lowers by at most
    eps sqrt(256 / 255).
    """
    with torch.inference_mode():
        logits = hasher({"image": images})["image"].logits[:, :bits]
        flips = most_flips(linear_layer(hasher).weight[:bits], logits, eps, COPY_WINDOW)
    blocks = COPY_WINDOW.numel() // 3
    visible = block_deviation(images) - eps * math.sqrt(blocks / (blocks - 1)) >= PLAIN
    return (flips <= radius) & visible
