"""DRFGD where the result is known: the set contrast, the repaired losses, the purifier that starts as the
identity."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import linear_hasher, make_data, reference_of, trained_hasher
from torch import Tensor

from robusthash.attacks.drfgd import SignedSets, drfgd, set_contrast, swapped
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.defenses.drfgd import critic_loss, shared_information, soft_cross_entropy, symmetric_kl
from robusthash.evaluation.context import make_context
from robusthash.evaluation.evaluate import score_clean
from robusthash.models.drfgd import ImageRegenerator, TextRegenerator
from robusthash.models.hasher import Hasher, purified

DRAWS = Draws(0, ("drfgd",))


def sets_of(positive: Tensor, codes: Tensor) -> Guidance:
    """(B, M) membership of the first set -> guidance with 1 / count each."""
    first, second = positive.float(), 1.0 - positive.float()
    return Guidance(codes, first / first.sum(1, keepdim=True) - second / second.sum(1, keepdim=True))


def hamming_form(code: Tensor, positive: Tensor, by_modality: list[Tensor], tau: float) -> Tensor:
    """Eq 1-2 as printed, item by item, from Hamming distances."""
    bits, losses = code.shape[1], []
    for h, member in zip(code, positive, strict=True):
        scores = [-sum((bits - float(h @ b[j])) / 2 for b in by_modality) / bits for j in range(len(member))]
        outside = [s for s, inside in zip(scores, member, strict=True) if not inside]
        mean = sum(outside) / len(outside)
        inner = [math.exp((s - mean) / tau) for s, inside in zip(scores, member, strict=True) if inside]
        losses.append(math.log(1.0 + sum(inner)))
    return torch.tensor(losses)


def test_the_loss_is_the_printed_one_over_both_modalities() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.tanh(torch.randn(4, 16, generator=generator))
    images, texts = (torch.randn(9, 16, generator=generator).sign() for _ in range(2))
    positive = torch.rand(4, 9, generator=generator) < 0.4
    positive[:, 0], positive[:, 1] = True, False
    found = set_contrast(code, sets_of(positive, images + texts), 0.3, mean=False)
    torch.testing.assert_close(
        found, hamming_form(code, positive, [images, texts], 0.3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("count", [1, 5])
def test_equal_scores_give_the_logarithm_of_one_more_than_the_set(count: int) -> None:
    codes = torch.ones(count + 3, 8)
    positive = torch.arange(count + 3)[None] < count
    code = torch.tanh(torch.randn(1, 8, generator=torch.Generator().manual_seed(1)))
    guidance = sets_of(positive, codes)
    assert set_contrast(code, guidance, mean=False).item() == pytest.approx(math.log(1 + count), rel=1e-5)
    assert set_contrast(code, guidance).item() == pytest.approx(math.log(2), rel=1e-5)


def test_gradient_to_a_score_is_its_softmax_share_over_tau() -> None:
    """With codes on distinct bits, d L / d h_k is that share times the code's half bit: PGD lowers each
    s_p."""
    codes = 2.0 * torch.eye(4)  # s_j = h_j / 4
    guidance = sets_of(torch.tensor([[True, True, False, False]]), codes)
    code = torch.tensor([[0.3, -0.2, 0.1, 0.5]], requires_grad=True)
    (grad,) = torch.autograd.grad(set_contrast(code, guidance, 0.05, mean=False).sum(), code)
    scores = code.detach()[0] / 4
    exponents = torch.cat([torch.zeros(1), (scores[:2] - scores[2:].mean()) / 0.05])
    share = exponents.softmax(0)[1:] / 0.05
    torch.testing.assert_close(grad[0, :2], share / 4)
    torch.testing.assert_close(grad[0, 2:], -share.sum() / 2 / 4 * torch.ones(2))


def test_extreme_exponents_stay_finite() -> None:
    guidance = sets_of(torch.tensor([[True, False]]), torch.tensor([[2.0] * 8, [-2.0] * 8]))
    for sign, value in ((1.0, 40.0), (-1.0, 0.0)):
        code = torch.full((1, 8), sign, requires_grad=True)
        loss = set_contrast(code, guidance)
        assert loss.item() == pytest.approx(value, abs=1e-4)
        (grad,) = torch.autograd.grad(loss.sum(), code)
        assert bool((grad > 0).all()), "the gradient vanished"


def test_alignment_is_the_attack_loss_with_the_sets_exchanged() -> None:
    generator = torch.Generator().manual_seed(2)
    code, codes = (
        torch.tanh(torch.randn(3, 8, generator=generator)),
        torch.randn(7, 8, generator=generator).sign(),
    )
    positive = torch.arange(7)[None].expand(3, 7) % 3 == torch.arange(3)[:, None]
    exchanged = set_contrast(code, sets_of(~positive, codes))
    assert torch.equal(set_contrast(code, swapped(sets_of(positive, codes))), exchanged)
    assert not torch.equal(set_contrast(code, sets_of(positive, codes)), exchanged)


def test_one_gradient_step_moves_alignment_and_attack_loss_oppositely() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(12, 16, generator=generator).sign()
    guidance = sets_of(torch.arange(12)[None].expand(5, 12) % 2 == torch.arange(5)[:, None] % 2, codes)
    logits = 0.1 * torch.randn(5, 16, generator=generator).requires_grad_(True)
    align = set_contrast(torch.tanh(logits), swapped(guidance), 0.5)
    (grad,) = torch.autograd.grad(align.sum(), logits)
    moved = torch.tanh(logits - 0.1 * grad).detach()
    assert bool((set_contrast(moved, swapped(guidance), 0.5) < align).all())
    assert bool((set_contrast(moved, guidance, 0.5) > set_contrast(torch.tanh(logits), guidance, 0.5)).all())


# --- the sets


def queries(labels: Tensor, ids: Tensor | None = None) -> Batch:
    return Batch(
        {"image": torch.rand(len(labels), 1, 1, 4)}, labels, torch.arange(len(labels)) if ids is None else ids
    )


def test_sets_follow_the_labels_and_sum_the_modalities() -> None:
    labels = torch.eye(3)[torch.arange(9) % 3]
    images, texts = (torch.randn(9, 4, generator=torch.Generator().manual_seed(i)).sign() for i in (4, 5))
    victim = linear_hasher(torch.eye(4))
    goal = Goal(torch.tensor([[1.0, 0, 0], [0, 1, 1]]), -1)
    guidance = SignedSets()(
        victim, queries(goal.labels), goal, Reference({"image": images, "text": texts}, labels), DRAWS
    )
    assert torch.equal(guidance.codes, images + texts)
    positive = (goal.labels @ labels.T) > 0
    expected = positive / positive.sum(1, keepdim=True) - (~positive).float() / (~positive).sum(
        1, keepdim=True
    )
    torch.testing.assert_close(guidance.weights, expected)


def test_a_query_without_a_relevant_item_leaves_its_own_code() -> None:
    labels, codes = torch.tensor([[1.0, 0], [1, 0]]), torch.ones(2, 4)
    victim = linear_hasher(torch.eye(4))
    batch = queries(torch.tensor([[1.0, 0], [0, 1]]))
    guidance = SignedSets()(
        victim, batch, Goal(batch.labels, -1), Reference({"image": codes, "text": codes}, labels), DRAWS
    )
    own = torch.where(victim(batch.inputs)["image"].logits[1] >= 0, 2.0, -2.0)  # once for each modality
    assert torch.equal(guidance.codes[2], own)
    torch.testing.assert_close(guidance.weights, torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, 1.0]]))


def test_large_sets_are_drawn_by_query_and_seed() -> None:
    labels = torch.eye(2)[torch.arange(200) % 2]
    reference = Reference({"image": torch.ones(200, 4)}, labels)
    victim, wanted = linear_hasher(torch.eye(4)), torch.eye(2)[[0, 1, 0]]
    found = SignedSets(20)(victim, queries(wanted), Goal(wanted, -1), reference, DRAWS).weights
    assert torch.equal((found > 0).sum(1), torch.tensor([20] * 3))
    assert torch.equal((found < 0).sum(1), torch.tensor([20] * 3))
    torch.testing.assert_close(found.sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    assert bool(((found > 0) <= ((wanted @ labels.T) > 0)).all())
    assert not torch.equal(found[0] > 0, found[2] > 0), "two queries drew the same set"
    alone = SignedSets(20)(
        victim, queries(wanted[2:], torch.tensor([2])), Goal(wanted[2:], -1), reference, DRAWS
    ).weights
    assert torch.equal(alone[0], found[2])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        SignedSets(0)
    with pytest.raises(ValueError, match="signed-sets"):
        set_contrast(torch.zeros(1, 4), Guidance(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        set_contrast(torch.zeros(1, 4), Guidance(torch.ones(1, 4), torch.ones(1, 1)), 0.0)


def test_the_published_budgets() -> None:
    image, text = drfgd(), drfgd(modality="text")
    assert (image.threat.name, text.threat.name) == ("img-linf-8", "txt-linf-0.05")
    assert (image.search.steps, image.search.step_size) == (20, pytest.approx(3 / 255))
    assert text.search.step_size == pytest.approx(0.006)


# --- the repaired losses


def test_shared_information_is_ln_2_where_equal_and_0_where_disjoint() -> None:
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(shared_information(z, z), torch.full((3,), math.log(2)))
    left = torch.tensor([[60.0, 60, -60, -60]])
    assert shared_information(left, -left).item() == pytest.approx(0.0, abs=1e-6)
    both = torch.stack([shared_information(z, z.roll(1, 1)), symmetric_kl(z, z.roll(1, 1))])
    assert bool((both[0] < math.log(2)).all())
    assert bool((both[0] > 0).all())
    assert bool((both[1] > 0).all())
    assert float(symmetric_kl(z, z).abs().max()) == 0.0


def test_minimising_separates_and_the_printed_form_joins() -> None:
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(7))
    for loss, sign in ((shared_information, 1.0), (symmetric_kl, -1.0)):
        moved = start.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(moved, start.roll(1, 0)).sum(), moved)
        after = (moved - 0.5 * grad).detach()
        change = symmetric_kl(after, start.roll(1, 0)) - symmetric_kl(start, start.roll(1, 0))
        assert bool((sign * change > 0).all())


def test_cross_entropy_is_least_at_uniform_over_the_wanted_classes() -> None:
    wanted = torch.tensor([[1.0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    perfect = 200.0 * wanted
    assert soft_cross_entropy(perfect, wanted).item() == pytest.approx((math.log(3) + 0.0) / 2, abs=1e-6)
    others = 1.0 - wanted[:2]
    expected = (math.log(2) + math.log(4)) / 2
    assert soft_cross_entropy(200.0 * others, others).item() == pytest.approx(expected, abs=1e-6)
    for seed in range(4):
        drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        assert soft_cross_entropy(drawn, wanted) > soft_cross_entropy(perfect, wanted)
    assert soft_cross_entropy(perfect, torch.zeros(3, 5)).item() == 0.0


def test_critic_at_zero_logits_says_twice_ln_2() -> None:
    assert critic_loss(torch.zeros(2, 1, 4, 4), torch.zeros(4, 1, 4, 4)).item() == pytest.approx(
        2 * math.log(2)
    )
    assert critic_loss(torch.full((2,), 9.0), torch.full((2,), -9.0)) < 1e-3


# --- the purifiers


@pytest.fixture(scope="module")
def trained() -> Hasher:
    return trained_hasher(make_data(multi=True))


def test_a_new_purifier_is_the_identity_and_map_is_unchanged(trained: Hasher) -> None:
    data = make_data(multi=True)
    whole = purified(copy.deepcopy(trained), {"image": {"name": "drfgd-image", "width": 4}}, "query")
    x = data.query.batch(torch.arange(6)).inputs["image"]
    assert torch.equal(whole.purifiers["image"](x, None)[0], x)
    values = [score_clean(make_context(victim, data)).per_query["MAP"] for victim in (trained, whole)]
    assert (values[0] == values[1]).all()


def test_a_new_text_purifier_is_the_identity() -> None:
    bags = (torch.rand(5, 30, generator=torch.Generator().manual_seed(8)) < 0.2).float()
    assert torch.equal(TextRegenerator(30, 16)(bags, None)[0], bags)


def wide(purifier: ImageRegenerator | TextRegenerator) -> ImageRegenerator | TextRegenerator:
    """The same with a last layer that has learned something, and too much of it."""
    torch.nn.init.normal_(purifier.last.weight, std=2.0, generator=torch.Generator().manual_seed(9))
    return purifier


@pytest.mark.parametrize("output", ["residual", "direct"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 13, 10)])
def test_images_keep_shape_and_range(output: str, shape: tuple[int, ...]) -> None:
    purifier = wide(ImageRegenerator(4, output))  # type: ignore[arg-type]
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(10))
    made = purifier(x, None)[0].detach()
    assert made.shape == x.shape
    assert made.dtype == x.dtype
    assert float(made.min()) >= 0.0
    assert float(made.max()) <= 1.0
    assert not torch.equal(made, x)
    parts = purifier.regenerate(x)
    assert torch.equal(parts.sample, made)
    assert parts.robust.shape == parts.fragile.shape == (3, purifier.width)


def test_texts_keep_shape_and_range() -> None:
    purifier = wide(TextRegenerator(30, 16))
    bags = torch.rand(4, 30, generator=torch.Generator().manual_seed(11))
    made = purifier(bags, None)[0].detach()
    assert made.shape == bags.shape
    assert float(made.min()) >= 0.0
    assert float(made.max()) <= 1.0
    assert torch.equal(purifier.regenerate(bags).sample, made)


def test_words_at_the_edge_of_the_range_keep_their_gradient() -> None:
    """min(1, max(0, x + tanh b)) exactly, with the gradient of x + tanh b: 1 to a word, 1 - tanh(b)^2 to the
    layer."""
    purifier, change = TextRegenerator(3, 4), torch.tensor([0.8, -0.9, 0.1])
    with torch.no_grad():
        purifier.last.bias.copy_(change)  # its weight is zero, so the change is the bias
    bag = torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True)
    made = purifier(bag, None)[0]
    torch.testing.assert_close(
        made.detach(), torch.tensor([[1.0, 0.0, 0.5 + math.tanh(0.1)]]), rtol=0, atol=1e-7
    )
    weights = torch.tensor([[2.0, 3.0, 5.0]])
    to_bag, to_bias = torch.autograd.grad((weights * made).sum(), [bag, purifier.last.bias])
    torch.testing.assert_close(to_bag, weights)
    torch.testing.assert_close(to_bias, weights[0] * (1 - torch.tanh(change) ** 2))


def test_gradients_reach_the_pixels_through_the_purifier(trained: Hasher) -> None:
    """The white-box view differs from the identity view, and both from nothing."""
    whole = purified(copy.deepcopy(trained), {"image": {"name": "drfgd-image", "width": 4}}, "query")
    purifier = whole.purifiers["image"]
    with torch.no_grad():
        purifier.last.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(12))
    x = (0.3 + 0.4 * torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(13))).requires_grad_(
        True
    )
    grads = []
    for victim in (whole, whole.as_seen_from("identity")):
        (grad,) = torch.autograd.grad(victim({"image": x})["image"].logits.sum(), x)
        assert bool((grad.flatten(1).abs().sum(1) > 0).all())
        grads.append(grad)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-2)


def test_the_fragile_branch_is_not_run_at_inference(trained: Hasher) -> None:
    whole = purified(copy.deepcopy(trained), {"image": {"name": "drfgd-image", "width": 4}}, "query")
    calls: list[str] = []
    for name in ("robust", "fragile"):
        getattr(whole.purifiers["image"], name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    whole({"image": torch.rand(2, 3, 12, 12)})
    assert calls == ["robust"]


def test_an_attack_lowers_agreement_with_relevant_codes(trained: Hasher) -> None:
    data = make_data(multi=True)
    batch, reference = data.query.batch(torch.arange(12)), reference_of(trained, data.database)
    goal = Goal(batch.labels, -1)
    attack = drfgd(steps=10)
    out = attack(trained, batch, goal, reference, draws=DRAWS)
    with torch.no_grad():
        clean = copy.deepcopy(trained).eval()(batch.inputs)["image"].relaxed()
        moved = copy.deepcopy(trained).eval()(out.inputs)["image"].relaxed()
    assert set_contrast(moved, out.guidance).mean() < set_contrast(clean, out.guidance).mean()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ImageRegenerator(6), "multiple of 4, got 6"),
        (lambda: ImageRegenerator(4, "tanh"), "'residual' or 'direct', got 'tanh'"),  # type: ignore[arg-type]
        (lambda: TextRegenerator(5, 0), "at least 1, got 0"),
        (lambda: ImageRegenerator(4)(torch.rand(1, 1, 12, 12), None), "images"),
        (lambda: TextRegenerator(5, 4)(torch.rand(2, 6), None), "counts 5 words"),
    ],
)
def test_bad_purifier_settings_are_refused(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()
