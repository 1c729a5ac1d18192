"""Proofs for the packaged hash: the level within which no change of an image moves it out of the radius."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.apps.image_hash.copy_hash import check_bits, check_radius, copy_model
from robusthash.data.base import as_input
from robusthash.models.block_means import COPY_WINDOW
from robusthash.robustness.certificates.linear_codes import most_flips

MOST = 16
"""Largest level that is tried."""


def proved_levels(pixels: Tensor, bits: int = 256, radius: int | None = None) -> list[int]:
    """For each image the largest whole level of 255, 0 to 16: whatever changes no value of its square of 64 x
    64 pixels by more leaves the hash within ``radius`` bits (by default that of the length).

    Args:
        pixels: (N, 3, 64, 64) as files give them: uint8, or floats in [0, 1].
    """
    check_bits(bits)
    radius, hasher = check_radius(radius, bits), copy_model().hasher
    with torch.inference_mode():
        logits = hasher({"image": as_input(pixels)})["image"].logits[:, :bits]
        weights = hasher.heads["image"].linear.weight[:bits]
        flips = [most_flips(weights, logits, level / 255, COPY_WINDOW) for level in range(1, MOST + 1)]
    within = torch.stack(flips) <= radius
    return within.cumprod(0).sum(0).tolist()
