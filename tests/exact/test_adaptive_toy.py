"""Defenses that hide their gradient, before a linear hash whose smallest successful budget is known."""

from __future__ import annotations

import pytest
import torch
from helpers import Flat, LinearHead, image_batch
from torch import Tensor, nn

from robusthash.attacks.base import Attack
from robusthash.attacks.frequency_bands import BandBall, Banded, band_mask
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import Agreement, OverDraws, ScaleFree
from robusthash.attacks.pgd import APGD, PGD
from robusthash.attacks.threat_model import Threat, image_threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal
from robusthash.models import Hasher, Purifier
from robusthash.models.block_dct import BlockDCT
from robusthash.models.gates import GateView, SpectralGate
from robusthash.models.purifier import Encode
from robusthash.models.surrogate_gradients import NoiseAveraged, RepairIdentity

DRAWS, AWAY, LEVELS = Draws(0), Goal(None, -1), 4096.0


class Rounding(Purifier):
    """Grey levels: the gradient is 0 everywhere."""

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.round(x * LEVELS) / LEVELS, {}


class Aside(Purifier):
    """Halves its input outside the graph."""

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            return 0.5 * x, {}


def behind(purifier: Purifier, weight: Tensor) -> Hasher:
    return Hasher(
        {"image": Flat()}, {"image": LinearHead(weight)}, {}, "purifier", {"image": purifier}
    ).double()


def on_grid(bits: int = 4, width: int = 9, items: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(bits, width, generator=generator, dtype=torch.float64)
    x = 0.45 + 0.1 * torch.rand(items, width, generator=generator, dtype=torch.float64)
    return weight, torch.round(x * LEVELS) / LEVELS


def flipped(victim: Hasher, seen: Hasher, x: Tensor, eps: float, steps: int = 2) -> bool:
    """Whether APGD on the view flips the victim's one bit of its one item."""
    attack = Attack("toy", Own(), ScaleFree(), APGD(steps), image_threat(eps))
    found = attack(seen, image_batch(x), AWAY, None, draws=DRAWS).inputs
    with torch.no_grad():
        before, after = (victim(inputs)["image"].logits >= 0 for inputs in (image_batch(x).inputs, found))
    return bool((before != after).all())


def test_identity_reaches_the_closed_form_where_plain_apgd_finds_nothing() -> None:
    weight, x = on_grid()
    budgets = (x @ weight.T).abs() / weight.abs().sum(1)
    tried = 0
    for bit in range(len(weight)):
        victim = behind(Rounding(), weight[bit : bit + 1])
        seen = RepairIdentity()(victim)
        for item in range(len(x)):
            budget = float(budgets[item, bit])
            if not 1e-3 < budget < 0.4:
                continue
            below, above = int(budget * LEVELS) / LEVELS, int(budget * LEVELS + 1) / LEVELS
            one = x[item : item + 1]
            assert flipped(victim, seen, one, above)
            assert not flipped(victim, seen, one, below - 1 / LEVELS, steps=4)
            assert not flipped(victim, victim, one, 0.4)
            tried += 1
    assert tried > 4


def test_identity_beats_a_purifier_under_no_grad() -> None:
    weight, x = on_grid(1)
    victim = behind(Aside(), weight)
    budget = float(((x @ weight.T).abs() / weight.abs().sum(1)).max())
    for item in range(len(x)):
        assert flipped(victim, RepairIdentity()(victim), x[item : item + 1], budget * 1.001)
    with pytest.raises(ValueError, match="no gradient reaches the image of this victim"):
        flipped(victim, victim, x[:1], budget * 1.001)


class FixedGate(SpectralGate):
    """A gate of one set of weights for all images: P is a matrix."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__("global", block=len(weights))
        with torch.no_grad():
            self.logits.bias.copy_(weights)


def gated(weight: Tensor) -> tuple[Hasher, Tensor]:
    """A hasher of one bit behind a fixed gate on one 4 x 4 block of three channels, and its P^T w."""
    torch.manual_seed(0)
    gate = FixedGate(4.0 * torch.randn(4, 4))
    victim = Hasher({"image": Flat()}, {"image": LinearHead(weight)}, {}, "gate", {"image": gate}).double()
    x = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    (through,) = torch.autograd.grad(victim({"image": x})["image"].logits.sum(), x)
    return victim, through.flatten()


@pytest.mark.parametrize("kind", ["frozen", "smooth"])
def test_a_fixed_gate_has_the_threshold_of_its_transpose(kind: str) -> None:
    weight = torch.randn(1, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    victim, through = gated(weight)
    seen = GateView(kind)(victim)  # type: ignore[arg-type]
    generator, tried = torch.Generator().manual_seed(4), 0
    for _ in range(6):
        x = 0.4 + 0.2 * torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64)
        budget = float((x.flatten() @ through).abs() / through.abs().sum())
        if not 1e-3 < budget < 0.35:
            continue
        batch = Batch({"image": x}, None, torch.arange(1))

        def flips(view: Hasher, eps: float, batch: Batch = batch) -> bool:
            attack = Attack("toy", Own(), ScaleFree(), APGD(2), image_threat(eps))
            found = attack(view, batch, AWAY, None, draws=DRAWS).inputs
            codes = [victim(inputs)["image"].logits >= 0 for inputs in (batch.inputs, found)]
            return bool((codes[0] != codes[1]).all())

        assert flips(seen, budget * 1.001)
        assert not flips(seen, budget * 0.999)
        assert not flips(GateView("one")(victim), budget * 1.001)  # the signs of w are not those of P^T w
        tried += 1
    assert tried > 2


class Sketchy(Purifier):
    """Zeroes seven eighths of the inputs at random at each call, and scales what is left."""

    declares = "randomised"

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return 8.0 * x * (torch.rand_like(x) < 0.125), {}


def test_averaging_over_noise_finds_what_one_draw_misses() -> None:
    """One step: a single draw moves only what it saw, the mean over 30 draws moves everything."""
    weight = torch.randn(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = torch.full((2, 40), 0.5, dtype=torch.float64)
    victim = behind(Sketchy(), weight)
    sign = float((x[0] @ weight[0]).sign())

    def left(looks: int) -> float:
        """The part of the corner's effect that is missing in the mean logit."""
        attack = Attack(
            "toy", Own(), OverDraws(Agreement()), PGD(1, 0.1, random_start=False), image_threat(0.1)
        )
        seen = NoiseAveraged(looks)(victim).for_block({}, Draws(7))
        found = attack(seen, image_batch(x), Goal(None, -1), None, draws=DRAWS).inputs["image"].flatten(1)
        moved = sign * ((found - x) @ weight[0])
        return float(1 + (moved / (0.1 * weight.abs().sum())).mean())

    assert left(1) > 0.5
    assert left(30) < 0.2


def test_noise_is_keyed_and_leaves_the_global_streams_alone() -> None:
    weight, x = on_grid()
    victim = behind(Sketchy(), weight)
    logits = []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        view = NoiseAveraged(3)(victim).for_block({}, Draws(seed))
        first, second = (view(image_batch(x).inputs)["image"].logits for _ in range(2))
        assert not torch.equal(first, second)  # new noise at every call
        assert torch.equal(torch.get_rng_state(), before)
        logits.append(first)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_gradient_of_the_mean_loss_is_the_mean_of_gradients() -> None:
    """Looks are computed again on the way back: with the same noise, or the gradient would be that of
    others."""
    weight, x = on_grid(2)
    view = NoiseAveraged(5)(behind(Sketchy(), weight)).for_block({}, Draws(3))
    leaf = image_batch(x).inputs["image"].requires_grad_(True)
    shown = view({"image": leaf})["image"].aux["draws"]
    (grad,) = torch.autograd.grad(shown.sum(), leaf)
    seen = grad != 0  # coordinates that some look saw: each look's value is 8 w . x there, else 0
    value = (grad * leaf.detach()).flatten(1).sum(1).float()
    assert torch.allclose(value, shown.sum((0, 2)).detach(), atol=1e-4)  # linear: <grad, x> is the value
    assert 0.3 < float(seen.float().mean()) < 0.7


class Blocks(nn.Module):
    """Images of 16 x 16 as they are."""

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return values.flatten(1), {}


@pytest.mark.parametrize("search", [PGD(5, 0.004, random_start=True), APGD(6)], ids=["pgd", "apgd"])
@pytest.mark.parametrize("band", ["low", "mid", "high"])
def test_a_banded_attack_changes_nothing_outside_its_band(band: str, search: PGD | APGD) -> None:
    """Where nothing is clipped, coefficients of other bands stay as they were; in any case the ball is
    kept."""
    weight = torch.randn(6, 3 * 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    victim = Hasher({"image": Blocks()}, {"image": LinearHead(weight)}).double()
    x = 0.3 + 0.4 * torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = Batch({"image": x}, None, torch.arange(3))
    ball = BandBall("linf", 0.2, band=band)  # type: ignore[arg-type]
    free = ball.steepest(torch.randn(3, 3, 16, 16, dtype=torch.float64))
    dct, outside = BlockDCT(8).double(), ~band_mask(band)  # type: ignore[arg-type]
    assert float(dct(free)[..., outside].abs().max()) < 1e-6
    assert float(dct(free)[..., ~outside].abs().max()) > 0.1

    attack = Attack("toy", Own(), ScaleFree(), Banded(search, band), image_threat(0.03))  # type: ignore[arg-type]
    out = attack(victim, batch, AWAY, None, draws=DRAWS)
    delta = out.inputs["image"] - x
    image_threat(0.03).verify(out.inputs, batch.inputs)
    assert float(delta.abs().max()) > 0.01
    energy = dct(delta).square()
    assert float(energy[..., outside].sum() / energy.sum()) < 0.25  # what clipping spills
    if isinstance(search, PGD):
        small = PGD(5, 0.002, random_start=False)  # five steps of at most 0.004 a pixel never meet this ball
        wide = Attack("toy", Own(), ScaleFree(), Banded(small, band), image_threat(0.1))  # type: ignore[arg-type]
        moved = wide(victim, batch, AWAY, None, draws=DRAWS).inputs["image"] - x
        assert float(dct(moved)[..., outside].abs().max()) < 1e-6
        assert float(moved.abs().max()) > 0.005


def test_bands_share_the_frequencies_out() -> None:
    masks = torch.stack([band_mask(band) for band in ("low", "mid", "high")])  # type: ignore[arg-type]
    assert masks.sum(0).eq(1).all()
    assert masks.flatten(1).sum(1).tolist() == [15, 34, 15]
    with pytest.raises(ValueError, match="band must be one of low, mid, high, got 'middle'"):
        band_mask("middle")  # type: ignore[arg-type]
    text = Threat({"text": BandBall("linf", 0.1)})
    with pytest.raises(ValueError, match="does not attack them"):
        Banded(PGD(1), "low")(lambda x, p: (x, x), image_batch(torch.ones(1, 2)), text, DRAWS, None, None)  # type: ignore
