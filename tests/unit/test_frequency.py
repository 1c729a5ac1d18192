"""Band attributions: they telescope, what a model cannot see gets nothing, and ties count as ties."""

from __future__ import annotations

import pytest
import torch
from helpers import LinearHead, linear_hasher, make_data
from scipy.stats import kendalltau
from torch import Tensor, nn

from robusthash.analysis.band_attribution import BandAttribution, attribute_bands, shapley, tau_b
from robusthash.core.hamming import topk
from robusthash.core.runtime import Draws
from robusthash.evaluation.context import make_context
from robusthash.models import Hasher
from robusthash.models.block_dct import BlockDCT


class SomeBands(nn.Module):
    """An encoder that sees the first n x n coefficients of every 8 x 8 block alone."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.dct = BlockDCT(8)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.dct(x - 0.5)[..., : self.n, : self.n].flatten(1), {}


def seeing(n: int, bits: int = 24) -> Hasher:
    width = 4 * 3 * n * n  # of images of 16 x 16
    weight = torch.randn(bits, width, generator=torch.Generator().manual_seed(1))
    return Hasher({"image": SomeBands(n)}, {"image": LinearHead(weight)})


@pytest.fixture(scope="module")
def data():
    return make_data(size=16, query=5, database=60)


@pytest.mark.parametrize("worth", ["tau", "ap"])
def test_attributions_of_every_image_sum_to_what_the_bands_are_worth(data, worth):
    context = make_context(seeing(8), data)
    found = attribute_bands(context, worth=worth, permutations=4, top=30)
    assert found.values.shape == (5, 8, 8)
    assert torch.allclose(found.values.sum((1, 2)), found.everything - found.none, rtol=0, atol=1e-9)
    assert float((found.everything - found.none).abs().max()) > 0.05
    if worth == "tau":
        assert torch.equal(
            found.everything[found.defined], torch.ones(int(found.defined.sum()), dtype=torch.float64)
        )
    assert torch.allclose(found.mean, found.values[found.defined].mean(0))


@pytest.mark.parametrize("worth", ["tau", "ap"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_band_that_the_model_cannot_see_gets_exactly_nothing(data, n, worth):
    found = attribute_bands(make_context(seeing(n), data), worth=worth, permutations=4, top=30)
    unseen = torch.ones(8, 8, dtype=torch.bool)
    unseen[:n, :n] = False
    assert torch.count_nonzero(found.values[:, unseen]) == 0
    assert torch.count_nonzero(found.errors[:, unseen]) == 0
    assert torch.count_nonzero(found.values[:, ~unseen]) > 0
    if n == 1:  # block means alone: all credit is theirs
        assert torch.allclose(found.values[:, 0, 0], found.everything - found.none, rtol=0, atol=1e-12)


def test_nobody_is_the_image_of_its_own_mean_colour(data):
    context, seen = make_context(seeing(1), data), []
    encoder = context.victim.encoders["image"]
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    attribute_bands(context, permutations=4, top=30)
    nobody = seen[0][:5]  # the first coalition that is asked for, of all five images
    means = data.query.batch(torch.arange(5)).inputs["image"].mean((2, 3), keepdim=True)
    assert torch.allclose(nobody, means.expand_as(nobody), atol=1e-5)


def test_permutations_are_kept_by_seed_and_batches_do_not_matter(data):
    context = make_context(seeing(2), data)
    one = attribute_bands(context, permutations=4, top=30, seed=3)
    assert torch.equal(
        one.values, attribute_bands(context, permutations=4, top=30, seed=3, batch_size=7).values
    )
    other = attribute_bands(context, permutations=4, top=30, seed=4)
    assert not torch.equal(one.values, other.values)
    again = BandAttribution.from_arrays(one.arrays())
    assert torch.equal(again.mean_error, one.mean_error)
    assert (again.worth, again.seed, again.top, again.permutations) == ("tau", 3, 30, 4)


def test_shares_by_order_end_at_one(data):
    share, error = attribute_bands(make_context(seeing(2), data), permutations=4, top=30).by_order()
    assert share[-1] == pytest.approx(1.0)
    assert share[2] == pytest.approx(1.0)  # u + v <= 2 holds all four bands that are seen
    assert 0 < share[0] < 1
    assert error[0] > 0
    assert error[-1] == pytest.approx(0.0, abs=1e-12)


def test_queries_whose_top_is_one_distance_are_left_out_and_refused_where_all_are(data):
    constant = linear_hasher(torch.zeros(8, 3 * 16 * 16))
    with pytest.raises(ValueError, match=r"one distance.*worth 'ap'"):
        attribute_bands(make_context(constant, data), permutations=4)
    context = make_context(seeing(8, bits=6), data)
    _, distances = topk(context.query.packed, context.database.packed, 60)
    varied = {top: distances[:, 0] < distances[:, top - 1] for top in range(2, 60)}
    top = next(top for top, some in varied.items() if 0 < int(some.sum()) < 5)
    found = attribute_bands(context, permutations=4, top=top)
    assert torch.equal(found.defined, varied[top])
    assert torch.count_nonzero(found.values[~found.defined]) == 0


def test_bad_input_is_refused(data):
    context = make_context(seeing(1), data)
    with pytest.raises(ValueError, match="worth must be 'tau' or 'ap', got 'map'"):
        attribute_bands(context, worth="map")
    with pytest.raises(ValueError, match="blocks of 7"):
        attribute_bands(context, block=7)
    with pytest.raises(ValueError, match="permutations must be even"):
        attribute_bands(context, permutations=5, top=30)


def test_tau_b_agrees_with_scipy_under_ties():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 5, (20, 13), generator=generator).float()
    second = torch.randint(0, 4, (20, 13), generator=generator).float()
    expected = [kendalltau(a, b).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert tau_b(first, second).tolist() == pytest.approx(expected, abs=1e-12)
    assert tau_b(first, torch.ones_like(first)).tolist() == [0.0] * 20
    with pytest.raises(ValueError, match="at least 2 items"):
        tau_b(first[:, :1], second[:, :1])


def test_shapley_of_many_coalitions_at_once_is_the_same():
    weight = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def value(mask: Tensor) -> Tensor:
        return (mask.to(torch.float64) @ weight).square()

    one = shapley(value, 6, 8, Draws(1))
    many = shapley(value, 6, 8, Draws(1), many=True)
    assert torch.allclose(one[0], many[0], atol=1e-12)
    assert torch.allclose(one[1], many[1], atol=1e-12)
