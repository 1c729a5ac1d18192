"""Certified MAP: no attack of the suite goes below it, on smoothed codes and inside interval bounds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robusthash as rh
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch
from robusthash.data.base import RetrievalData
from robusthash.evaluation import EvaluationContext
from robusthash.models.hasher import Hasher
from robusthash.models.heads import MLPHead
from robusthash.robustness.certificates.certified_map import Certificate
from robusthash.robustness.certificates.interval_tensor import IntervalBounds
from robusthash.training.recipe import Moment
from tests.helpers import jolted, small_hasher, train_config

QUICK: dict[str, Any] = {"samples": 200, "queries": 6}


@functools.cache
def data() -> RetrievalData:
    options = {"query": 12, "train": 48, "database": 60, "size": 16}
    return rh.load_data("synthetic", texts=False, multilabel=False, **options)


@functools.cache
def context() -> EvaluationContext:
    """A small net trained under the noise that its codes are smoothed by."""
    hasher = small_hasher(bits=12)
    recipe = rh.HashingRecipe(hasher, rh.objectives.CSQ(), noise=0.25)
    rh.fit(recipe, data(), train_config(epochs=6))
    return rh.make_context(hasher.eval(), data(), batch_size=64)


@functools.cache
def smoothed() -> Certificate:
    return rh.certify(context(), radii=(0.1, 0.3), sigma=0.25, **QUICK)


def test_no_attack_on_the_smoothed_hasher_goes_below_a_certificate() -> None:
    found = smoothed()
    assert found.attacks == ("guided", "soft-ap")
    for row in found.rows:
        least, reached = (
            torch.tensor(found.per_query[f"{n} {row.radius:g}"]) for n in ("certified", "attacked")
        )
        assert (least <= reached + 1e-9).all()
        assert row.below == 0
        assert row.certified <= row.attacked <= found.clean  # type: ignore[operator]
    near, far = found.rows
    assert far.certified <= near.certified
    assert far.attacked <= near.attacked
    assert near.bits > far.bits
    assert near.certified > 0.1, "or the bound says nothing"


def test_an_attack_far_outside_goes_below_the_certificate_of_a_small_budget() -> None:
    """The check can fail: a large change does what no change inside the radius can."""
    small = smoothed().per_query["certified 0.1"]
    large = rh.certify(context(), radii=(8.0,), sigma=0.25, **QUICK).per_query["attacked 8"]
    assert (torch.tensor(large) < torch.tensor(small) - 1e-9).any()


def test_the_same_numbers_whatever_is_asked_beside() -> None:
    again = rh.certify(context(), radii=(0.3,), sigma=0.25, attacks=None, **QUICK)
    assert again.rows[0].attacked is None
    assert again.per_query["clean"] == smoothed().per_query["clean"]
    assert again.rows[0].certified == smoothed().rows[1].certified


def test_a_radius_that_no_number_of_votes_reaches_is_noted() -> None:
    found = rh.certify(context(), radii=(2.0,), sigma=0.25, attacks=None, **QUICK)
    assert found.rows[0].bits == 0
    assert any("no bit is certified from" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"alpha": 1.0}, "alpha must lie between 0 and 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"radii": (-1.0,)}, "radii must be above 0"),
        ({"radii": ()}, "radii must be above 0"),
        ({"method": "intervals", "radii": (8.0,)}, "write 1/255"),
        ({"method": "proof"}, "method must be one of smoothing, intervals"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_computed(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rh.certify(context(), **options)


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("head", ["tanh", "mlp", "linear", "batchnorm"])
@pytest.mark.parametrize("image", ["small", {"name": "layered", "inner": "small", "widths": [16]}])
def test_interval_bounds_contain_every_change(image: Any, head: str) -> None:
    hasher = jolted(rh.build_hasher(image=image, head=head, bits=6)).eval()
    images, eps = torch.rand(3, 3, 16, 16), 2 / 255
    lower, upper = IntervalBounds(hasher, "image")(images, eps)
    corners = torch.rand(200, *images.shape).round() * 2 - 1
    inside = torch.rand(200, *images.shape) * 2 - 1
    with torch.no_grad():
        for change in (*corners[:100], *inside[:100]):
            logits = hasher({"image": (images + eps * change).clamp(0, 1)})["image"].logits
            assert ((lower - 1e-4 <= logits) & (logits <= upper + 1e-4)).all()


def test_bounds_of_a_linear_net_are_reached() -> None:
    class Flat(nn.Module):
        width = 12

        def forward(self, x: torch.Tensor) -> Any:
            return x.flatten(1), {}

    hasher = Hasher({"image": Flat()}, {"image": MLPHead(12, 4, hidden=5)}).eval()
    hasher.heads["image"].layers = nn.Linear(12, 4)
    images, eps, weight = torch.rand(2, 3, 2, 2) / 2 + 0.25, 0.1, hasher.heads["image"].layers.weight
    lower, _ = IntervalBounds(hasher, "image")(images, eps)
    for bit in range(4):
        worst = images - eps * weight[bit].sign().view(3, 2, 2)
        assert hasher({"image": worst})["image"].logits[:, bit].tolist() == pytest.approx(
            lower[:, bit].tolist(), abs=1e-5
        )


def test_a_layer_without_bounds_is_named() -> None:
    hasher = rh.build_hasher(image="small", head="kernel", bits=6).eval()
    with pytest.raises(ValueError, match=r"heads\.image \(KernelHead\).*by smoothing"):
        IntervalBounds(hasher, "image")(torch.rand(1, 3, 16, 16), 1 / 255)


def test_intervals_certify_a_small_budget_and_no_attack_goes_below() -> None:
    found = rh.certify(context(), "intervals", radii=(1e-5, 1 / 255), queries=8)
    tiny, usual = found.rows
    assert tiny.bits > 6
    assert tiny.certified > 0.1
    assert usual.bits <= tiny.bits
    assert all(row.below == 0 and row.certified <= row.attacked for row in found.rows)  # type: ignore[operator]
    assert found.clean == found.base
    assert found.sigma == 0


# ---------------------------------------------------------------------------------------------- noise


def test_noise_of_training_is_that_of_its_step_and_none_by_default() -> None:
    def weights(**options: Any) -> torch.Tensor:
        hasher = small_hasher(bits=8)
        rh.fit(rh.HashingRecipe(hasher, rh.objectives.CSQ(), **options), data(), train_config(epochs=1))
        return torch.cat([p.detach().flatten() for p in hasher.parameters()])

    assert torch.equal(weights(), weights(noise=0.0))
    assert torch.equal(weights(noise=0.25), weights(noise=0.25))
    assert not torch.equal(weights(), weights(noise=0.25))
    with pytest.raises(ValueError, match="noise must be at least 0"):
        weights(noise=-0.1)


def test_a_stopped_call_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    from robusthash.apps.experiment.certify_run import TensorFolder

    folder, asked = TensorFolder(tmp_path), {**QUICK, "radii": (0.1,), "attacks": "smoke"}
    whole = rh.certify(context(), kept=folder, **asked)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2, "votes, and codes under the attack"
    files[0].unlink()
    assert rh.certify(context(), kept=folder, **asked) == whole
    assert sorted(tmp_path.iterdir()) == files
    assert rh.certify(context(), **asked) == whole, "nothing was kept"


def test_batches_of_one_step_have_noise_of_their_own() -> None:
    recipe = rh.HashingRecipe(small_hasher(), rh.objectives.CSQ(), noise=0.25)
    moment = Moment(0, 0.0, Draws(0))  # progress stands still over accumulated batches
    images = torch.zeros(2, 3, 8, 8)
    one, other = (
        recipe._noisy(Batch({"image": images}, None, torch.tensor(ids)), moment) for ids in ([0, 1], [2, 3])
    )
    assert not torch.equal(one, other)
