"""Perceptibility against scikit-image and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from robusthash.metrics import distortion as perceptibility


def pair(
    count: int = 3, height: int = 33, width: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(count, 3, height, width, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(clean, 5, 1, 2)
    noise = (torch.rand(clean.shape, generator=generator) - 0.5) * 16 / 255
    return smooth, (smooth + noise).clamp(0, 1)


def test_ssim_and_psnr_agree_with_scikit_image() -> None:
    clean, attacked = pair()
    found = perceptibility.image_measures(clean, attacked)
    for row in range(3):
        left, right = (images[row].permute(1, 2, 0).double().numpy() for images in (clean, attacked))
        expected = structural_similarity(
            left,
            right,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        assert float(found["ssim"][row]) == pytest.approx(expected, abs=1e-9)
        assert float(found["psnr"][row]) == pytest.approx(
            peak_signal_noise_ratio(left, right, data_range=1.0)
        )


def test_an_unchanged_image() -> None:
    clean, _ = pair(1)
    found = perceptibility.image_measures(clean, clean)
    assert {name: float(values[0]) for name, values in found.items()} == {
        "linf": 0, "l2": 0, "l1": 0, "mse": 0, "psnr": math.inf, "l0": 0, "ssim": pytest.approx(1)
    }  # fmt: skip


def test_one_changed_channel_is_one_changed_pixel() -> None:
    clean = torch.full((1, 3, 16, 16), 0.5)
    attacked = clean.clone()
    attacked[0, 1, 2, 3] += 0.1
    attacked[0, 0, 5, 5] += 1 / 600  # below half a grey level
    found = perceptibility.pixel_norms(clean, attacked)
    assert float(found["l0"]) == 1 / 256
    assert float(found["linf"]) == pytest.approx(0.1)
    assert float(found["l2"]) == pytest.approx(math.hypot(0.1, 1 / 600), rel=1e-5)
    assert float(found["l1"]) == pytest.approx(0.1 + 1 / 600, rel=1e-5)


@pytest.mark.parametrize("shape", [(33, 40), (40, 33), (12, 12)])
def test_matrix_norms_have_their_own_names(shape: tuple[int, int]) -> None:
    """Row sums one by one, and singular values, which the code does not compute."""
    clean, attacked = pair(2, *shape)
    found = perceptibility.legacy_matrix_norms(clean, attacked)
    for row, delta in enumerate((attacked.double() - clean.double()).numpy()):
        sums = [max(sum(abs(float(value)) for value in line) for line in channel) for channel in delta]
        assert float(found["legacy_matrix_inf"][row]) == pytest.approx(sum(sums) / 3, rel=1e-12)
        singular = [np.linalg.svd(channel, compute_uv=False)[0] for channel in delta]
        assert float(found["legacy_matrix_2"][row]) == pytest.approx(sum(singular) / 3, rel=1e-9)
    assert float(found["legacy_matrix_inf"][0]) > float(
        perceptibility.pixel_norms(clean, attacked)["linf"][0]
    )


def test_matrix_norms_of_no_change_and_of_one_value() -> None:
    clean = torch.full((1, 3, 16, 16), 0.5)
    same = perceptibility.legacy_matrix_norms(clean, clean)
    assert {name: float(values[0]) for name, values in same.items()} == {
        "legacy_matrix_inf": 0,
        "legacy_matrix_2": 0,
    }
    attacked = clean.clone()
    attacked[0, :, 3, 4] += 0.25  # one entry of each channel: every norm of the matrix is this entry
    one = perceptibility.legacy_matrix_norms(clean, attacked)
    assert [float(values[0]) for values in one.values()] == pytest.approx([0.25, 0.25], rel=1e-12)


def test_bad_images_are_refused() -> None:
    clean, attacked = pair(2, 10, 40)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 40"):
        perceptibility.ssim(clean, attacked)
    assert perceptibility.pixel_norms(clean, attacked)["linf"].shape == (2,)
    with pytest.raises(ValueError, match="alike"):
        perceptibility.pixel_norms(clean, attacked[:1])
    with pytest.raises(ValueError, match=r"attacked images must lie in \[0, 1\], got 0"):
        perceptibility.pixel_norms(clean, attacked + (attacked > attacked.mean()).float())
    with pytest.raises(ValueError, match="clean images must lie"):
        perceptibility.pixel_norms(clean * float("nan"), attacked)


def test_texts() -> None:
    found = perceptibility.text_measures(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 9]]))
    assert {name: values.tolist() for name, values in found.items()} == {"changed": [0.5], "edits": [2]}


def test_changes_of_feature_vectors() -> None:
    clean = torch.zeros(2, 4)
    attacked = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.3, 0.0, -0.4, 0.0]])
    found = perceptibility.vector_norms(clean, attacked)
    assert found["linf"].tolist() == pytest.approx([0, 0.4])
    assert found["l2"].tolist() == pytest.approx([0, 0.5])
    assert found["mse"].tolist() == pytest.approx([0, 0.0625])
    with pytest.raises(ValueError, match=r"vectors must be \(B, V\) and alike"):
        perceptibility.vector_norms(clean, attacked[:1])
