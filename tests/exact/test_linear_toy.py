"""On a linear hash the smallest successful budget is known, |u_k| / ||w_k||_1: attacks must meet it and not
beat it."""

from __future__ import annotations

import pytest
import torch
from helpers import counted, image_batch, linear_hasher
from torch import Tensor

from robusthash.attacks.base import Attack, Guide, Probe
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import Agreement, ScaleFree
from robusthash.attacks.pgd import APGD, PGD, apgd_checkpoints
from robusthash.attacks.threat_model import Ball, Threat, image_threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Guidance

DRAWS = Draws(0)
AWAY = Goal(None, -1)


class Ones(Guide):
    """Guidance: every bit +1."""

    def __call__(
        self, victim: object, batch: object, goal: object, reference: object, draws: object
    ) -> Guidance:
        return Guidance(torch.ones(len(batch), victim.bits))


def toy(bits: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (K, n) and inputs (B, n) far enough inside (0, 1) that no range clips the budgets tried
    here."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(bits, width, generator=generator, dtype=torch.float64)
    x = 0.45 + 0.1 * torch.rand(16, width, generator=generator, dtype=torch.float64)
    return weight, x


def flips(attack: Attack, weight: Tensor, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """(B,) whether the one-bit code of each item was flipped."""
    victim = linear_hasher(weight, gate).double()
    before = victim(image_batch(x).inputs)["image"].logits[:, 0] >= 0
    after = attack(victim, image_batch(x), AWAY, None, draws=DRAWS).signs[:, 0] > 0
    return before != after


def apgd(eps: float, steps: int = 2, norm: str = "linf") -> Attack:
    return Attack("toy", Own(), ScaleFree(), APGD(steps), image_threat(eps, norm))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_bit_flips_exactly_beyond_its_budget(norm: str, gated: bool) -> None:
    weight, x = toy(4, 9)
    x = x[:8]
    gate = (
        torch.randn(9, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64) if gated else None
    )
    seen = weight if gate is None else weight @ gate
    budgets = (x @ seen.T).abs() / seen.norm(p=1 if norm == "linf" else 2, dim=1)
    tried = 0
    for bit in range(4):
        for item in range(len(x)):
            budget = float(budgets[item, bit])
            if not 1e-3 < budget < 0.4:
                continue  # beyond 0.4 the range would clip
            row, one = weight[bit : bit + 1], x[item : item + 1]
            assert flips(apgd(budget * 1.001, norm=norm), row, one, gate).item()
            assert not flips(apgd(budget * 0.999, steps=12, norm=norm), row, one, gate).item()
            tried += 1
    assert tried > 4


def test_equality_gives_zero_which_counts_as_plus_one() -> None:
    weight, x = (
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        torch.tensor([[0.75, 0.5]], dtype=torch.float64),
    )
    assert not flips(apgd(0.125), weight, x).item()  # u = +0.25 reaches exactly 0: still +1
    assert flips(apgd(0.125), -weight, x).item()  # u = -0.25 reaches exactly 0: now +1


def test_apgd_reaches_the_corner_in_two_steps() -> None:
    weight, x = toy(1, 9)
    victim = linear_hasher(weight).double()
    clean = (x @ weight.T).sign()
    # one bit divided by its own size is a constant, so the house loss shows no ascent before the flip; this
    # one does
    out = Attack("toy", Own(), Agreement(), APGD(2), image_threat(0.1))(
        victim, image_batch(x), AWAY, None, draws=DRAWS
    )
    corner = x - 0.1 * clean * weight.sign()
    torch.testing.assert_close(out.inputs["image"].flatten(1), corner)
    assert (out.forward, out.backward) == (2, 2)
    short = Attack("toy", Own(), Agreement(), APGD(2), image_threat(0.1, "l2"))
    found = short(victim, image_batch(x), AWAY, None, draws=DRAWS).inputs["image"].flatten(1)
    torch.testing.assert_close(found, x - 0.1 * clean * weight / weight.norm())


def test_one_sign_step_moves_the_value_by_eps_times_the_l1_norm() -> None:
    """FGSM, which is PGD of one full step from the clean input."""
    weight, x = toy(1, 9)
    victim = linear_hasher(weight).double()
    fgsm = Attack("fgsm", Ones(), Agreement(), PGD(1, 0.1, random_start=False), image_threat(0.1))
    after = fgsm(victim, image_batch(x), AWAY, None, draws=DRAWS).inputs["image"].flatten(1)
    moved = ((after - x) @ weight.T).flatten()
    torch.testing.assert_close(moved, torch.full_like(moved, -0.1 * float(weight.abs().sum())))


@pytest.mark.parametrize(
    "search", [PGD(20, 0.02), APGD(20), APGD(20, random_start=True)], ids=["pgd", "apgd", "random"]
)
def test_many_bits_are_pushed_together(search: object) -> None:
    """The score of a code of many bits is concave enough that more steps never end below the one-step
    corner."""
    weight, x = toy(8, 30)
    victim = linear_hasher(weight / 30).double()
    out = Attack("toy", Ones(), Agreement(), search, image_threat(0.1))(
        victim, image_batch(x), AWAY, None, draws=DRAWS
    )
    change = (out.inputs["image"].flatten(1) - x) @ weight.T
    assert float(change.mean(1).max()) < 0


def test_saturation_does_not_stop_the_scale_free_loss() -> None:
    """u times 1e4: the relaxed code has no gradient left, the house loss finds the same inputs."""
    weight, x = toy(6, 9)
    found = []
    for factor in (1.0, 2.0**13):
        victim = linear_hasher(weight * factor).double()
        found.append(apgd(0.1, steps=10)(victim, image_batch(x), AWAY, None, draws=DRAWS).inputs["image"])
    assert torch.equal(found[0], found[1])


def test_apgd_keeps_its_best_point_per_item() -> None:
    """The score that it returns is the largest on its path, for each item by itself."""
    weight, x = toy(6, 9)
    victim, seen = linear_hasher(weight).double(), []

    class Remember(ScaleFree):
        def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
            value = super().__call__(probe, guidance)
            seen.append(value.detach())
            return value

    threat = image_threat(0.05)
    found = Attack("toy", Own(), Remember(), APGD(30), threat).perturb(
        victim, image_batch(x), AWAY, None, draws=DRAWS
    )
    path = torch.stack(seen)
    assert len(path) == 30
    outputs = victim(found.inputs)
    final = ScaleFree()(Probe(outputs, found.inputs, image_batch(x), AWAY, 1.0, None), found.guidance)
    torch.testing.assert_close(final, path.min(0).values)


def test_counts_of_a_run_on_the_toy() -> None:
    weight, x = toy(2, 5)
    victim = linear_hasher(weight).double()
    attack = Attack("toy", Ones(), Agreement(), PGD(5, 0.01), image_threat(0.1))
    with counted(victim) as calls:
        found = attack.perturb(victim, image_batch(x), AWAY, None, draws=DRAWS)
    assert (calls.forward, calls.backward) == (found.forward, found.backward) == (5, 5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, [0, 22, 41, 57, 70, 80, 87, 93, 99]), (10, [0, 3, 5, 6, 7, 8, 9, 10, 10])],
)
def test_apgd_checkpoints(steps: int, expected: list[int]) -> None:
    assert apgd_checkpoints(steps) == expected


def test_apgd_halves_the_step_where_it_overshoots() -> None:
    """A sharp peak inside the ball: constant steps of 2 eps jump over it, halved steps close in on it."""
    peak, eps = 0.5 + 0.033, 0.1

    def score(inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        value = -(inputs["image"].flatten(1) - peak).abs().sum(1)
        return value, value[:, None]

    batch = image_batch(torch.full((1, 1), 0.5))

    def gap(search: APGD | PGD) -> float:
        found = search(score, batch, Threat({"image": Ball("linf", eps)}), DRAWS, None, None)
        return abs(float(found.inputs["image"].flatten()) - peak)

    assert gap(PGD(100, 2 * eps, random_start=False)) > 0.05
    assert gap(APGD(40)) < 0.002
    assert gap(APGD(100)) < 0.002


def test_restarts_of_a_search_without_random_start_begin_elsewhere() -> None:
    weight, x = toy(2, 5)
    victim = linear_hasher(weight).double()
    starts: list[Tensor] = []
    attack = Attack("toy", Ones(), Agreement(), APGD(4), image_threat(0.1), restarts=3)
    handle = victim.register_forward_pre_hook(
        lambda module, inputs: starts.append(inputs[0]["image"].detach().clone())
    )
    attack.perturb(victim, image_batch(x), AWAY, None, draws=DRAWS)
    handle.remove()
    clean = image_batch(x).inputs["image"]
    assert torch.equal(starts[0], clean)
    # each search looks 4 times, and each comparison of two results twice more
    second, third = starts[4], starts[10]
    assert not torch.equal(second, clean)
    assert not torch.equal(third, clean)
    assert not torch.equal(second, third)
