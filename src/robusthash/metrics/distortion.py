"""Perceptibility of a perturbation: pixel norms and structural similarity of images, edits of texts.

Images are (B, C, H, W) in [0, 1]; every function returns one value per item, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW = 11  # pixels; Gaussian of sigma 1.5, as in Wang et al., "Image quality assessment", 2004


def image_measures(clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) of each measure of ``pixel_norms``, and ``ssim``."""
    return {**pixel_norms(clean, attacked), "ssim": ssim(clean, attacked)}


def pixel_norms(clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) norms of delta = attacked - clean, by name.

    ``linf`` max |delta|; ``l2`` sqrt(sum delta^2) and ``l1`` sum |delta| over all channels; ``mse`` mean
    delta^2; ``psnr`` 10 log10(1 / MSE) in dB, infinite for delta = 0; ``l0`` share of pixels that change by
    more than 1/510 in some channel.

    Raises:
        ValueError: shapes that differ, or values outside [0, 1].
    """
    before, after = _images(clean, attacked)
    delta = after - before
    mse = delta.square().mean((1, 2, 3))
    return {
        "linf": delta.abs().amax((1, 2, 3)),
        "l2": delta.square().sum((1, 2, 3)).sqrt(),
        "l1": delta.abs().sum((1, 2, 3)),
        "mse": mse,
        "psnr": -10 * torch.log10(mse),  # -log10(0) is the infinity that the definition asks for
        "l0": (delta.abs().amax(1) > 1 / 510).to(torch.float64).mean((1, 2)),
    }


def vector_norms(clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) ``linf``, ``l2``, ``l1`` and ``mse`` of the change of feature vectors (B, V), in float64."""
    if clean.ndim != 2 or clean.shape != attacked.shape:
        raise ValueError(f"vectors must be (B, V) and alike, got {[*clean.shape]} and {[*attacked.shape]}")
    delta = attacked.to(torch.float64) - clean.to(torch.float64)
    square = delta.square()
    return {
        "linf": delta.abs().amax(1),
        "l2": square.sum(1).sqrt(),
        "l1": delta.abs().sum(1),
        "mse": square.mean(1),
    }


def ssim(clean: Tensor, attacked: Tensor) -> Tensor:
    """(B,) structural similarity: 11 x 11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1.

    Per channel, over the positions where the window lies inside the image (at least 11 pixels), then the
    mean.
    """
    before, after = _images(clean, attacked)
    height, width = before.shape[-2:]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM needs at least {_WINDOW} x {_WINDOW} pixels, got {height} x {width}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=before.device) - _WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def smooth(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1)[:, None]
        columns = torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(columns, kernel.view(1, 1, 1, -1)).view(*images.shape[:2], -1)

    mean_before, mean_after = smooth(before), smooth(after)
    variance_before = smooth(before * before) - mean_before.square()
    variance_after = smooth(after * after) - mean_after.square()
    covariance = smooth(before * after) - mean_before * mean_after
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_before * mean_after + c1) / (mean_before.square() + mean_after.square() + c1)
    structure = (2 * covariance + c2) / (variance_before + variance_after + c2)
    return (luminance * structure).mean((1, 2))


def legacy_matrix_norms(clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) "L_inf" and "L_2" of published tables (SAAT, Table VII): MATRIX norms of each channel, averaged.

    ``legacy_matrix_inf`` is the largest absolute row sum and ``legacy_matrix_2`` the spectral norm, 5 to 7
    for a budget of 8/255 at 224 pixels: no pixel norms, and never reported under those names.
    """
    before, after = _images(clean, attacked)
    delta = after - before
    return {
        "legacy_matrix_inf": delta.abs().sum(-1).amax(-1).mean(1),
        # by the largest eigenvalue of delta delta^T: half the time of all singular values
        "legacy_matrix_2": torch.linalg.eigvalsh(delta @ delta.mT)[..., -1].clamp_min(0).sqrt().mean(1),
    }


def _images(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, checked."""
    if clean.ndim != 4 or clean.shape != attacked.shape:
        raise ValueError(f"images must be (B, C, H, W) and alike, got {[*clean.shape]}, {[*attacked.shape]}")
    if len(clean) == 0:
        raise ValueError("there are no images")
    for name, images in (("clean", clean), ("attacked", attacked)):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"{name} images must lie in [0, 1], got {low:g} to {high:g}")
    return clean.to(torch.float64), attacked.to(torch.float64)


def text_measures(clean: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """(B,) of each measure of texts, (B, V) bags or vectors or (B, L) token ids.

    ``changed`` share of entries that differ; ``edits`` their number; ``l1`` sum |delta|; ``largest`` max
    |delta|. Token ids have only the first two: a difference of ids means nothing.
    """
    if clean.shape != attacked.shape or clean.ndim != 2:
        raise ValueError(f"texts must be (B, L) and alike, got {[*clean.shape]} and {[*attacked.shape]}")
    differs = (clean != attacked).to(torch.float64)
    measures = {"changed": differs.mean(1), "edits": differs.sum(1)}
    if not clean.is_floating_point():
        return measures
    delta = (attacked.to(torch.float64) - clean.to(torch.float64)).abs()
    return {**measures, "l1": delta.sum(1), "largest": delta.amax(1)}
