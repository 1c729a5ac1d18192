"""The mainstay code is the optimum it claims to be, for all three weightings, and does not depend on
order."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import image_batch, linear_hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robusthash.attacks.guides import Anchor, Center, Mainstay, Own, Positives, mainstay_code
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, Guidance, Reference

MODES = ("code", "paper", "cgat")
BANK_LABELS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
BANK_CODES = torch.tensor([[1.0, 1, -1, 1], [1, -1, -1, -1], [-1, -1, 1, -1], [-1, 1, 1, -1]])
PRE_SIGN = {
    "paper": (1.8536, 0.1464, -1.8536, 1.1464),
    "code": (2.0, 0.1716, -2.0, 1.1716),
    "cgat": (2.0, 0.0, -2.0, 1.0),
}


def naive_weights(wanted: Tensor, labels: Tensor, mode: str) -> Tensor:
    """(M,) signed weights of one label vector, by the definition, in float64."""
    wanted, labels = wanted.double(), labels.double()
    cosines = [float(wanted @ row / max(1e-8, float(wanted.norm() * row.norm()))) for row in labels]
    positive = [c > 0 for c in cosines]
    count = sum(positive)
    pull = {
        "code": lambda c: c / sum(cosines),
        "paper": lambda c: c / count,
        "cgat": lambda c: 1.0 / count,
    }[mode]
    signed = [pull(c) if p else -1.0 / (len(cosines) - count) for c, p in zip(cosines, positive, strict=True)]
    return torch.tensor(signed, dtype=torch.float64)


def psi(code: Tensor, weights: Tensor, codes: Tensor) -> float:
    """Weighted sum of Hamming distances: positives count up, negatives down."""
    return float((weights * (codes.shape[1] - codes.double() @ code.double()) / 2).sum())


def random_bank(seed: int, items: int, bits: int, classes: int, single: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.where(torch.rand(items, bits, generator=generator) < 0.5, -1.0, 1.0)
    if single:
        return codes, torch.eye(classes)[torch.randint(classes, (items,), generator=generator)]
    return codes, (torch.rand(items, classes, generator=generator) < 0.4).float()


def guidance_of(
    guide: object, reference: Reference | None, wanted: Tensor | None, count: int = 1
) -> Guidance:
    """Ask a guide, on a victim and inputs that should not matter."""
    victim = linear_hasher(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    inputs = torch.rand(count, 5, generator=torch.Generator().manual_seed(1))
    return guide(victim, image_batch(inputs), Goal(wanted, -1), reference, Draws(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_no_other_code_of_eight_bits_is_better(mode: str, seed: int) -> None:
    codes, labels = random_bank(seed, items=23, bits=8, classes=4, single=False)
    labels[0], labels[1] = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    wanted = torch.tensor([1.0, 1.0, 0.0, 0.0])
    weights = naive_weights(wanted, labels, mode)
    found = mainstay_code(wanted[None], codes, labels, mode)[0]
    best = min(psi(torch.tensor(c), weights, codes) for c in itertools.product((-1.0, 1.0), repeat=8))
    assert psi(found, weights, codes) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_golden_toy(mode: str) -> None:
    weights = naive_weights(torch.tensor([1.0, 0.0]), BANK_LABELS, mode)
    before_sign = weights @ BANK_CODES.double()
    assert before_sign.tolist() == pytest.approx(PRE_SIGN[mode], abs=5e-5)
    found = mainstay_code(torch.tensor([[1.0, 0.0]]), BANK_CODES, BANK_LABELS, mode)
    assert found.tolist() == [[1.0, 1.0, -1.0, 1.0]]  # the second bit is an exact tie under cgat: +1


def test_weightings_coincide_on_single_labels_and_differ_on_many() -> None:
    codes, labels = random_bank(5, items=60, bits=32, classes=4, single=True)
    found = [mainstay_code(torch.eye(4), codes, labels, mode) for mode in MODES]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    codes, labels = random_bank(6, items=60, bits=64, classes=4, single=False)
    wanted = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]])
    assert not torch.equal(
        mainstay_code(wanted, codes, labels, "code"), mainstay_code(wanted, codes, labels, "paper")
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), items=st.integers(2, 40), mode=st.sampled_from(MODES), single=st.booleans()
)
def test_order_of_the_bank_does_not_matter(seed: int, items: int, mode: str, single: bool) -> None:
    codes, labels = random_bank(seed, items, bits=8, classes=3, single=single)
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed + 1))
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    straight = mainstay_code(wanted, codes, labels, mode)
    assert torch.equal(straight, mainstay_code(wanted, codes[order], labels[order], mode))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), positives=st.integers(1, 12), negatives=st.integers(1, 12))
def test_exact_ties_give_plus_one(seed: int, positives: int, negatives: int) -> None:
    """A bit on which both sides have the same mean is a tie, whatever the counts; rounding must not decide
    it."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(0, positives + 1, (1,), generator=generator)
    share = left.double() / positives
    right = share * negatives
    if float(right) != int(right):
        return  # the counts do not admit a tie
    column = torch.full((positives + negatives, 1), -1.0)
    column[: int(left)] = 1.0
    column[positives : positives + int(right)] = 1.0
    labels = torch.tensor([[1.0, 0.0]] * positives + [[0.0, 1.0]] * negatives)
    for mode in MODES:
        assert mainstay_code(torch.tensor([[1.0, 0.0]]), column, labels, mode).item() == 1.0


def test_batch_size_does_not_matter_to_the_code() -> None:
    codes, labels = random_bank(9, items=200, bits=64, classes=3, single=False)
    wanted = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).repeat(8, 1)
    together = mainstay_code(wanted, codes, labels, "code")
    assert torch.equal(
        together, torch.cat([mainstay_code(row[None], codes, labels, "code") for row in wanted])
    )


def test_missing_sides_give_zero_pull_not_nan() -> None:
    codes = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for mode in MODES:
        assert mainstay_code(torch.tensor([[1.0, 0.0]]), codes, labels, mode).tolist() == [[1.0, -1.0]]
        assert mainstay_code(torch.tensor([[0.0, 1.0]]), codes, labels, mode).tolist() == [[-1.0, 1.0]]
        # an item without any label has no positives, and unlabelled items of the bank are negatives
        empty = torch.zeros(1, 2)
        assert mainstay_code(empty, codes, torch.zeros(2, 2), mode).tolist() == [[-1.0, 1.0]]


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="'jaccard'"):
        mainstay_code(torch.eye(2), BANK_CODES, BANK_LABELS, "jaccard")  # type: ignore[arg-type]


def test_center_of_cgat_is_the_mainstay_with_its_weights() -> None:
    codes, labels = random_bank(1, items=40, bits=16, classes=4, single=True)
    reference = Reference({"image": codes}, labels)
    wanted = torch.eye(4)
    center = guidance_of(Center(), reference, wanted, 4).codes
    assert torch.equal(center, guidance_of(Mainstay("code"), reference, wanted, 4).codes)
    assert torch.equal(center, mainstay_code(wanted, codes, labels, "cgat"))


def test_center_equals_the_class_code_where_the_negatives_differ() -> None:
    generator = torch.Generator().manual_seed(3)
    own = torch.where(torch.rand(8, generator=generator) < 0.5, -1.0, 1.0)
    labels = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 5)
    opposite = torch.cat([own.repeat(3, 1), -own.repeat(5, 1)])
    wanted = torch.tensor([[1.0, 0.0]])
    assert torch.equal(guidance_of(Center(), Reference({"image": opposite}, labels), wanted).codes[0], own)
    others = torch.where(torch.rand(5, 8, generator=generator) < 0.5, -1.0, 1.0)
    others[:, 0] = own[0]
    others[0, 1] = -own[1]
    mixed = torch.cat([own.repeat(3, 1), others])
    decided = (others != own).any(0)
    found = guidance_of(Center(), Reference({"image": mixed}, labels), wanted).codes[0]
    assert torch.equal(found[decided], own[decided])
    assert bool((found[~decided] == 1.0).all())  # both sides agree there: a tie


def test_codes_of_several_modalities_are_one_bank() -> None:
    codes, labels = random_bank(2, items=20, bits=8, classes=3, single=False)
    both = Reference({"image": codes[:10], "text": codes[10:]}, labels[:10])
    wanted = torch.eye(3)
    expected = mainstay_code(wanted, codes, labels[:10].repeat(2, 1))
    assert torch.equal(guidance_of(Mainstay(), both, wanted, 3).codes, expected)


@pytest.mark.parametrize("items", [1, 3, 9])
def test_the_vote_minimises_the_summed_distance(items: int) -> None:
    codes, _ = random_bank(4, items=items, bits=8, classes=2, single=True)
    reference = Reference({"image": codes}, torch.tensor([[1.0, 0.0]]).repeat(items, 1))
    voted = guidance_of(Anchor(items), reference, torch.tensor([[1.0, 0.0]])).codes[0]

    def summed(code: Tensor) -> float:
        return float(((8 - codes @ code) / 2).sum())

    assert summed(voted) == min(summed(torch.tensor(c)) for c in itertools.product((-1.0, 1.0), repeat=8))


def test_the_vote_uses_exact_label_sets_without_replacement() -> None:
    codes, _ = random_bank(4, items=30, bits=8, classes=2, single=True)
    labels = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 1.0]] * 21)
    reference = Reference({"image": codes}, labels)
    voted = guidance_of(Anchor(9), reference, torch.tensor([[1.0, 0.0]])).codes[0]
    assert torch.equal(
        voted, torch.where(codes[:9].sum(0) >= 0, 1.0, -1.0)
    )  # exactly nine exist: each counts once
    one = guidance_of(Anchor(1), reference, torch.tensor([[1.0, 1.0]]).repeat(40, 1), 40).codes
    allowed = {tuple(row) for row in codes[9:].tolist()}
    assert {tuple(row) for row in one.tolist()} <= allowed
    assert len({tuple(row) for row in one.tolist()}) > 3  # drawn, and anew for each query


def test_without_the_exact_label_set_those_vote_that_have_all_labels_else_those_that_share_one() -> None:
    codes, _ = random_bank(4, items=12, bits=8, classes=4, single=True)
    labels = torch.tensor(
        [[1.0, 0, 0, 0]] * 3 + [[0, 1.0, 0, 0]] * 3 + [[1.0, 1.0, 0, 0]] * 3 + [[0, 1.0, 1.0, 0]] * 3
    )
    reference = Reference({"image": codes}, labels)

    def voted(*wanted: float) -> torch.Tensor:
        return guidance_of(Anchor(99), reference, torch.tensor([wanted])).codes[0]

    def vote(*rows: int) -> torch.Tensor:
        return torch.where(codes[list(rows)].sum(0) >= 0, 1.0, -1.0)

    assert torch.equal(voted(0, 1, 0, 0), vote(3, 4, 5))  # exactly these, though others have them too
    assert torch.equal(voted(0, 0, 1, 0), vote(9, 10, 11))  # all of them, and more
    assert torch.equal(voted(1, 1, 1, 0), vote(*range(12)))  # none has all three: any shared label
    assert torch.equal(voted(0, 0, 1, 1), vote(9, 10, 11))
    both = guidance_of(Anchor(99), reference, torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 1]]), 2).codes
    assert torch.equal(both, torch.stack([vote(3, 4, 5), vote(9, 10, 11)]))  # each query has its own rule
    with pytest.raises(ValueError, match="no reference item shares a label with the target of query 0"):
        voted(0, 0, 0, 1)


def test_fewer_than_nine_are_all_taken() -> None:
    codes, _ = random_bank(8, items=4, bits=8, classes=2, single=True)
    labels = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    voted = guidance_of(Anchor(9), Reference({"image": codes}, labels), torch.tensor([[1.0, 0.0]])).codes[0]
    assert torch.equal(voted, torch.where(codes[:3].sum(0) >= 0, 1.0, -1.0))


def test_positives_share_a_label_and_weigh_one_in_all() -> None:
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    found = guidance_of(Positives(), Reference({"image": BANK_CODES}, BANK_LABELS), wanted, 3)
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0, 1.0]])
    torch.testing.assert_close(found.weights, expected)
    own = guidance_of(Own(), None, None, 3).codes[2]  # a query without positives follows its own clean code
    assert torch.equal(found.codes[4], torch.where(own >= 0, 1.0, -1.0))


@pytest.mark.parametrize(
    "guide", [Mainstay(), Center(), Anchor(9), Positives()], ids=lambda g: type(g).__name__
)
def test_guides_that_need_labels_say_so(guide: object) -> None:
    reference = Reference({"image": BANK_CODES}, BANK_LABELS)
    for known, wanted in [
        (None, torch.eye(2)[:1]),
        (Reference({"image": BANK_CODES}, None), torch.eye(2)[:1]),
        (reference, None),
    ]:
        with pytest.raises(ValueError, match="labelled"):
            guidance_of(guide, known, wanted)
