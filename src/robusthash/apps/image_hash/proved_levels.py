"""Proofs for the packaged hash: the level within which no change of an image hides it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robusthash.apps.image_hash.copy_hash import (
    PLAIN,
    block_deviation,
    check_bits,
    check_radius,
    copy_model,
)
from robusthash.apps.image_hash.copy_weights import linear_layer
from robusthash.data.base import as_input
from robusthash.models.block_dct import COPY_WINDOW
from robusthash.models.hasher import Hasher
from robusthash.robustness.certificates.linear_codes import most_flips

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
