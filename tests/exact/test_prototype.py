"""THA's prototype net: its loss against the formula, and the two-class case whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import facts_of

from robusthash.attacks.prototype import Prototype, prototype_terms, tha
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Reference


def test_loss_against_the_formula() -> None:
    """Pair by pair, with plain floats."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.tanh(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    codes = torch.where(torch.rand(5, 4, generator=generator) < 0.5, -1.0, 1.0).double()
    wanted = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]]).double()
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 1]]).double()
    near = far = 0.0
    for p, own in zip(prototypes, wanted, strict=True):
        for b, theirs in zip(codes, labels, strict=True):
            s = float(p @ b) / 4
            if float(own @ theirs) > 0:
                near += math.exp(-max(0.0, 2 - s) * s)
            else:
                far += math.exp(max(0.0, 2 + s) * s)
    terms = prototype_terms(prototypes, wanted, codes, labels)
    assert terms["prototype"].item() == pytest.approx((math.log(near) + math.log(far)) / 3, rel=1e-9)
    spread = sum((math.copysign(1, v) - v) ** 2 for v in prototypes.flatten().tolist())
    assert terms["prototype/quantisation"].item() == pytest.approx(1e-4 * spread / 3, rel=1e-9)


def test_a_side_without_pairs_is_left_out() -> None:
    prototypes = torch.full((2, 4), 0.3, requires_grad=True)
    codes, alike = torch.ones(3, 4), torch.ones(3, 1)
    near = prototype_terms(prototypes, torch.ones(2, 1), codes, alike)["prototype"]
    assert near.item() == pytest.approx((math.log(6) - 1.7 * 0.3) / 2, rel=1e-5)
    far = prototype_terms(prototypes, torch.zeros(2, 1), codes, alike)["prototype"]
    assert far.item() == pytest.approx((math.log(6) + 2.3 * 0.3) / 2, rel=1e-5)
    for value in (near, far):
        (grad,) = torch.autograd.grad(value, prototypes)
        assert torch.isfinite(grad).all()
        assert bool((grad != 0).all())


def test_opposite_classes_get_their_own_codes() -> None:
    """Two single-label classes with the codes c and -c: the signs become c and -c."""
    code = torch.where(torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    labels = torch.eye(2).repeat(10, 1)
    codes = torch.where(labels[:, :1] > 0, code, -code)
    victim = type("Victim", (), {"bits": 16, "device": torch.device("cpu")})()
    start = Prototype(hidden=1024, middle=128)
    made = start.fitted(victim, None, Reference({"image": codes}, labels), Draws(0))
    batch = Batch({}, torch.eye(2), torch.arange(2))
    found = made(victim, batch, Goal(torch.eye(2), 1), None, Draws(0)).codes
    assert torch.equal(found, torch.stack([code, -code]))


def test_weights_come_from_the_seed_alone() -> None:
    made = []
    for seed in (0, 0, 1):
        net = Prototype(8, 4)
        before = torch.get_rng_state()
        net.setup(facts_of(torch.eye(5), 12, seed))
        assert torch.equal(before, torch.get_rng_state())
        made.append(net.prototypes(torch.eye(5)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].shape == (5, 12)


def test_unfitted_or_badly_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attack.fit"):
        Prototype().prototypes(torch.eye(2))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Prototype(hidden=0)
    assert tha().search.random_start is False
    assert tha(random_start=True).search.random_start is True
