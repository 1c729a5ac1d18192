"""The detector of queries: criteria in closed form, false alarms, what its evaluation counts, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers import make_data, trained_hasher

from robusthash.attacks import mainstay
from robusthash.attacks.base import Probe
from robusthash.attacks.losses import Agreement
from robusthash.core.types import Batch, Goal, Guidance, HashOutput
from robusthash.defenses.adversarial_query_detector import (
    CRITERIA,
    DENOISED,
    AdversarialQueryDetector,
    Denoised,
    Evading,
    criteria_of,
    denoised,
    measured,
)
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.models.encoding import encode_signs
from robusthash.robustness.detection import _Halves, _Outcome, auc, detect, most_harmful


def output(logits: torch.Tensor, smooth: torch.Tensor) -> HashOutput:
    return HashOutput(logits, torch.tanh(logits), logits, {DENOISED: smooth}, 1.0)


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    data = make_data(query=60, database=60)
    return make_context(trained_hasher(data), data, batch_size=40)


def test_criteria_count_bits() -> None:
    codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
    logits = torch.tensor([[5.0, 5, 5, 5], [9.0, -9, 9, -9]])
    smooth = torch.tensor([[5.0, 5, 5, -5], [9.0, -9, 9, -9]])
    found = measured(output(logits, smooth), codes, near=2)
    assert found[:, 0].tolist() == [0.125, 0.375]  # bits to the two nearest: 0 and 1, 2 and 1, of 4
    assert found[:, 2].tolist() == [0.25, 0.0]
    assert found[0, 1].item() == pytest.approx((1 - torch.tanh(torch.tensor(5.0)).item()) ** 2)
    leaf = logits.requires_grad_(True)
    (slope,) = torch.autograd.grad(measured(output(leaf, smooth), codes, near=2)[:, 0].sum(), leaf)
    assert (slope[0] != 0).any()


def test_a_median_takes_single_pixels_away_and_whole_words_their_parts() -> None:
    image = torch.full((1, 3, 5, 5), 0.5)
    image[0, 0, 2, 2] = 1.0
    assert torch.equal(denoised(image), torch.full_like(image, 0.5))
    bag = torch.tensor([[0.05, 0.95, 1.0]], requires_grad=True)
    whole = denoised(bag)
    assert whole.tolist() == [[0.0, 1.0, 1.0]]
    whole.sum().backward()
    assert bag.grad is not None
    assert bag.grad.tolist() == [[1.0, 1.0, 1.0]]
    for wrong in (torch.ones(2, 4, dtype=torch.int64), 3 * torch.randn(2, 4)):
        with pytest.raises(ValueError, match="bags of words"):
            denoised(wrong)


def test_further_clean_queries_are_caught_at_the_stated_rate_or_below() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(50):
        clean, new = torch.rand(2, 200, 3, generator=generator, dtype=torch.float64)
        rates.append(float(AdversarialQueryDetector(clean, 0.1).caught(new).double().mean()))
    assert 0.05 < sum(rates) / len(rates) <= 0.105
    far = torch.tensor([[9.0, 0.5, 0.5], [0.5, 0.5, 0.5]], dtype=torch.float64)
    detector = AdversarialQueryDetector(clean, 0.1)
    assert detector.caught(far).tolist() == [True, False]
    assert detector.caught_by(far)[0].tolist() == [True, False, False]


def test_limits_are_where_a_query_begins_to_be_caught() -> None:
    clean = torch.rand(99, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    detector = AdversarialQueryDetector(clean, 0.05)
    limits, _ = detector.limits()
    inside = clean.median(0).values.repeat(2, 1)
    inside[0, 0], inside[1, 0] = limits[0] - 1e-6, limits[0] + 1e-6
    assert detector.caught(inside).tolist() == [False, True]


@pytest.mark.parametrize(
    ("rate", "items", "said"), [(0.0, 50, "above 0 and below 1"), (0.01, 50, "149 clean")]
)
def test_rates_that_cannot_be_shown_are_refused_with_one_that_can(rate: float, items: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarialQueryDetector(torch.rand(items, 3), rate)
    assert AdversarialQueryDetector(torch.rand(items, 3), 0.03).limit < 9.0  # the rate that the line offers


def test_the_rate_of_the_refusal_is_enough_for_the_smaller_half() -> None:
    clean = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"there are 2 .*, or a rate of at least 0\.5$"):
        _Halves.of(clean, 0.05, seed=0)
    _Halves.of(clean, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"take more queries$"):
        _Halves.of(clean[:2], 0.05, seed=0)


def test_the_loss_of_who_knows_it_adds_what_is_beyond_the_limits() -> None:
    clean = torch.rand(99, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 10
    detector, codes = AdversarialQueryDetector(clean, 0.1), torch.ones(3, 4)
    logits = torch.tensor([[-2.0, 2, 2, -2]])
    shown = output(logits, logits)
    batch = Batch({"image": torch.zeros(1, 3, 2, 2)}, None, torch.arange(1))
    probe = Probe({"image": shown}, batch.inputs, batch, Goal(None, -1), 1.0, None)
    guidance = Guidance(torch.ones(1, 4))
    base = Agreement()(probe, guidance)
    limits, spreads = detector.limits()
    found = detector.unusual(measured(shown, codes))
    price = ((found - limits.float()) / spreads.float()).clamp_min(0).sum(1)
    assert price.item() > 0
    both = Evading(Agreement(), 2.0, detector, codes)(probe, guidance)
    assert both.item() == pytest.approx((base + 2 * price).item(), rel=1e-5)  # descended: the price falls
    with pytest.raises(ValueError, match="detector"):
        Evading(Agreement())(probe, guidance)


def test_the_view_has_the_victim_s_codes_and_those_of_the_denoised_input(context: EvaluationContext) -> None:
    x, victim = context.batch(0).inputs["image"], context.victim.eval()
    with torch.no_grad():
        found = Denoised()(victim)({"image": x})["image"]
        assert torch.equal(found.logits, victim({"image": x})["image"].logits)
        assert torch.equal(found.aux[DENOISED], victim({"image": denoised(x)})["image"].logits)
    rows = criteria_of(victim, "image", x, context.codes.signs().float(), batch_size=7)
    flips = (encode_signs(victim, "image", x) != encode_signs(victim, "image", denoised(x))).double().mean(1)
    assert torch.allclose(rows[:, 2], flips)


def test_chance_of_more_suspicion_counts_ties_half() -> None:
    assert auc(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.2])) == pytest.approx((1 + 0.75) / 2)


def outcome(after: list[float], caught: list[bool]) -> _Outcome:
    before, shares = torch.full((2,), 0.8), torch.zeros(2)
    return _Outcome(
        torch.tensor(after), before, torch.tensor(caught), shares, torch.zeros(2, 3), False, "MAP"
    )


def test_what_passes_and_harms_is_what_counts() -> None:
    strong, sly = outcome([0.1, 0.1], [True, False]), outcome([0.3, 0.5], [False, False])
    assert strong.passing.tolist() == pytest.approx([0.8, 0.1])
    assert strong.unnoticed.tolist() == [False, True]
    worst = most_harmful([strong, sly])
    assert worst.passing.tolist() == pytest.approx([0.3, 0.1])
    assert worst.unnoticed.tolist() == [True, True]


def test_who_knows_it_is_caught_less(context: EvaluationContext) -> None:
    attack = mainstay(eps=8 / 255, steps=10, step_size=4 / 255, slope="one")
    found = detect(context, [("mainstay", attack)], 0.3, [0.1])
    rows = {row.attacker: row for row in found.attacks}
    assert list(rows) == ["oblivious", "adaptive", "worst"]
    assert found.queries == 60
    assert 0.1 < found.measured <= 0.4
    assert rows["adaptive"].caught < rows["oblivious"].caught
    assert rows["adaptive"].value < found.clean
    assert rows["worst"].passing <= min(rows["oblivious"].passing, rows["adaptive"].passing) + 1e-9
    assert set(rows["adaptive"].by) == set(CRITERIA)
    again = detect(context, [("mainstay", attack)], 0.3, [0.1])
    assert again == found
    with pytest.raises(ValueError, match="give one"):
        detect(context, [], 0.1)
    with pytest.raises(ValueError, match="positive"):
        detect(context, [("mainstay", attack)], 0.1, [0.0])
