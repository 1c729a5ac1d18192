"""Hashing objectives against hand-made values, closed forms and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import facts_of, image_batch, memory_of, output_of
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, softplus
from torch.profiler import ProfilerActivity, profile

from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives import CSQ, DPH, DPSH, HashNet
from robusthash.objectives import centers as centers_module
from robusthash.objectives.base import quantisation, share_similar
from robusthash.objectives.centers import hadamard_centers


def coded(code: Tensor) -> HashOutput:
    """An output with exactly this relaxed code."""
    return HashOutput(torch.atanh(code.clamp(-1 + 1e-7, 1 - 1e-7)), code, code, {})


def random_signs(rows: int, bits: int, seed: int = 0) -> Tensor:
    return torch.where(torch.rand(rows, bits, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)


def hamming(left: Tensor, right: Tensor) -> Tensor:
    return (left.shape[1] - left @ right.T) / 2


# --- DPH


def test_dph_is_zero_for_equal_and_opposite_codes_and_one_for_zero_codes() -> None:
    one = random_signs(1, 16)
    codes = torch.cat([one, one, -one])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    objective = DPH()
    assert torch.equal(objective.similarity(coded(codes), labels, codes, labels), torch.zeros(3))
    assert torch.equal(objective.similarity(coded(torch.zeros(3, 16)), labels, codes, labels), torch.ones(3))
    assert torch.equal(objective.regularisation(coded(codes)), torch.zeros(3))


def test_dph_equals_the_double_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    code, bank = torch.rand(4, 6, generator=generator) * 2 - 1, torch.rand(7, 6, generator=generator) * 2 - 1
    labels, bank_labels = (torch.rand(4, 3, generator=generator) < 0.5).float(), torch.eye(3).repeat(3, 1)[:7]
    expected = []
    for h, y in zip(code.double(), labels, strict=True):
        terms = [
            (float(h @ u) / 6 - (1.0 if float(y @ z) > 0 else -1.0)) ** 2
            for u, z in zip(bank.double(), bank_labels, strict=True)
        ]
        expected.append(sum(terms) / len(terms))
    assert DPH().similarity(coded(code), labels, bank, bank_labels).tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_balanced_dph_is_the_mean_over_similar_pairs_plus_that_over_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.eye(4)[torch.arange(40) % 4]
    code, bank = (
        torch.rand(40, 6, generator=generator) * 2 - 1,
        torch.rand(40, 6, generator=generator) * 2 - 1,
    )
    objective = DPH(balance=True)
    objective.setup(facts_of(labels, 6))
    assert objective.similar_weight.item() == pytest.approx(3.0)  # #dissimilar / #similar
    similar, other = [], []
    for h, y in zip(code.double(), labels, strict=True):
        for u, z in zip(bank.double(), labels, strict=True):
            (similar if float(y @ z) > 0 else other).append(
                (float(h @ u) / 6 - (1 if float(y @ z) > 0 else -1)) ** 2
            )
    share = 0.75  # of pairs that are dissimilar: both means weigh as much as these pairs do
    expected = share * (sum(similar) / len(similar) + sum(other) / len(other))
    found = objective.similarity(coded(code), labels, bank, labels).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_balanced_dph_keeps_its_weight_with_the_model_and_plain_dph_needs_none() -> None:
    labels = torch.eye(5)[torch.arange(40) % 5]
    trained, loaded = DPH(balance=True), DPH(balance=True)
    trained.setup(facts_of(labels, 6))
    loaded.load_state_dict(trained.saved_state())
    assert loaded.similar_weight.item() == pytest.approx(4.0)
    assert DPH().saved_state() == {}  # what models trained before there was a balance hold
    with pytest.raises(ValueError, match="there is no pair to tell apart"):
        DPH(balance=True).setup(facts_of(torch.ones(4, 1), 6))


# --- DPSH


def test_dpsh_golden_pair() -> None:
    h, u = torch.tensor([[0.5, -0.5, 1.0, 0.0]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert DPSH().similarity(coded(h), same, u, same).item() == pytest.approx(0.313262, abs=1e-6)
    assert DPSH().similarity(coded(h), same, u, other).item() == pytest.approx(1.313262, abs=1e-6)


def test_dpsh_of_a_zero_code_is_log_two() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    values = DPSH().similarity(coded(torch.zeros(2, 8)), labels, random_signs(2, 8), labels)
    assert values.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("similar", [0.0, 1.0])
def test_dpsh_derivative_to_omega_is_sigmoid_minus_similarity(similar: float) -> None:
    code = torch.tensor([[0.3, -0.8, 0.1, 0.9]], requires_grad=True)
    u = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    labels, others = torch.tensor([[1.0, 0.0]]), torch.tensor([[similar, 1.0 - similar]])
    (grad,) = torch.autograd.grad(DPSH().similarity(coded(code), labels, u, others).sum(), code)
    omega = (code @ u.T).item() / 2
    expected = (1 / (1 + math.exp(-omega)) - similar) * u / 2  # d Omega / d h = u / 2
    torch.testing.assert_close(grad, expected)


def test_dpsh_falls_with_omega_for_a_similar_pair_and_stays_finite() -> None:
    u, label = torch.ones(1, 4), torch.tensor([[1.0]])
    values = [
        DPSH().similarity(coded(torch.full((1, 4), v)), label, u, label).item() for v in (-0.9, 0.0, 0.9)
    ]
    assert values[0] > values[1] > values[2]
    for size in (1e4, -1e4):
        unbounded = HashOutput(torch.full((1, 4), size), torch.full((1, 4), size), torch.zeros(1, 4))
        assert torch.isfinite(DPSH().similarity(unbounded, label, u, label)).all()
        assert torch.isfinite(DPSH().regularisation(unbounded)).all()


def test_dpsh_balance_gives_both_sides_the_same_total_weight() -> None:
    labels = torch.eye(5)[torch.arange(40) % 5]
    objective = DPSH(balance=True)
    facts = facts_of(labels, 8)
    objective.setup(facts)
    assert facts.share_similar == pytest.approx(0.2)
    assert objective.similar_weight.item() == pytest.approx(4.0)  # #dissimilar / #similar
    # with zero codes every pair costs log 2, so the mean shows the weights: 0.2 * 4 + 0.8 * 1
    values = objective.similarity(coded(torch.zeros(40, 8)), labels, random_signs(40, 8), labels)
    assert values.mean().item() == pytest.approx(1.6 * math.log(2), rel=1e-5)
    plain = DPSH()
    plain.setup(facts)
    assert plain.similar_weight.item() == 1.0


def test_quantisation_is_zero_at_the_signs_and_its_gradient_too() -> None:
    code = torch.tensor([[1.0, -1.0, 0.5, -0.25]], requires_grad=True)
    value = quantisation(coded(code))
    assert value.item() == pytest.approx((0.25 + 0.5625) / 4)
    (grad,) = torch.autograd.grad(value.sum(), code)
    assert grad[0].tolist() == pytest.approx([0.0, 0.0, -0.25, 0.375])  # 2 (h - sgn h) / K
    torch.testing.assert_close(DPSH(eta=0.3).regularisation(coded(code)), 0.3 * value)


# --- HashNet


def test_hashnet_is_the_mean_over_similar_plus_the_mean_over_other_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.eye(3)[torch.randint(3, (20,), generator=generator)]
    logits = torch.randn(20, 8, generator=generator)
    bank = torch.tanh(torch.randn(20, 8, generator=generator))
    objective = HashNet()
    objective.setup(facts_of(labels, 8))
    value = objective.similarity(output_of(logits), labels, bank, labels).mean()
    similar = labels @ labels.T > 0
    t = torch.tanh(logits) @ bank.T * 10 / 8
    pairs = softplus(t) - similar * t
    assert value.item() == pytest.approx((pairs[similar].mean() + pairs[~similar].mean()).item(), rel=1e-5)


def test_hashnet_slope_never_falls_and_rises_every_200_steps() -> None:
    objective = HashNet()
    slopes = []
    for _ in range(1001):
        slopes.append(objective.beta)
        objective.advance()
    assert slopes == sorted(slopes)
    assert slopes[0] == slopes[199] == 1.0
    assert slopes[200] == slopes[399] == pytest.approx(math.sqrt(2.0))
    assert slopes[1000] == pytest.approx(math.sqrt(6.0))
    steep, soft = HashNet(), HashNet()
    steep.load_state_dict(objective.state_dict())
    assert steep.beta == objective.beta > soft.beta  # resuming keeps it


def test_hashnet_uses_its_slope() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    output, bank = output_of(torch.tensor([[0.2, 0.1], [-0.3, 0.2]])), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    objective = HashNet(every=1, gamma=3.0)
    objective.setup(facts_of(labels, 2))
    objective.advance()  # beta = sqrt(1 + 3) = 2
    t = torch.tanh(2 * output.logits) @ bank.T * 5
    similar = torch.eye(2)
    expected = (2.0 * (softplus(t) - similar * t)).mean(1)
    torch.testing.assert_close(objective.similarity(output, labels, bank, labels), expected)


# --- CSQ


def csq_with(centers: Tensor, filler: Tensor | None = None, **options: float) -> CSQ:
    objective = CSQ(**options)
    objective.centers = centers
    objective.filler = torch.ones(centers.shape[1]) if filler is None else filler
    return objective


def test_csq_golden_bit() -> None:
    objective = csq_with(torch.tensor([[1.0]]), quantisation=0.5)
    output = output_of(torch.tensor([[0.3]]))
    value = objective.similarity(output, torch.ones(1, 1), torch.empty(0), torch.empty(0))
    assert value.item() == pytest.approx(0.437488, abs=1e-6)
    assert objective.regularisation(output).item() == pytest.approx(0.5 * (math.tanh(0.3) - 1) ** 2)


def test_csq_is_the_binary_cross_entropy_of_the_relaxed_code() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    centers = random_signs(3, 8).double()
    labels = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 1])]
    value = csq_with(centers).similarity(output_of(logits), labels, torch.empty(0), torch.empty(0))
    target = (1 + labels @ centers) / 2
    expected = binary_cross_entropy((1 + torch.tanh(logits)) / 2, target, reduction="none").mean(1)
    torch.testing.assert_close(value, expected)
    huge = csq_with(centers).similarity(output_of(logits * 1e6), labels, torch.empty(0), torch.empty(0))
    assert torch.isfinite(huge).all()


def test_random_rows_are_as_far_apart_and_repeat_no_bits() -> None:
    first, random = (hadamard_centers(6, 32, Draws(0), each) for each in (False, True))
    assert torch.equal(first, torch.from_numpy(hadamard(32)).float()[:6])
    assert (len(first.unique(dim=1).T), len(random.unique(dim=1).T)) == (8, 32)
    assert torch.equal(random @ random.T, 32 * torch.eye(6)), "half of the bits apart"
    assert torch.equal(random, hadamard_centers(6, 32, Draws(0), True))
    many = hadamard_centers(70, 32, Draws(0), True)
    assert len(many.unique(dim=0)) == 70


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("classes", [2, 10, 16])
def test_hadamard_centers_are_half_the_bits_apart(classes: int, bits: int) -> None:
    centers = hadamard_centers(classes, bits, Draws(0))
    gaps = hamming(centers, centers)
    assert torch.equal(gaps, bits / 2 * (1 - torch.eye(classes)))


def test_second_half_of_the_centers_are_complements() -> None:
    centers = hadamard_centers(32, 16, Draws(0))
    assert torch.equal(centers[16:], -centers[:16])
    assert len({tuple(row) for row in centers.tolist()}) == 32


@pytest.mark.parametrize(("classes", "bits"), [(80, 16), (80, 32), (21, 48), (100, 64), (38, 12)])
def test_general_centers(classes: int, bits: int) -> None:
    """More classes than 2K, or a K that is no power of two: where one public code fails."""
    centers = hadamard_centers(classes, bits, Draws(3))
    assert centers.shape == (classes, bits)
    assert set(centers.unique().tolist()) == {-1.0, 1.0}
    known = 2 * bits if bits & (bits - 1) == 0 else 0
    drawn = centers[min(known, classes) :]
    gaps = (bits - centers @ centers.T) / 2
    if bits > 20:  # drawn, not words of a greedy code
        assert bool(((drawn == -1).sum(1) == bits // 2).all())  # balanced
    else:
        assert gaps[~torch.eye(classes, dtype=torch.bool)].min() >= 4
    assert len({tuple(row) for row in centers.tolist()}) == classes  # no two classes share a center
    assert torch.equal(centers, hadamard_centers(classes, bits, Draws(3)))
    if len(drawn):
        assert not torch.equal(centers, hadamard_centers(classes, bits, Draws(4)))


def test_centers_are_far_apart_where_there_is_room() -> None:
    centers = hadamard_centers(20, 48, Draws(0))
    gaps = hamming(centers, centers)[~torch.eye(20, dtype=torch.bool)]
    assert gaps.min() > 12
    assert gaps.mean() >= 24


def test_csq_single_label_item_gets_its_class_center_and_ties_the_filler() -> None:
    labels = torch.eye(4)
    objective = CSQ()
    objective.setup(facts_of(labels, 8))
    assert torch.equal(objective.targets(labels), objective.centers)
    two = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    total = objective.centers[0] + objective.centers[1]
    target = objective.targets(two)[0]
    assert torch.equal(target[total != 0], total[total != 0].sign())
    assert torch.equal(target[total == 0], objective.filler[total == 0])
    assert bool((total == 0).any())
    assert set(objective.filler.unique().tolist()) <= {-1.0, 1.0}


# --- what they share


def test_share_similar_counts_ordered_pairs_in_blocks() -> None:
    labels = (torch.rand(37, 4, generator=torch.Generator().manual_seed(5)) < 0.3).float()
    naive = sum(float(a @ b) > 0 for a in labels for b in labels) / 37**2
    assert share_similar(labels, block=5) == share_similar(labels) == pytest.approx(naive)


def test_two_modalities_average_over_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(6)
    labels = torch.eye(2)[torch.tensor([0, 1, 0, 1])]
    outputs = {m: output_of(torch.randn(4, 8, generator=generator)) for m in ("image", "text")}
    banks = {m: torch.tanh(torch.randn(4, 8, generator=generator)) for m in ("image", "text")}
    batch = image_batch(torch.zeros(4, 2), labels)
    objective = DPSH()
    terms = objective(outputs, batch, memory_of(banks, labels))
    pairs = [
        objective.similarity(outputs[a], labels, banks[b], labels).mean() for a in outputs for b in outputs
    ]
    assert len(pairs) == 4
    assert terms["similarity"].item() == pytest.approx(float(sum(pairs)) / 4, rel=1e-6)
    single = [objective.regularisation(outputs[m]).mean() for m in outputs]
    assert terms["regularisation"].item() == pytest.approx(float(sum(single)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("classes", "bits", "greedy"),
    [(10, 4, 1), (10, 5, 2), (38, 8, 2), (81, 8, 2), (100, 8, 2), (81, 12, 4), (100, 12, 4), (200, 12, 3),
     (100, 16, 6), (345, 16, 4), (16, 4, 1), (17, 5, 1)],
)  # fmt: skip
def test_odd_sizes_have_centers_as_far_apart_as_a_greedy_code(classes: int, bits: int, greedy: int) -> None:
    centers = hadamard_centers(classes, bits, Draws(0, ("csq",)))
    gaps = (bits - centers @ centers.T) / 2
    gaps.fill_diagonal_(bits)
    assert centers.shape == (classes, bits)
    assert set(centers.unique().tolist()) == {-1.0, 1.0}
    assert gaps.min() >= greedy
    assert (centers.mean(0).abs() < 1).all()  # no bit is the same for all classes
    assert torch.equal(centers, hadamard_centers(classes, bits, Draws(0, ("csq",))))


def test_more_classes_than_words_are_refused() -> None:
    with pytest.raises(ValueError, match="17 classes need centers of their own, and 4 bits have 16 words"):
        hadamard_centers(17, 4, Draws(0))


def test_distances_of_centers_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.where(torch.rand(23, 24, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    gaps = (24 - drawn @ drawn.T) / 2
    apart = gaps[~torch.eye(23, dtype=torch.bool)]
    monkeypatch.setattr(centers_module, "_PAIRS", 5 * 23)
    least, mean = centers_module._distances(drawn)
    assert (least, mean) == (float(apart.min()), pytest.approx(float(apart.double().mean())))


def test_distances_of_many_centers_take_bounded_memory() -> None:
    """Blocks of rows of one size would hold 4096 x 6000 distances, 98 MB."""
    drawn = torch.where(torch.rand(6000, 16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        centers_module._distances(drawn)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert largest <= 8 * centers_module._PAIRS
