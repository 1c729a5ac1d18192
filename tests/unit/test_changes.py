"""Everyday changes of images: shapes, ranges, and that each does what its words say."""

from __future__ import annotations

import pytest
import torch

from robusthash.core.runtime import Draws
from robusthash.data.transforms import EVERYDAY, crop, eight_bits, jpeg, noise, shrink


@pytest.fixture
def images() -> torch.Tensor:
    smooth = torch.nn.functional.interpolate(Draws(3).uniform(torch.arange(3), (3, 6, 6)), 40, mode="bicubic")
    return eight_bits(smooth)


@pytest.mark.parametrize("change", EVERYDAY, ids=lambda change: change.name)
def test_a_change_keeps_shape_and_gives_eight_bits(change, images):
    changed = change(images)
    assert changed.shape == images.shape
    assert changed.dtype == images.dtype
    assert changed.min() >= 0
    assert changed.max() <= 1
    torch.testing.assert_close(changed * 255, (changed * 255).round(), atol=1e-3, rtol=0)
    assert not torch.equal(changed, images)


def test_a_change_does_not_depend_on_the_batch(images):
    for change in EVERYDAY:
        torch.testing.assert_close(change(images)[1:2], change(images[1:2]), atol=1 / 255 + 1e-6, rtol=0)


def test_lower_quality_changes_more(images):
    assert (jpeg(images, 10) - images).square().mean() > (jpeg(images, 95) - images).square().mean()


def test_a_crop_moves_the_inside_outwards():
    image = torch.zeros(1, 3, 40, 40)
    image[..., 4:36, 4:36] = 1
    assert image[0, 0, 3, 20] == 0
    assert crop(image, 0.2)[0, 0, 1, 20] > 0.5


def test_shrinking_loses_fine_stripes():
    stripes = (torch.arange(40) % 2).float().expand(1, 3, 40, 40)
    assert shrink(stripes, 0.5)[..., 10:30].std() < 0.1


def test_noise_is_exact_keyed_and_inside_the_budget(images):
    ids = torch.arange(3)
    noisy = noise(images, ids, 8 / 255, Draws(0))
    assert ((noisy - images).abs() <= 8 / 255 + 1e-6).all()
    assert torch.equal(noise(images[1:], ids[1:], 8 / 255, Draws(0)), noisy[1:])


@pytest.mark.parametrize("quality", [0, 101])
def test_impossible_quality(images, quality):
    with pytest.raises(ValueError, match=rf"1\.\.100, got {quality}"):
        jpeg(images, quality)


def test_bytes_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        EVERYDAY[0]((images * 255).to(torch.uint8))
