"""In float64 a code does not depend on how many items share a batch, for any encoder, with and without a
purifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.data import load_data
from robusthash.data.base import batches
from robusthash.models import Hasher, build_hasher
from robusthash.models.hasher import frozen

GFNET = {"name": "gfnet", "size": 16, "patch": 4, "dim": 8, "depth": 1}
SMALL = {"name": "small", "width": 4, "grid": 1}
ENCODERS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "gfnet": GFNET,
    "sfcl": {"name": "sfcl", "spatial": SMALL, "frequency": GFNET, "width": 12, "hidden": 6},
}


def codes(hasher: Hasher, size: int) -> Tensor:
    found = []
    with frozen(hasher), torch.no_grad():
        for batch in batches(load_data("synthetic", train=8, query=8, database=130).database, size):
            found.append(sign(hasher({"image": batch.inputs["image"].double()})["image"].logits))
    return torch.cat(found)


@pytest.mark.parametrize(
    "purifiers", [None, {"image": "spectral-gate"}, {"image": {"name": "drfgd-image", "width": 4}}], ids=str
)
@pytest.mark.parametrize("name", ENCODERS)
def test_one_at_a_time_or_sixty_four(name: str, purifiers: dict[str, Any] | None) -> None:
    hasher = build_hasher(bits=64, image=ENCODERS[name], purifiers=purifiers).double()
    whole = codes(hasher, 64)
    assert torch.equal(codes(hasher, 1), whole)
    assert len(whole.unique(dim=0)) > 1  # not all items have one code, which would prove nothing
