"""GFNet as an encoder: sizes, precision, training, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robusthash.models import build_hasher
from robusthash.models.gfnet import GlobalFilter, gfnet

TINY: dict[str, Any] = {"size": 16, "patch": 4, "dim": 8, "depth": 2}


@pytest.mark.parametrize("side", [12, 20, 32])
def test_another_size_is_refused_by_name(side: int) -> None:
    with pytest.raises(ValueError, match=rf"16 x 16 px, and these have {side} x {side}"):
        gfnet(**TINY)(torch.rand(1, 3, side, side))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch": 5}, "does not divide images of 16 px"),
        ({"patch": 32}, "does not divide"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"depth": 0}, "at least 1 block"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_bad_options(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gfnet(**{**TINY, **changed})


def test_gradients_reach_every_pixel_and_parameter() -> None:
    hasher = build_hasher(bits=4, image={"name": "gfnet", **TINY})
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    hasher({"image": x})["image"].logits.square().sum().backward()
    assert x.grad is not None
    assert float((x.grad != 0).float().mean()) > 0.99
    assert all(float(p.grad.abs().sum()) > 0 for p in hasher.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in hasher.parameters())


def test_the_transform_keeps_float32_under_autocast_and_float64() -> None:
    torch.manual_seed(0)
    made = GlobalFilter(4, 8)
    x = torch.randn(2, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(x), made(x.clone()))
        half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, made(x.bfloat16().float()).bfloat16())
    double = made.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(made.float()(x).double(), double, atol=1e-6, rtol=1e-5)


def test_drop_path_drops_items_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = gfnet(**{**TINY, "dim": 4}, drop_path=0.5)
    block = encoder.trunk.blocks[1]
    x = torch.randn(64, 16, 4)
    change = block.train()(x) - x
    dropped = (change == 0).flatten(1).all(1)
    assert 15 < int(dropped.sum()) < 49
    kept = block.eval()(x) - x
    torch.testing.assert_close(change[~dropped], 2.0 * kept[~dropped], atol=1e-5, rtol=1e-4)


def test_weights_of_the_authors_form(tmp_path: Path) -> None:
    source = gfnet(**TINY)
    path = tmp_path / "gfnet.pth"
    state = {**source.trunk.state_dict(), "head.weight": torch.zeros(10, 8), "head.bias": torch.zeros(10)}
    torch.save({"model": state}, path)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(gfnet(**TINY, weights=str(path)).eval()(x)[0], source.eval()(x)[0])
    with pytest.raises(ValueError, match="size, patch, dim, depth and ratio must fit"):
        gfnet(**{**TINY, "dim": 12}, weights=str(path))
