"""Transforms of images in [0, 1]: augmentation for training, and everyday changes of files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from robusthash.core.runtime import Draws


def augment(images: Tensor, ids: Tensor, draws: Draws, flip: bool = True, pad: int = 4) -> Tensor:
    """Crop at random after reflect padding, and mirror with probability one half, keyed by item id.

    Only pixels of the image itself are moved, so the result stays in the range of the input.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        ids: (B,) int64; the same id, scope and seed give the same change whatever the batch. Narrow ``draws``
            by the epoch, or every epoch is the same.
        flip: whether to mirror at all.
        pad: pixels of padding on each side, and the most that the crop moves. Less than H and W.

    Returns:
        (B, 3, H, W), a new tensor.
    """
    height, width = images.shape[-2:]
    if not images.is_floating_point():
        raise ValueError(f"augment takes float images in [0, 1], got {images.dtype}")
    if len(ids) != len(images):
        raise ValueError(f"{len(ids)} ids for {len(images)} images")
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad must lie in 0..{min(height, width) - 1} for {height} x {width}, got {pad}")
    numbers = draws.within("augment").uniform(ids.to(images.device), (3,))
    top, left = (numbers[:, :2] * (2 * pad + 1)).long().unbind(1)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (B, W)
    if flip:
        columns = torch.where(numbers[:, 2:] < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (pad, pad, pad, pad), mode="reflect") if pad else images
    item = torch.arange(len(images), device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Change:
    """One everyday change of (B, 3, H, W) float images in [0, 1], into images of the same shape and range."""

    name: str
    words: str  # for someone who knows no mathematics
    visible: str  # whether one can see it, in words
    apply: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """The changed images, rounded to multiples of 1/255; ValueError unless (B, 3, H, W) float."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            shape = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"changes take (B, 3, H, W) float images, got {shape}")
        return eight_bits(self.apply(images))


def eight_bits(images: Tensor) -> Tensor:
    """The nearest images that an 8-bit file can hold."""
    return (images.clamp(0, 1) * 255).round() / 255


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [0, 1] -> (B, H, W, 3) uint8, as image libraries take them."""
    pixels: np.ndarray = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Each image saved as a JPEG file of this quality (1 to 100, Pillow's scale) and read again."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must lie in 1..100, got {quality}")
    copies = torch.stack([through_jpeg(pixels, quality) for pixels in to_pixels(images)])
    return (copies.to(images.dtype) / 255).to(images.device)


def through_jpeg(pixels: np.ndarray, quality: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8, by way of a JPEG file of this quality."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    with Image.open(stream, formats=["JPEG"]) as copy:
        return torch.from_numpy(np.array(copy)).permute(2, 0, 1)


def crop(images: Tensor, share: float) -> Tensor:
    """``share`` of width and height cut away, equally on all sides, and the rest enlarged again."""
    height, width = images.shape[-2:]
    rows, columns = max(1, round(height * share / 2)), max(1, round(width * share / 2))
    return _resized(images[..., rows : height - rows, columns : width - columns], height, width)


def shrink(images: Tensor, factor: float) -> Tensor:
    """Reduced to ``factor`` of width and height, then enlarged again."""
    height, width = images.shape[-2:]
    small = _resized(images, max(1, round(height * factor)), max(1, round(width * factor)))
    return _resized(small, height, width)


def blur(images: Tensor, share: float) -> Tensor:
    """Gaussian blur whose sigma is ``share`` of the shorter side, at least half a pixel."""
    from torchvision.transforms.functional import gaussian_blur  # half a second to import

    sigma = max(0.5, share * min(images.shape[-2:]))
    reach = min(round(3 * sigma), (min(images.shape[-2:]) - 1) // 2)
    return gaussian_blur(images, [2 * reach + 1] * 2, [sigma, sigma])


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    from torchvision.transforms.functional import resize  # half a second to import

    return resize(images, [height, width], antialias=True)


_EDGES = "{} % of width and height cut away at the edges"

EVERYDAY = (
    Change("jpeg-90", "saved again as a good JPEG (quality 90)", "no", lambda x: jpeg(x, 90)),
    Change("jpeg-50", "saved again as a small JPEG (quality 50)", "hardly", lambda x: jpeg(x, 50)),
    Change("crop-5", _EDGES.format(5), "only side by side", lambda x: crop(x, 0.05)),
    Change("crop-10", _EDGES.format(10), "only side by side", lambda x: crop(x, 0.1)),
    Change("resize", "made half as large and enlarged again", "less sharp", lambda x: shrink(x, 0.5)),
    Change("blur", "slightly out of focus", "less sharp", lambda x: blur(x, 0.006)),
    Change("brighter", "20 % brighter", "yes", lambda x: x * 1.2),
    Change("darker", "20 % darker", "yes", lambda x: x * 0.8),
)
"""The harmless changes that an audit measures."""


def noise(images: Tensor, ids: Tensor, eps: float, draws: Draws) -> Tensor:
    """Each channel of each pixel moved by ``eps`` up or down at random, keyed by item id, then cut to [0, 1].

    The strongest blind change inside the budget: no search was involved.
    """
    steps = torch.where(draws.within("noise").uniform(ids, tuple(images.shape[1:])) < 0.5, -eps, eps)
    return eight_bits(images + steps.to(images))
