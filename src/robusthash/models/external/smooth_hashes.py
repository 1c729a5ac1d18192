"""Differentiable forms of the perceptual hashes: the library's exact bits, with the gradient of the real
numbers that they are cut from.

A perceptual hash is public arithmetic: luminance, resize, DCT or differences, and a threshold. All but the
threshold is smooth, so an attacker differentiates it. ``smooth_numbers`` computes these numbers in torch;
rounding to 8-bit inside the libraries is left out, so a sign may differ where a number is next to its
threshold: ``exact_logits`` takes the signs from the library.

Sources: ``imagehash`` 4.3 (pHash, average hash, dHash, wavelet hash by Haar); PDQ, Facebook 2019, with its
Jarosz filter of two box passes and its 16 x 16 DCT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from robusthash.core.registry import nearest

_LUMA = (0.299, 0.587, 0.114)
_LANCZOS_TAPS = 3.0


def smooth_numbers(name: str, images: Tensor) -> Tensor:
    """The numbers whose signs are the bits of a perceptual hash.

    Args:
        name: ``phash``, ``ahash``, ``dhash``, ``whash`` (64 bits) or ``pdq`` (256 bits).
        images: (B, 3, H, W) float in [0, 1].

    Returns:
        (B, K); positive is bit 1. Differentiable.

    Raises:
        KeyError: another name.
    """
    if name not in _HASHES:
        raise KeyError(f"no perceptual hash is called {name!r}{nearest(name, _HASHES)}")
    weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    return _HASHES[name](torch.einsum("bchw,c->bhw", images, weights)).flatten(1)


def exact_logits(name: str, images: Tensor, bits: Tensor) -> Tensor:
    """``smooth_numbers`` of a mean magnitude of 1 by image, with the signs of the library's bits.

    The scale is held constant: with a slope of its own, agreement with the own code would have none.

    Args:
        bits: (B, K) bool, by the library.
    """
    numbers = smooth_numbers(name, images)
    scaled = numbers / numbers.detach().abs().mean(1, keepdim=True).clamp_min(1e-12)
    signs = torch.where(bits.to(images.device), 1.0, -1.0).to(scaled.dtype)
    # a number on the wrong side of its threshold is next to it: it gets the least magnitude that has a sign
    magnitude = torch.where(scaled * signs > 0, scaled.abs(), torch.full_like(scaled, 1e-6))
    return (signs * magnitude).detach() + (scaled - scaled.detach())


# ------------------------------------------------------------------------------------------------ hashes


def _phash(luma: Tensor) -> Tensor:
    """The lowest 8 x 8 of the DCT of 32 x 32 pixels, over their median."""
    low = _dct(32, 8, luma) @ _resized(luma, 32, 32) @ _dct(32, 8, luma).T
    return low - _median(low)


def _ahash(luma: Tensor) -> Tensor:
    """8 x 8 pixels, over their mean."""
    small = _resized(luma, 8, 8)
    return small - small.mean((1, 2), keepdim=True)


def _dhash(luma: Tensor) -> Tensor:
    """Differences of neighbours in a row of 8 x 9 pixels."""
    small = _resized(luma, 8, 9)
    return small[:, :, 1:] - small[:, :, :-1]


def _whash(luma: Tensor) -> Tensor:
    """Means of 8 x 8 blocks, over their median: the low band of a Haar transform, whose mean is removed."""
    side = max(2 ** int(math.log2(min(luma.shape[1:]))), 8)
    low = F.avg_pool2d(_resized(luma, side, side)[:, None], side // 8)[:, 0]
    return low - _median(low)


def _pdq(luma: Tensor) -> Tensor:
    """Coefficients 1 to 16 both ways of the DCT of 64 x 64 filtered pixels, over their median."""
    for axis in (2, 1, 2, 1):
        luma = _box(luma, axis)
    rows, columns = (
        ((torch.arange(64, device=luma.device) + 0.5) * size / 64).long() for size in luma.shape[1:]
    )
    small = luma[:, rows][:, :, columns]
    basis = _dct(64, 17, luma)[1:]
    low = (basis @ small @ basis.T).flip(1, 2)  # pdqhash lists its bits from the highest
    return low - _median(low)


_HASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "phash": _phash,
    "ahash": _ahash,
    "dhash": _dhash,
    "whash": _whash,
    "pdq": _pdq,
}

# ------------------------------------------------------------------------------------------------ linear
# parts


def _median(numbers: Tensor) -> Tensor:
    """(B, 1, 1) median by image."""
    return numbers.flatten(1).quantile(0.5, dim=1)[:, None, None]


def _dct(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size) lowest rows of the DCT-II."""
    places = torch.arange(size, dtype=torch.float64) + 0.5
    angles = torch.outer(torch.arange(count, dtype=torch.float64), places) * math.pi / size
    return angles.cos().to(like)


def _resized(luma: Tensor, height: int, width: int) -> Tensor:
    """Resampled as Pillow does by LANCZOS, without its rounding to 8-bit."""
    down = _lanczos(luma.shape[1], height).to(luma)
    across = _lanczos(luma.shape[2], width).to(luma)
    return down @ luma @ across.T


@lru_cache(maxsize=64)
def _lanczos(size: int, length: int) -> Tensor:
    """(length, size) weights of Pillow's antialiased Lanczos resampling."""
    scale = size / length
    stretch = max(scale, 1.0)
    reach = _LANCZOS_TAPS * stretch
    centers = (torch.arange(length, dtype=torch.float64) + 0.5) * scale
    places = torch.arange(size, dtype=torch.float64) + 0.5
    offsets = (places[None] - centers[:, None]) / stretch
    weights = torch.sinc(offsets) * torch.sinc(offsets / _LANCZOS_TAPS)
    first = (centers - reach + 0.5).floor().clamp_min(0)[:, None]
    last = (centers + reach + 0.5).floor().clamp_max(size)[:, None]
    inside = (places[None] - 0.5 >= first) & (places[None] - 0.5 < last) & (offsets.abs() < _LANCZOS_TAPS)
    weights = weights * inside
    return weights / weights.sum(1, keepdim=True)


def _box(luma: Tensor, axis: int) -> Tensor:
    """Moving mean along an axis by PDQ's window, an item of 128 of its length; shorter at the ends."""
    size = luma.shape[axis]
    window = -(-size // 128)
    after = (window + 2) // 2 - 1
    before = window - after - 1
    sums = torch.cat([torch.zeros_like(luma.narrow(axis, 0, 1)), luma.cumsum(axis)], axis)
    places = torch.arange(size, device=luma.device)
    high = (places + after + 1).clamp(max=size)
    low = (places - before).clamp(min=0)
    shape = [1, 1, 1]
    shape[axis] = size
    return (sums.index_select(axis, high) - sums.index_select(axis, low)) / (high - low).reshape(shape)
