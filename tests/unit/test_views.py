"""Views of a victim: values are the victim's bit for bit, gradients are those that the view promises."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import image_batch, jolted, linear_hasher, make_data, small_hasher
from torch import Tensor

from robusthash.attacks.base import Probe
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import GateOpening, OverDraws, RepairMovedLoss, ScaleFree
from robusthash.attacks.threat_model import image_threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Inputs
from robusthash.models import Hasher, build_hasher
from robusthash.models.gates import GateView
from robusthash.models.hasher import frozen
from robusthash.models.purifier import with_gradient_of
from robusthash.models.sfcl import BranchView, MaskNoise, MaskView
from robusthash.models.surrogate_gradients import (
    NoiseAveraged,
    RepairIdentity,
    RepairLearnt,
    RepairMoved,
    repaired,
)

SMALL = {"name": "small", "width": 4, "grid": 1}
X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gated() -> Hasher:
    return jolted(small_hasher(purifiers={"image": "spectral-gate"}))


@pytest.fixture(scope="module")
def masked() -> Hasher:
    return jolted(
        build_hasher(bits=8, image={"name": "sfcl", "spatial": SMALL, "frequency": SMALL, "width": 16})
    )


@pytest.fixture(scope="module")
def repairing() -> Hasher:
    return jolted(small_hasher(purifiers={"image": {"name": "drfgd-image", "width": 4}}), size=0.1)


def looked(hasher: Hasher, x: Tensor = X) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of their sum of squares."""
    leaf = x.clone().requires_grad_(True)
    with frozen(hasher):
        logits = hasher({"image": leaf})["image"].logits
        (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
    return logits.detach(), grad


VIEWS = {
    "frozen": ("gated", GateView("frozen")),
    "minimum": ("gated", GateView("minimum")),
    "one": ("gated", GateView("one")),
    "smooth": ("gated", GateView("smooth")),
    "hard": ("masked", MaskView("hard")),
    "spatial": ("masked", BranchView("spatial")),
    "frequency": ("masked", BranchView("frequency")),
    "noise": ("masked", MaskNoise(4)),
    "identity": ("repairing", RepairIdentity()),
    "gate-identity": ("gated", RepairIdentity()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_values_are_the_victims_and_gradients_are_not(name: str, request: pytest.FixtureRequest) -> None:
    fixture, view = VIEWS[name]
    victim = request.getfixturevalue(fixture)
    seen = view(victim)
    (own, slope), (logits, other) = looked(victim), looked(seen)
    assert torch.equal(logits, own)
    assert float((other - slope).abs().max()) > 1e-3 * float(slope.abs().max())
    assert float(other.abs().max()) > 0
    shared = {id(parameter) for parameter in victim.parameters()}
    assert {id(parameter) for parameter in seen.parameters()} == shared
    assert (seen.bits, seen.modalities, seen.declared) == (victim.bits, victim.modalities, victim.declared)
    with torch.no_grad(), frozen(seen):
        assert torch.equal(seen({"image": X})["image"].logits, own)


def test_the_soft_view_of_a_hard_mask() -> None:
    hard = jolted(
        build_hasher(
            bits=8,
            image={"name": "sfcl", "spatial": SMALL, "frequency": SMALL, "width": 16, "hard_eval": True},
        )
    )
    (own, slope), (logits, other) = looked(hard), looked(MaskView("soft")(hard))
    assert torch.equal(logits, own)
    assert not torch.equal(slope, other)


def test_a_frozen_gate_is_that_of_the_clean_input(gated: Hasher) -> None:
    """Its gradient away from the clean input is that of the net behind constant weights, taken at the clean
    gate."""
    gate = gated.purifiers["image"]
    clean, moved = X, (X + 0.1).clamp(0, 1)
    view = GateView("frozen")(gated).for_block({"image": clean}, Draws(0))
    held = gate.gate(gate.coefficients(clean)).detach()
    leaf = moved.clone().requires_grad_(True)
    with frozen(gated):
        pure, _ = gate.weighed(leaf, lambda z: held)
        logits = gated.bare()({"image": pure})["image"].logits
        own = looked(gated, moved)[0]
        (expected,) = torch.autograd.grad((logits * 2 * own).sum(), leaf)
    found_logits, found = looked(view, moved)
    assert torch.equal(found_logits, own)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(
        found, looked(GateView("frozen")(gated), moved)[1], atol=1e-6
    )  # not told: the gate of x'


def test_gates_open_and_shut(gated: Hasher) -> None:
    """At m = 1 the gradient is the bare net's; at the least gate, that of the net on a darkened image."""
    own = looked(gated)[0]
    for kind, factor in (("one", 1.0), ("minimum", gated.purifiers["image"].m_min)):
        leaf = X.clone().requires_grad_(True)
        with frozen(gated):
            bare = gated.bare()({"image": factor * leaf})["image"].logits
            (expected,) = torch.autograd.grad((bare * 2 * own).sum(), leaf)
        assert torch.allclose(looked(GateView(kind)(gated))[1], expected, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_the_smooth_gate_has_the_slope_of_four_times_the_temperature(gated: Hasher) -> None:
    """The victim's gradient with m as it is, and dm/dx of the gate that is four times softer."""
    gate, own = gated.purifiers["image"], looked(gated)[0]
    leaf = X.clone().requires_grad_(True)
    with frozen(gated):
        soft = copy.copy(gate)
        soft.tau = 4.0
        pure, _ = gate.weighed(leaf, lambda z: gate.gate(z).detach() + soft.gate(z) - soft.gate(z).detach())
        logits = gated.bare()({"image": pure})["image"].logits
        (expected,) = torch.autograd.grad((logits * 2 * own).sum(), leaf)
    assert torch.allclose(looked(GateView("smooth")(gated))[1], expected, rtol=1e-3, atol=1e-3)


def test_branches_add_up(masked: Hasher) -> None:
    """Each sees what the other takes for constant, so the two gradients sum to the whole."""
    both = [looked(BranchView(branch)(masked))[1] for branch in ("spatial", "frequency")]
    assert torch.allclose(sum(both), looked(masked)[1], rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_mask_noise_is_that_of_training_and_codes_are_without_it(masked: Hasher) -> None:
    view = MaskNoise(16)(masked).for_block({}, Draws(1))
    with frozen(view), torch.no_grad():
        output = view({"image": X})["image"]
    draws = output.aux["draws"]
    assert draws.shape == (16, 4, 8)
    assert float(draws.std(0).min()) > 0
    assert torch.equal(output.logits, looked(masked)[0])
    assert view.passes == (33, 16)


def test_a_loss_over_draws_is_the_mean_over_looks(masked: Hasher) -> None:
    batch, goal = image_batch(torch.rand(4, 8)), Goal(None, -1)
    view = MaskNoise(3)(masked).for_block({}, Draws(1))
    guidance = Own()(masked, replace(batch, inputs={"image": X}), goal, None, Draws(0))
    with frozen(view):
        outputs = view({"image": X})
        probe = Probe(outputs, {"image": X}, batch, goal, 1.0, None)
        value = OverDraws()(probe, guidance)
        each = [
            ScaleFree()(replace(probe, outputs={"image": replace(outputs["image"], logits=logits)}), guidance)
            for logits in outputs["image"].aux["draws"]
        ]
    assert torch.allclose(value, torch.stack(each).mean(0))
    with pytest.raises(ValueError, match="NoiseAveraged or MaskNoise"):
        OverDraws()(Probe(masked({"image": X}), {"image": X}, batch, goal, 1.0, None), guidance)


@pytest.mark.parametrize("sign", [-1, 1])
def test_gate_opening_rewards_an_open_gate_whatever_the_goal(gated: Hasher, sign: int) -> None:
    batch, goal = image_batch(torch.rand(4, 8)), Goal(None, sign)
    with torch.no_grad():
        outputs = gated({"image": X})
        guidance = Own()(gated, replace(batch, inputs={"image": X}), goal, None, Draws(0))
        probe = Probe(outputs, {"image": X}, batch, goal, 1.0, None)
        plain, opened = ScaleFree()(probe, guidance), GateOpening(2.0)(probe, guidance)
        low = GateOpening(1.0, ("low",))(probe, guidance)
    gate = outputs["image"].aux["gate"]
    assert torch.allclose(sign * (opened - plain), 2.0 * gate.flatten(1).mean(1), atol=1e-6)
    order = torch.arange(8)
    kept = (order[:, None] + order) <= 4
    assert torch.allclose(sign * (low - plain), gate[..., kept].flatten(1).mean(1), atol=1e-6)
    with pytest.raises(ValueError, match="shows a gate"):
        GateOpening()(Probe(gated.bare()({"image": X}), {"image": X}, batch, goal, 1.0, None), guidance)
    with pytest.raises(ValueError, match="bands must be some of"):
        GateOpening(1.0, ())


@pytest.mark.parametrize("gradient", ["own", "identity"])
def test_how_far_a_repair_moved(repairing: Hasher, gradient: str) -> None:
    view = RepairMoved(gradient)(repairing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown before for_block"):
        view({"image": X})
    view = view.for_block({"image": X}, Draws(0))
    moved = (X + 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    leaf = moved.clone().requires_grad_(True)
    with frozen(view):
        outputs = view({"image": leaf})
        value = RepairMovedLoss()(
            Probe(outputs, {}, image_batch(torch.rand(4, 8)), Goal(None, -1), 1.0, None), None
        )  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(-value.sum(), leaf)
    with torch.no_grad():
        pure = {n: repaired(repairing, {"image": v})["image"] for n, v in (("clean", X), ("moved", moved))}
    difference = pure["moved"] - pure["clean"]
    assert torch.allclose(-value.detach(), difference.square().flatten(1).sum(1), rtol=1e-4)
    assert torch.allclose(grad, 2 * difference, atol=1e-6) == (gradient == "identity")
    assert torch.equal(outputs["image"].logits.detach(), looked(repairing, moved)[0])


def test_a_learnt_proxy_imitates_its_purifier(repairing: Hasher) -> None:
    """Its values are the purifier's; it is nearer to what the purifier does than the identity is, and
    keyed."""
    data, threat = make_data(size=16), image_threat(8 / 255)

    def near(inputs: Inputs, ids: Tensor, draws: Draws) -> Inputs:
        return threat.random_start(inputs, ids, draws)

    view = RepairLearnt(steps=40)
    with pytest.raises(ValueError, match="not learned yet"):
        view(repairing)
    fitted = [view.fitted(repairing, data.train, ("image",), near, Draws(3)) for _ in range(2)]
    own, logits = looked(repairing)[0], looked(fitted[0](repairing))[0]
    assert torch.equal(own, logits)
    fresh = data.query.batch(torch.arange(12)).inputs["image"]
    net = fitted[0].nets["image"]  # type: ignore[index]
    wanted = repaired(repairing, {"image": fresh})["image"]
    assert float((net(fresh) - wanted).square().mean()) < 0.8 * float((fresh - wanted).square().mean())
    again = fitted[1].nets["image"].state_dict()  # type: ignore[index]
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
    assert repr(fitted[0]) == repr(view)


def test_refusals(gated: Hasher, masked: Hasher) -> None:
    plain = small_hasher()
    with pytest.raises(ValueError, match="spectral-gate"):
        GateView("one")(plain)
    with pytest.raises(ValueError, match="image encoder 'sfcl'"):
        MaskView("hard")(plain)
    with pytest.raises(ValueError, match="needs a purifier"):
        RepairIdentity()(plain)
    with pytest.raises(ValueError, match="needs a victim with one"):
        RepairMoved()(plain)
    with pytest.raises(ValueError, match="branch must be one of spatial, frequency"):
        BranchView("both")
    with pytest.raises(ValueError, match="at least 1 draw"):
        NoiseAveraged(0)
    with pytest.raises(ValueError, match="steps and width"):
        RepairLearnt(0)
    with pytest.raises(ValueError, match="cannot take the gradient"):
        with_gradient_of(torch.ones(2), torch.ones(3))
    assert NoiseAveraged(2)(linear_hasher(torch.ones(2, 3))).passes == (4, 2)
