"""Attack losses against the published values, naive loops and their stated derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import image_batch, output_of
from torch import Tensor

from robusthash.attacks.base import Probe, published_slope
from robusthash.attacks.losses import (
    Agreement,
    HAGLoss,
    MaskedAgreement,
    ObjectiveLoss,
    ScaleFree,
    SDHALoss,
    mainstay_loss,
)
from robusthash.core.types import Goal, Guidance, HashOutput, Reference
from robusthash.objectives import DPSH

GOLDEN = torch.tensor([[1.0, 0.0, -0.4, -0.8]])


class Fixed(HashOutput):
    """An output whose relaxed code is given, so that values of +-1 can be asked for exactly."""

    def relaxed(self, alpha: float = 1.0) -> Tensor:
        return self.code


def probe_of(relaxed: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Probe:
    """A probe with this relaxed code, and (B, n) inputs before and after the attack."""
    before = torch.zeros(len(relaxed), 2) if before is None else before
    after = before if after is None else after
    output = Fixed(relaxed, relaxed, relaxed)
    origin = image_batch(before)
    return Probe({"image": output}, image_batch(after).inputs, origin, Goal(None, -1), 1.0, None)


def signs(rows: int, bits: int, seed: int = 0) -> Tensor:
    return torch.where(torch.rand(rows, bits, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)


def test_agreement_is_the_mean_product() -> None:
    relaxed, codes = torch.tensor([[0.5, -0.25], [1.0, 0.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert Agreement()(probe_of(relaxed), Guidance(codes)).tolist() == pytest.approx([0.375, -0.5])


@pytest.mark.parametrize(
    ("loss", "minimised", "expected"),
    [
        (MaskedAgreement(), 1, 0.786667),
        (MaskedAgreement(targeted=True), -1, 0.533333),
        (MaskedAgreement(targeted=True, mirror=True), -1, 1.066667),
    ],
    ids=["away", "towards", "mirror"],
)
def test_masked_loss_golden_values(loss: MaskedAgreement, minimised: int, expected: float) -> None:
    """The published numbers are those of the minimised loss; agreement is larger = nearer."""
    value = minimised * loss(probe_of(GOLDEN), Guidance(torch.ones(1, 4)))
    assert value.item() == pytest.approx(expected, abs=1e-6)
    flipped = signs(1, 4)
    again = minimised * loss(probe_of(GOLDEN * flipped), Guidance(flipped))
    assert again.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("targeted", "mirror"), [(False, False), (True, False), (True, True)])
def test_masked_derivative(targeted: bool, mirror: bool) -> None:
    """2 (p + 1) over the open bits; mirrored 2 (1 - p), which also pushes bits at p = -1."""
    p = torch.tensor([[1.0, 0.2, -0.45, -1.0]], requires_grad=True)
    value = MaskedAgreement(targeted, mirror)(probe_of(p), Guidance(torch.ones(1, 4)))
    (grad,) = torch.autograd.grad(value.sum(), p)
    open_bits = torch.tensor([0.0, 1, 1, 1]) if targeted else torch.tensor([1.0, 1, 1, 0])
    slope = 2 * (1 - p.detach()) if mirror else 2 * (p.detach() + 1)
    torch.testing.assert_close(grad, open_bits * slope / 3)
    if targeted:
        assert grad[0, 3].item() == pytest.approx(4 / 3 if mirror else 0.0)


def test_masked_loss_is_finite_when_all_bits_are_done_and_does_not_couple_queries() -> None:
    done, rest = -torch.ones(1, 4), torch.tensor([[0.9, 0.1, -0.2, 0.4]])
    codes = torch.ones(2, 4)
    both = MaskedAgreement()(probe_of(torch.cat([done, rest])), Guidance(codes))
    assert both[0].item() == 0.0
    assert both[1] == MaskedAgreement()(probe_of(rest), Guidance(codes[:1]))[0]


def test_forms_of_the_mainstay_loss() -> None:
    assert mainstay_loss("linear", False) == mainstay_loss("linear", True) == Agreement()
    assert mainstay_loss("code", True) == MaskedAgreement(True, False)
    assert mainstay_loss("mirror", True) == MaskedAgreement(True, True)
    for form, targeted in [("mirror", False), ("quadratic", True)]:
        with pytest.raises(ValueError, match=form):
            mainstay_loss(form, targeted)  # type: ignore[arg-type]


# --- HAG


def test_hag_at_the_clean_code_is_four_and_at_its_complement_one_without_gradient() -> None:
    clean = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert HAGLoss()(probe_of(clean), Guidance(clean)).item() == pytest.approx(4.0)
    flipped = (-clean).requires_grad_(True)
    value = HAGLoss()(probe_of(flipped), Guidance(clean))
    (grad,) = torch.autograd.grad(value.sum(), flipped)
    assert value.item() == pytest.approx(1.0)
    assert torch.equal(grad, torch.zeros(1, 4))


def test_hag_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    relaxed = torch.rand(6, 5, generator=generator, dtype=torch.float64) * 2 - 1
    clean = torch.rand(6, 5, generator=generator, dtype=torch.float64) * 2 - 1
    for h, c, value in zip(relaxed, clean, HAGLoss()(probe_of(relaxed), Guidance(clean)), strict=True):
        mask = [abs(float(a) - (1.0 if b >= 0 else -1.0)) < 1.5 for a, b in zip(h, c, strict=True)]
        product = sum(float(a * b) for a, b, m in zip(h, c, mask, strict=True) if m) / (sum(mask) + 1e-8)
        mean = sum(float(a) for a, m in zip(h, mask, strict=True) if m) / 5
        assert value.item() == pytest.approx((product + 1) ** 2 + mean**2, rel=1e-6)


# --- SDHA


@pytest.mark.parametrize(
    ("product", "expected"), [(1.0, 0.0067), (0.5, 0.3069), (0.0, 0.75), (-0.5, 0.9810), (-1.0, 1.0)]
)
def test_sdha_bit_values(product: float, expected: float) -> None:
    """Read out of the loss itself: one bit, one relevant code at clamped distance, no change of the image."""
    loss = SDHALoss(strength=1.0)
    distance = 0.5 if product >= 0 else 1.0  # the clamp, or one flipped bit
    value = loss(probe_of(torch.tensor([[product]])), Guidance(torch.ones(1, 1), torch.ones(1, 1)))
    assert -value.item() * distance**0.5 == pytest.approx(expected, abs=6e-5)


def test_sdha_aggregation_equals_the_double_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.rand(3, 6, generator=generator) * 2 - 1
    codes = signs(9, 6)
    positive = torch.tensor([[1.0] * 3 + [0] * 6, [0] * 4 + [1.0] * 5, [0] * 9])
    weights = positive / positive.sum(1, keepdim=True).clamp_min(1.0)
    before, after = torch.rand(3, 4, generator=generator), torch.rand(3, 4, generator=generator)
    values = SDHALoss()(probe_of(q, before, after), Guidance(codes, weights))
    for row in range(3):
        surrogate, relevant = 0.0, torch.nonzero(positive[row]).flatten().tolist()
        for j in relevant:
            r = codes[j]
            gate = torch.sigmoid(5 * q[row] * r)
            d = (0.5 * (q[row] - r).abs() * gate + 1 - gate).sum()
            hamming = float((torch.where(q[row] >= 0, 1.0, -1.0) != r).sum())
            surrogate += float(d) * max(hamming, 0.5) ** -0.5 / len(relevant)
        change = float((after[row] - before[row]).square().mean())
        assert values[row].item() == pytest.approx(change - 25 / 6 * surrogate, rel=1e-5)


def test_sdha_moves_bits_away_and_its_push_dies_once_they_are_flipped() -> None:
    q = torch.tensor([[0.5, -0.9]], requires_grad=True)
    value = SDHALoss()(probe_of(q), Guidance(torch.ones(1, 2), torch.ones(1, 1)))
    (grad,) = torch.autograd.grad(value.sum(), q)
    assert bool((grad > 0).all())  # agreement grows with q: the untargeted search goes down
    assert grad[0, 0] > 20 * grad[0, 1]


# --- scale-free, objective


def test_scale_free_ignores_any_factor_on_the_logits() -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    codes = signs(5, 16)
    outputs = [{"image": output_of(logits * factor)} for factor in (1.0, 1e4, 1e-4)]
    origin, away = image_batch(logits), Goal(None, -1)
    values = [ScaleFree()(Probe(output, {}, origin, away, 1.0, None), Guidance(codes)) for output in outputs]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])
    expected = (torch.tanh(logits / logits.abs().median(1, keepdim=True).values) * codes).mean(1)
    torch.testing.assert_close(values[0], expected)


def test_scale_free_holds_the_scale_constant_and_survives_zero_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    probe = Probe({"image": output_of(logits)}, {}, image_batch(logits), Goal(None, -1), 1.0, None)
    (grad,) = torch.autograd.grad(ScaleFree()(probe, Guidance(torch.ones(1, 3))).sum(), logits)
    torch.testing.assert_close(grad, (1 - torch.tanh(logits.detach() / 1.0) ** 2) / 3)  # the median is 1
    zero = Probe({"image": output_of(torch.zeros(1, 3))}, {}, image_batch(logits), Goal(None, -1), 1.0, None)
    assert ScaleFree()(zero, Guidance(torch.ones(1, 3))).item() == 0.0


def test_objective_as_score_is_minus_its_similarity_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    output = output_of(torch.randn(3, 8, generator=generator))
    codes, labels = signs(6, 8), torch.eye(3).repeat(2, 1)
    own = torch.eye(3)
    objective = DPSH(eta=100.0)
    probe = Probe(
        {"image": output}, {}, image_batch(own), Goal(own, -1), 1.0, Reference({"image": codes}, labels)
    )
    value = ObjectiveLoss(objective)(probe, Guidance(torch.empty(0, 8)))
    torch.testing.assert_close(value, -objective.similarity(output, own, codes, labels))
    for reference, wanted in [(None, own), (Reference({"image": codes}, None), own), (probe.reference, None)]:
        with pytest.raises(ValueError, match="labelled"):
            ObjectiveLoss(objective)(
                Probe({"image": output}, {}, probe.origin, Goal(wanted, -1), 1.0, reference), None
            )


def test_published_slope_in_ten_blocks() -> None:
    slopes = [published_slope(t / 100) for t in range(100)]
    assert slopes == [0.1] * 50 + [0.2] * 10 + [0.3] * 10 + [0.5] * 10 + [0.7] * 10 + [1.0] * 10
    assert [published_slope(t / 2000) for t in range(2000)].count(0.1) == 1000
    assert published_slope(6 / 7) == 0.7  # with seven steps the last block is never reached
    assert published_slope(1.0) == 1.0


def test_relaxed_code_takes_slope_and_scale() -> None:
    output = output_of(torch.tensor([[0.3, -2.0]]), scale=4.0)
    torch.testing.assert_close(output.relaxed(2.0), torch.tanh(torch.tensor([[0.15, -1.0]])))
    two = {"image": output_of(torch.tensor([[0.4]])), "text": output_of(torch.tensor([[-0.2]]))}
    probe = Probe(two, {}, image_batch(torch.zeros(1, 1)), Goal(None, -1), 1.0, None)
    torch.testing.assert_close(probe.relaxed(), torch.tensor([[0.4, -0.2]]).tanh().mean(1, keepdim=True))
