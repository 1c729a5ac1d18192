"""Purifiers before encoders: what attacks see, which side is purified, and how a run keeps them."""

from __future__ import annotations

import pytest
import torch
from helpers import Flat, LinearHead, make_data, small_hasher, trained_hasher
from torch import Tensor, nn

from robusthash.core.registry import catalogue, register
from robusthash.evaluation import make_context
from robusthash.models import Hasher, Purifier, build_hasher, encode_split, purified
from robusthash.models.purifier import Encode


class Halve(Purifier):
    """x -> x / 2, with a learned factor, showing what it did; it may look at the hasher's own answer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.asked = 0

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked = encode(x).logits.shape[1]
        return self.factor * x, {"factor": self.factor.detach()}


def linear(sides: str = "both") -> Hasher:
    weight = torch.tensor([[1.0, -1.0, 2.0], [0.5, 0.5, -1.0]])
    return Hasher(
        {"image": Flat()}, {"image": LinearHead(weight)}, {}, purifiers={"image": Halve()}, sides=sides
    )


X = torch.tensor([[0.2, 0.4, 0.6], [0.9, 0.1, 0.3]])[:, None, None]


def test_the_encoder_sees_what_the_purifier_returns() -> None:
    hasher = linear()
    output = hasher({"image": X})["image"]
    assert torch.allclose(output.logits, hasher.bare()({"image": X / 2})["image"].logits)
    assert float(output.aux["factor"]) == 0.5
    assert hasher.purifiers["image"].asked == 2
    assert "factor" not in hasher.bare()({"image": X})["image"].aux


def test_sides() -> None:
    assert linear("both").for_database().purifiers
    assert not linear("query").for_database().purifiers
    plain = Hasher({"image": Flat()}, {"image": LinearHead(torch.ones(2, 3))})
    assert plain.for_database() is plain
    assert plain.bare() is plain


def test_the_database_side_reaches_the_bench() -> None:
    """With ``sides="query"`` the database is encoded without the purifier."""
    data = make_data()
    base = trained_hasher(data)

    class Invert(Purifier):
        def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
            return 1 - x, {}

    def context(sides: str):
        return make_context(
            Hasher(dict(base.encoders), dict(base.heads), {}, purifiers={"image": Invert()}, sides=sides),
            data,
        )

    bare = encode_split(base, data.database)["image"].packed
    assert torch.equal(context("query").database.packed, bare)
    assert not torch.equal(context("both").database.packed, bare)
    assert torch.equal(context("both").query.packed, context("query").query.packed)


@pytest.mark.parametrize(("view", "slope"), [("white-box", 0.5), ("identity", 1.0), ("oblivious", 1.0)])
def test_views(view: str, slope: float) -> None:
    """White box differentiates the purifier; the identity keeps its values and overlooks its slope."""
    hasher, x = linear(), X.clone().requires_grad_(True)
    seen = hasher.as_seen_from(view)  # type: ignore[arg-type]
    logits = seen({"image": x})["image"].logits
    inside = X if view == "oblivious" else X / 2
    assert torch.allclose(logits, hasher.bare()({"image": inside})["image"].logits)
    (grad,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert torch.allclose(grad.flatten(1), slope * torch.tensor([1.0, -1.0, 2.0]).expand(2, 3))


def test_views_need_a_purifier() -> None:
    plain = Hasher({"image": Flat()}, {"image": LinearHead(torch.ones(2, 3))})
    assert plain.as_seen_from("white-box") is plain
    with pytest.raises(ValueError, match="oblivious attack needs a purifier"):
        plain.as_seen_from("oblivious")


def test_a_purifier_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'text', which this hasher does not encode"):
        Hasher({"image": Flat()}, {"image": LinearHead(torch.ones(2, 3))}, purifiers={"text": Halve()})


@pytest.mark.parametrize(
    ("modality", "name", "said"),
    [
        ("text", "tpap-image", "tpap-image is for images; for texts take tpap-text"),
        ("image", "drfgd-text", "drfgd-text is for texts; for images take drfgd-image"),
        ("text", "spectral-gate", "spectral-gate is for images; leave it out for texts"),
    ],
)
def test_a_purifier_of_the_other_modality_is_refused(modality: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_hasher(bits=8, text="mlp", vocabulary=4, purifiers={modality: {"name": name}})


def test_purified_keeps_the_hasher_and_says_so() -> None:
    hasher = small_hasher()
    if "test-halve" not in [card.name for card in catalogue("purifier")]:
        register("purifier", "test-halve")(Halve)
    whole = purified(hasher, {"image": "test-halve"}, "query")
    assert whole.encoders["image"] is hasher.encoders["image"]
    assert whole.spec["purifiers"] == {"image": "test-halve"}
    assert whole.spec["sides"] == whole.sides == "query"
    again = build_hasher(**whole.spec, seed=1)
    again.load_state_dict(whole.state_dict())
    image = torch.rand(2, 3, 12, 12)
    assert torch.equal(
        again.eval()({"image": image})["image"].logits, whole.eval()({"image": image})["image"].logits
    )
