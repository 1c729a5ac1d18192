"""GFNet's global filter against what it is defined as, and its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robusthash.models import build_hasher
from robusthash.models.gfnet import GFNet, GlobalFilter, gfnet


def tokens(n: int, dim: int = 3, items: int = 2) -> Tensor:
    return torch.randn(items, n * n, dim, generator=torch.Generator().manual_seed(n))


def identity(n: int, dim: int = 3) -> GlobalFilter:
    """W = 1 + 0j everywhere."""
    made = GlobalFilter(n, dim)
    with torch.no_grad():
        made.complex_weight.copy_(torch.tensor([1.0, 0.0]).expand_as(made.complex_weight))
    return made.requires_grad_(False)


@pytest.mark.parametrize("n", [7, 8])
def test_a_filter_is_the_circular_convolution_with_its_kernel(n: int) -> None:
    torch.manual_seed(0)
    made = GlobalFilter(n, 3)
    nn.init.normal_(made.complex_weight)
    x = tokens(n)
    weight = torch.view_as_complex(made.complex_weight.detach())
    kernel = torch.fft.irfft2(weight, s=(n, n), dim=(0, 1))  # (n, n, C)
    grid = x.unflatten(1, (n, n))
    expected = torch.zeros_like(grid)
    for a in range(n):
        for b in range(n):
            for c in range(n):
                for d in range(n):
                    expected[:, a, b] += grid[:, c, d] * kernel[(a - c) % n, (b - d) % n]
    torch.testing.assert_close(made(x), expected.flatten(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [3, 8, 13, 14])
def test_a_filter_of_ones_is_the_identity(n: int) -> None:
    assert float((identity(n)(tokens(n)) - tokens(n)).abs().max()) < 1e-5


@pytest.mark.parametrize("n", [7, 8])
def test_shifted_tokens_give_shifted_output(n: int) -> None:
    torch.manual_seed(1)
    made = GlobalFilter(n, 3)

    def shifted(x: Tensor) -> Tensor:
        return x.unflatten(1, (n, n)).roll((2, -3), (1, 2)).flatten(1, 2)

    torch.testing.assert_close(made(shifted(tokens(n))), shifted(made(tokens(n))))


@pytest.mark.parametrize(("n", "single"), [(7, 1), (8, 2)])
def test_parseval_with_interior_columns_counted_twice(n: int, single: int) -> None:
    """The half spectrum stands for the whole: all columns but the self-conjugate ones count twice."""
    x = tokens(n).unflatten(1, (n, n))
    power = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").abs().square()
    twice = torch.full((n // 2 + 1,), 2.0)
    twice[0] = 1.0
    if single == 2:
        twice[-1] = 1.0
    assert float((power * twice[:, None]).sum()) == pytest.approx(float(x.square().sum()), rel=1e-5)
    made = identity(n)
    with torch.no_grad():
        made.complex_weight *= 2.0
    assert float(made(tokens(n)).norm()) == pytest.approx(2.0 * float(tokens(n).norm()), rel=1e-5)


def test_the_body_of_gfnet_ti() -> None:
    encoder = gfnet().eval()
    with torch.no_grad():
        features, shown = encoder(torch.rand(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 7_254_784
    assert encoder.trunk.blocks[0].filter.complex_weight.shape == (14, 8, 256, 2)
    assert features.shape == (1, 256) == (1, encoder.width)
    assert shown == {}


def test_one_residual_around_the_whole_chain() -> None:
    torch.manual_seed(0)
    block = GFNet(16, 4, 8, 1, 4, 0.0).blocks[0]
    x = tokens(4, 8)
    inside = block.mlp(block.norm2(block.filter(block.norm1(x))))
    torch.testing.assert_close(block(x), x + inside)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
    assert torch.equal(block(x), x)


def test_parts_of_a_weight_stay_together_in_channels_last() -> None:
    """A hasher is made channels-last, which strides 4-d weights; the filter must say the same."""
    hasher = build_hasher(
        bits=4, image={"name": "gfnet", "size": 16, "patch": 4, "dim": 8, "depth": 1}
    ).eval()
    encoder = hasher.encoders["image"]
    bare = gfnet(size=16, patch=4, dim=8, depth=1).eval()
    bare.load_state_dict(encoder.state_dict())
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(x)[0], bare(x)[0])
