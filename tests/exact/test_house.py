"""The house objectives against dense references, gradients by differences, scale and batch independence."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import image_batch, linear_hasher
from torch import Tensor

from robusthash.attacks import ranking_losses as house
from robusthash.attacks.base import Attack, Probe
from robusthash.attacks.pgd import APGD
from robusthash.attacks.ranking_losses import (
    MarginPN,
    Pull,
    SoftAP,
    Tallied,
    Tally,
    Wrong,
    soft_average_precision,
)
from robusthash.attacks.threat_model import image_threat
from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, HashOutput, Reference
from robusthash.metrics.average_precision import average_precision

DRAWS = Draws(0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(items: int = 60, bits: int = 6, classes: int = 4) -> tuple[Reference, Tensor]:
    codes = sign(random(items, bits, seed=1))
    labels = (random(items, classes, seed=2) > 0.6).double()
    labels[labels.sum(1) == 0, 0] = 1.0
    return Reference({"image": codes.float()}, labels.float()), labels[:5].float()


def tally_of(reference: Reference, wanted: Tensor) -> Tally:
    batch = Batch({"image": torch.zeros(len(wanted), 1)}, wanted, torch.arange(len(wanted)))
    made = Tallied()(None, batch, Goal(wanted, -1), reference, DRAWS)
    assert isinstance(made, Tally)
    return made


def probe_of(logits: Tensor) -> Probe:
    output = HashOutput(logits, torch.tanh(logits), logits)
    batch = Batch({"image": torch.zeros(len(logits), 1)}, None, torch.arange(len(logits)))
    return Probe({"image": output}, batch.inputs, batch, Goal(None, -1), 1.0, None)


def test_a_tally_counts_every_item_once() -> None:
    reference, wanted = world()
    tally = tally_of(reference, wanted)
    codes, labels = reference.codes["image"], reference.labels
    assert len(tally.codes) == len(torch.unique(codes, dim=0)) < len(codes)
    same = (codes[:, None] == tally.codes[None]).all(2).float()
    torch.testing.assert_close(tally.items, same.sum(0))
    torch.testing.assert_close(tally.relevant, (wanted @ labels.T > 0).float() @ same)


def test_soft_ap_of_whole_counts_is_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 50, (200, 9), generator=generator)
    relevant = (torch.rand(200, 9, generator=generator) * (items + 1)).long()
    relevant[:3] = 0
    found = soft_average_precision(items.double(), relevant.double())
    torch.testing.assert_close(found, average_precision(items, relevant), rtol=0, atol=1e-12)


def test_soft_ap_in_blocks_has_the_gradient_of_the_dense_form(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, wanted = world()
    tally = tally_of(reference, wanted)
    codes, items, relevant = tally.codes.double(), tally.items.double(), tally.relevant.double()
    bits = torch.tanh(random(5, 6, seed=3)).requires_grad_(True)

    def dense(z: Tensor) -> Tensor:
        distance = (6 - z @ codes.T) / 2
        bins = (1 - (distance[:, :, None] - torch.arange(7)).abs()).clamp_min(0)
        n, r = torch.einsum("m,bmt->bt", items, bins), torch.einsum("bm,bmt->bt", relevant, bins)
        return soft_average_precision(n, r)

    (expected,) = torch.autograd.grad(dense(bits).sum(), bits)
    for cells in (1 << 22, 12):
        monkeypatch.setattr(house, "_CELLS", cells)
        value = house._SoftAP.apply(bits, codes, items, relevant)
        torch.testing.assert_close(value, dense(bits).detach())
        (found,) = torch.autograd.grad(value.sum(), bits)
        torch.testing.assert_close(found, expected)
    step = 1e-6 * random(5, 6, seed=4)
    change = dense(bits.detach() + step) - dense(bits.detach() - step)
    torch.testing.assert_close((expected * 2 * step).sum(1), change, rtol=1e-4, atol=1e-12)


def test_margin_counts_a_split_distance_by_shares() -> None:
    """Nearest 3: the one at distance 0, and two thirds of the three at distance 1."""
    codes = torch.tensor([[1.0, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1], [-1, -1, -1]])
    mean, none = house._nearest(torch.ones(1, 3), codes, (torch.ones(1, 5), torch.zeros(1, 5)), 3)
    torch.testing.assert_close(mean, torch.tensor([[1.0, 1, 1]]) / 3 + 2 / 3 * codes[1:4].mean(0))
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(house._nearest(torch.ones(1, 3), codes[order], (torch.ones(1, 5),), 3)[0], mean)
    assert torch.equal(none, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="nearest must be at least 1, got 0"):
        MarginPN(0)


def test_margin_is_larger_for_the_own_code_than_for_another() -> None:
    codes = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    reference = Reference({"image": codes}, torch.eye(2))
    tally = tally_of(reference, torch.tensor([[1.0, 0]]))
    near, far = (MarginPN()(probe_of(factor * torch.ones(1, 4)), tally) for factor in (1.0, -1.0))
    torch.testing.assert_close(near, torch.tensor([2 * float(torch.tanh(torch.ones(())))]))
    torch.testing.assert_close(far, -near)


def test_the_wrong_guide_takes_the_nearest_label_that_the_query_lacks() -> None:
    codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
    reference = Reference({"image": codes}, torch.eye(4)[:3])  # nothing carries the fourth label
    victim = linear_hasher(torch.eye(4))
    batch = image_batch(torch.ones(2, 4))
    wanted = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 1]])
    pulls = [
        Wrong(margin)(victim, batch, Goal(wanted, -1), reference, DRAWS).codes for margin in (True, False)
    ]
    assert torch.equal(pulls[0][0], torch.tensor([0.0, 0, 0, 2]))  # only the bit that tells the two apart
    assert torch.equal(pulls[1][0], torch.tensor([-1.0, -1, -1, 1]))
    assert torch.equal(pulls[0][1], pulls[1][1])  # it has every label: away from its own representative


def losses() -> dict[str, tuple[object, object]]:
    return {
        "wrong": (Wrong(), Pull()),
        "pursuit": (Wrong(margin=False), Pull()),
        "soft-ap": (Tallied(), SoftAP()),
        "margin-pn": (Tallied(), MarginPN(10)),
    }


@pytest.mark.parametrize("name", ["wrong", "pursuit", "soft-ap", "margin-pn"])
def test_t15_multiplied_logits_change_nothing(name: str) -> None:
    """T15. A power of two, so that not even rounding differs; and 10,000 within rounding."""
    reference, wanted = world()
    guide, loss = losses()[name]
    x = 0.5 + 0.1 * random(5, 9, seed=5)
    weight = random(6, 9, seed=6)
    found = []
    for factor in (1.0, 2.0**13):
        victim = linear_hasher(weight * factor).double()
        attack = Attack("toy", guide, loss, APGD(10), image_threat(0.1))
        out = attack(victim, image_batch(x, wanted), Goal(wanted, -1), reference, draws=DRAWS)
        found.append(out.inputs["image"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], image_batch(x).inputs["image"])
    guidance = guide(victim, image_batch(x, wanted), Goal(wanted, -1), reference, DRAWS)
    logits = x @ weight.T
    torch.testing.assert_close(loss(probe_of(logits), guidance), loss(probe_of(1e4 * logits), guidance))


@pytest.mark.parametrize("name", ["wrong", "pursuit", "soft-ap", "margin-pn"])
def test_one_query_alone_gets_the_code_that_it_gets_among_64(name: str) -> None:
    reference, _ = world(items=200, bits=12)
    generator = torch.Generator().manual_seed(7)
    wanted = torch.nn.functional.one_hot(torch.randint(4, (64,), generator=generator), 4).float()
    x, guide_loss = 0.5 + 0.1 * random(64, 20, seed=8), losses()[name]
    victim = linear_hasher(random(12, 20, seed=9)).double()
    attack = Attack("toy", *guide_loss, APGD(8), image_threat(0.05))

    def codes(rows: Tensor) -> Tensor:
        batch = Batch({"image": image_batch(x).inputs["image"][rows]}, wanted[rows], rows)
        return attack(copy.deepcopy(victim), batch, Goal(wanted[rows], -1), reference, draws=DRAWS).signs

    whole = codes(torch.arange(64))
    assert torch.equal(torch.cat([codes(torch.tensor([row])) for row in range(64)]), whole)


@pytest.mark.parametrize("loss", [SoftAP(), MarginPN()])
def test_losses_over_the_database_need_a_tally(loss: object) -> None:
    guidance = Wrong()(linear_hasher(torch.eye(4)), image_batch(torch.ones(1, 4)), *_known(), DRAWS)
    with pytest.raises(ValueError, match="tally"):
        loss(probe_of(torch.ones(1, 4)), guidance)


def _known() -> tuple[Goal, Reference]:
    return Goal(torch.eye(2)[:1], -1), Reference({"image": torch.ones(2, 4)}, torch.eye(2))
