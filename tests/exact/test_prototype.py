"""THA's prototype net: its loss against the formula, and the two-class case whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import facts_of

from robusthash.attacks.tha import Prototype, prototype_terms, tha
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


def several(items: int = 40) -> tuple[object, Reference]:
    """A victim of 12 bits in name, and codes of four overlapping label sets, each about a code of its own."""
    generator = torch.Generator().manual_seed(3)
    sets = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [0, 1.0, 1.0]])
    own = torch.where(torch.rand(4, 12, generator=generator) < 0.5, -1.0, 1.0)
    row = torch.arange(items) % 4
    flipped = torch.rand(items, 12, generator=generator) < 0.1
    victim = type("Victim", (), {"bits": 12, "device": torch.device("cpu")})()
    return victim, Reference({"image": torch.where(flipped, -own[row], own[row])}, sets[row])


def test_the_fit_ends_where_the_codes_rest_and_is_the_same_each_time() -> None:
    victim, reference = several()
    start = Prototype(hidden=64, middle=16)
    made, again = (start.fitted(victim, None, reference, Draws(0)) for _ in range(2))
    assert made.fit_steps == again.fit_steps
    assert made.fit_steps % Prototype.EVERY == 0
    assert Prototype.EVERY <= made.fit_steps < Prototype.MOST
    sets = torch.unique(reference.labels, dim=0)
    assert torch.equal(made.prototypes(sets), again.prototypes(sets))
    assert start.fit_steps == 0  # of an attack that is not fitted


def test_an_asked_for_number_of_steps_is_taken() -> None:
    victim, reference = several()
    assert Prototype(16, 8, steps=7).fitted(victim, None, reference, Draws(0)).fit_steps == 7


def test_codes_that_never_rest_are_fitted_as_long_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks see other codes each time, and once so few changed ones that the rate falls."""
    victim, reference = several()
    looks = iter(
        [0, 24, 0, 24, 25, 49, 25, 49, 25]
    )  # of 48 bits, where the border is moved to 2: how many are +1

    def codes(self: Prototype, sets: torch.Tensor) -> torch.Tensor:
        flat = -torch.ones(sets.numel() // sets.shape[1] * 12)
        flat[: next(looks)] = 1.0
        return flat

    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, closure: object = None) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(Prototype, "_codes", codes)
    monkeypatch.setattr(Prototype, "EVERY", 2)
    monkeypatch.setattr(Prototype, "MOST", 13)
    monkeypatch.setattr(Prototype, "SETTLED", 0.03)
    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    made = Prototype(16, 8).fitted(victim, None, reference, Draws(0))
    assert made.fit_steps == 13
    assert rates == pytest.approx(
        [1e-4] * 8 + [1e-5] * 5
    )  # one of 48 bits differs at the fifth look, of step 8


def test_the_settings_of_a_line_tell_fits_apart() -> None:
    names = {repr(guide) for guide in (Prototype(), Prototype(steps=300), Prototype(64), Prototype(64, 8))}
    assert len(names) == 4
    assert repr(tha().guide) == "Prototype(hidden=4096, middle=512, steps=until settled)"
