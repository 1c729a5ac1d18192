"""Differentiable perceptual hashes: the libraries' bits, gradients of the numbers behind them, and attacks through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robusthash.models.external.loaders import NAMES, perceptual
from robusthash.models.external.smooth_hashes import exact_logits, smooth_numbers

EXTRA = "needs the extra 'audit' (pip install robusthash[audit])"
pytest.importorskip("imagehash", reason=EXTRA)
pytest.importorskip("pdqhash", reason=EXTRA)


def photographs(side: int = 224) -> Tensor:
    """(3, 3, side, side): photographs that come with scikit-image."""
    from skimage import data

    pictures = [
        Image.fromarray(read()).resize((side, side)) for read in (data.astronaut, data.chelsea, data.coffee)
    ]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def bits_of(name: str, images: Tensor) -> Tensor:
    """(B, K) bool by the library itself."""
    known = perceptual(name)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([known.compute(p).astype(bool).reshape(-1) for p in pixels]))


@pytest.mark.parametrize("side", [64, 224, 300])
@pytest.mark.parametrize("name", NAMES)
def test_signs_are_the_bits_of_the_library(name: str, side: int) -> None:
    """All but numbers at their threshold, which rounding inside the library decides."""
    images = photographs(side)
    same = (smooth_numbers(name, images) > 0) == bits_of(name, images)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_exact_logits_have_exactly_these_bits(name: str) -> None:
    images = photographs(64)
    bits = bits_of(name, images)
    assert torch.equal(exact_logits(name, images, bits) >= 0, bits)
    assert torch.equal(exact_logits(name, images, ~bits) >= 0, ~bits)  # whatever the arithmetic says


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    images = photographs(64)[:1].double().requires_grad_(True)
    weights = torch.randn(
        perceptual(name).bits, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = (smooth_numbers(name, images) * weights).sum()
    (slope,) = torch.autograd.grad(value, images)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0
    small = 1e-6

    def moved(by: float) -> Tensor:
        numbers = smooth_numbers(name, images.detach() + by * direction)
        return (numbers * weights).sum()

    assert torch.isclose((moved(small) - moved(-small)) / (2 * small), (slope * direction).sum(), rtol=1e-3)


@pytest.mark.parametrize(("name", "share"), [(name, 0.3 if name == "ahash" else 0.5) for name in NAMES])
def test_a_hash_is_evaded_within_8_of_255(name: str, share: float) -> None:
    """Half of the photographs leave the customary radius after 30 signed steps, as 8-bit images too; of the
    average hash, whose blocks of bright and dark a few levels hardly move, a third."""
    images, eps = photographs(), 8 / 255
    own = bits_of(name, images)
    signs, change = own.float() * 2 - 1, torch.zeros_like(images)
    count = perceptual(name).radius * 3 // 2 + 1  # the bits that are easiest to turn
    for _ in range(30):
        change.requires_grad_(True)
        attacked = (images + change).clamp(0, 1)
        agreement = exact_logits(name, attacked, bits_of(name, attacked)) * signs
        size = agreement.detach().abs().median(1, keepdim=True).values
        easiest = (agreement / size).topk(count, largest=False).values.clamp(min=-0.3)
        (slope,) = torch.autograd.grad(easiest.sum(), change)
        change = (change.detach() - eps / 6 * slope.sign()).clamp(-eps, eps)
    left = ((images + change).clamp(0, 1) * 255).round() / 255
    assert ((left - images).abs() * 255).max() < 8.51
    assert ((bits_of(name, left) != own).sum(1) > perceptual(name).radius).float().mean() >= share


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match="no perceptual hash is called 'phsh'; did you mean 'phash'"):
        smooth_numbers("phsh", photographs(64))


@pytest.mark.parametrize("name", NAMES)
def test_agreement_with_the_own_code_has_a_slope_on_every_photograph(name: str) -> None:
    images = photographs(64).requires_grad_(True)
    bits = bits_of(name, images.detach())
    agreement = (exact_logits(name, images, bits) * (bits.float() * 2 - 1)).mean()
    (slope,) = torch.autograd.grad(agreement, images)
    assert (slope.flatten(1).abs().sum(1) > 1e-3).all()
