"""Cross-modal objectives against hand-made values, closed forms and naive loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import facts_of, image_batch, memory_of, output_of
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.types import Batch, HashOutput, Outputs
from robusthash.objectives import CPAH, DADH, DAPH, DCMH, CodeMemory
from robusthash.objectives.cross_modal import critic_loss, deceive, gradient_penalty
from robusthash.objectives.dadh import discrete_step, unit, weighted_triplets
from robusthash.objectives.daph import proxy_softmax, weighted_softmax


def linear(code: Tensor) -> HashOutput:
    """An output of a linear head: the code is the logits."""
    return HashOutput(code, code, code, {"private": -code})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multi_hot(rows: int, classes: int, seed: int = 0) -> Tensor:
    labels = (torch.rand(rows, classes, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
    labels[torch.arange(rows), torch.arange(rows) % classes] = 1.0
    return labels


def pair_world(rows: int = 6, bits: int = 4, scale: float = 1.0) -> tuple[Outputs, Batch, CodeMemory]:
    """Linear outputs of both modalities, their batch, and a memory of other codes."""
    labels = multi_hot(rows, 3)
    outputs = {name: linear(scale * draw(rows, bits, seed=n)) for n, name in enumerate(("image", "text"))}
    banks = {name: draw(rows, bits, seed=n + 5) for n, name in enumerate(("image", "text"))}
    return outputs, image_batch(torch.zeros(rows, 2), labels), memory_of(banks, labels)


# --- DCMH


@pytest.mark.parametrize("bits", [8, 128])
def test_dcmh_of_one_class_at_its_joint_code(bits: int) -> None:
    """F = G = B: each pair costs ln(1 + e^(-K/2)), and nothing else but the imbalance of a single code."""
    code, labels = sign(draw(1, bits)).repeat(5, 1), torch.ones(5, 1)
    outputs = {"image": linear(code), "text": linear(code)}
    memory = memory_of({"image": code, "text": code}, labels)
    terms = DCMH()(outputs, image_batch(torch.zeros(5, 2), labels), memory)
    assert terms["similarity"].item() == pytest.approx(math.log1p(math.exp(-bits / 2)), rel=1e-5)
    assert terms["regularisation"].item() == 0.0
    assert terms["balance"].item() == pytest.approx(0.1)  # eta times mean_k 1


def test_dcmh_gradient_of_a_pair_is_half_sigmoid_minus_similarity_times_the_other_code() -> None:
    code, bank = draw(1, 6).double().requires_grad_(True), draw(3, 6, seed=1).double()
    labels, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    objective = DCMH()
    (grad,) = torch.autograd.grad(objective.similarity(linear(code), labels, bank, theirs).sum(), code)
    theta, similar = (code.detach() @ bank.T / 2)[0], torch.tensor([1.0, 0.0, 1.0]).double()
    expected = (0.5 * (torch.sigmoid(theta) - similar)[:, None] * bank).mean(0)
    torch.testing.assert_close(grad[0], expected)
    for bit in range(6):  # and by finite differences
        step = torch.zeros(1, 6).double()
        step[0, bit] = 1e-5
        up, down = (
            objective.similarity(linear(code.detach() + s), labels, bank, theirs) for s in (step, -step)
        )
        assert ((up - down) / 2e-5).item() == pytest.approx(expected[bit].item(), rel=1e-5)


def test_dcmh_compares_with_the_other_modality_alone() -> None:
    outputs, batch, memory = pair_world()
    labels = batch.labels
    value = DCMH()(outputs, batch, memory)["similarity"]
    across = []
    for name, other in (("image", "text"), ("text", "image")):
        theta = outputs[name].code @ memory.codes[other].T / 2
        similar = (labels @ labels.T > 0).float()
        across.append((torch.log1p(torch.exp(theta)) - similar * theta).mean())
    assert value.item() == pytest.approx(float(sum(across)) / 2, rel=1e-5)


def test_dcmh_joint_code_is_the_sign_of_the_sum_and_is_held_constant() -> None:
    outputs, batch, memory = pair_world()
    batch = replace(batch, ids=torch.tensor([3, 1, 0, 5, 2, 4]))
    joint = sign(memory.codes["image"] + memory.codes["text"])[batch.ids]
    assert torch.equal(DCMH().joint(memory, batch), joint)
    expected = sum((o.code - joint).square().mean() for o in outputs.values()) / 2
    terms = DCMH(gamma=0.7, eta=0.3)(outputs, batch, memory)
    assert terms["regularisation"].item() == pytest.approx(0.7 * float(expected), rel=1e-5)
    spread = sum(o.code.mean(0).square().mean() for o in outputs.values()) / 2
    assert terms["balance"].item() == pytest.approx(0.3 * float(spread), rel=1e-5)


def test_dcmh_of_huge_logits_is_finite() -> None:
    outputs, batch, memory = pair_world(bits=128, scale=1e3)
    assert all(torch.isfinite(term) for term in DCMH()(outputs, batch, memory).values())


def test_dcmh_over_images_alone_compares_images_with_images() -> None:
    outputs, batch, memory = pair_world()
    images = {"image": outputs["image"]}
    alone = memory_of({"image": memory.codes["image"]}, batch.labels)
    value = DCMH()(images, batch, alone)["similarity"]
    expected = DCMH().similarity(outputs["image"], batch.labels, memory.codes["image"], batch.labels).mean()
    assert torch.equal(value, expected)
    against_text = DCMH()(images, batch, memory)["similarity"]  # an attacked image of a hasher of both
    expected = DCMH().similarity(outputs["image"], batch.labels, memory.codes["text"], batch.labels).mean()
    assert torch.equal(against_text, expected)


@pytest.mark.parametrize("make", [DCMH, CPAH])
def test_balanced_pairs_weigh_the_same_in_total(make: type) -> None:
    labels = torch.eye(5)[torch.arange(40) % 5]
    objective = make(balance=True)
    objective.setup(facts_of(labels, 8, widths={"image": 8, "text": 8}))
    assert objective.similar_weight.item() == pytest.approx(4.0)
    values = objective.similarity(linear(torch.zeros(40, 8)), labels, draw(40, 8), labels)
    assert values.mean().item() == pytest.approx(1.6 * math.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="all 4 training items have the same"):
        make(balance=True).setup(facts_of(torch.ones(4, 1), 8, widths={"image": 8, "text": 8}))


# --- DADH


def test_dadh_triplets_equal_the_triple_loop() -> None:
    code, bank = draw(5, 6).double(), draw(9, 6, seed=1).double()
    labels, theirs = multi_hot(5, 4).double(), multi_hot(9, 4, seed=2).double()
    expected = []
    for h, y in zip(unit(code), labels, strict=True):
        total = weight = 0.0
        negatives = [u for u, z in zip(unit(bank), theirs, strict=True) if float(y @ z) == 0]
        for u, z in zip(unit(bank), theirs, strict=True):
            if (shared := float(y @ z)) > 0:
                hinges = [max(0.0, float(h @ v) - float(h @ u) + 0.4) for v in negatives]
                total += (2**shared - 1) * sum(hinges) / max(len(hinges), 1)
                weight += 2**shared - 1
        expected.append(total / weight)
    assert max(expected) > 0.1
    value = weighted_triplets(code, labels, bank, theirs, 0.4)
    assert value.tolist() == pytest.approx(expected, rel=1e-6)


def test_dadh_triplets_have_the_gradient_of_the_loop() -> None:
    code, bank = draw(4, 6).double().requires_grad_(True), draw(8, 6, seed=1).double()
    labels, theirs = torch.eye(4).double(), torch.eye(4).repeat(2, 1).double()
    (grad,) = torch.autograd.grad(weighted_triplets(code, labels, bank, theirs, 0.4).sum(), code)
    distance = 1 - unit(code) @ unit(bank).T
    near, far = (labels @ theirs.T > 0).double(), (labels @ theirs.T == 0).double()
    hinge = (distance[:, :, None] - distance[:, None, :] + 0.4).relu()
    plain = ((hinge * near[:, :, None] * far[:, None, :]).sum((1, 2)) / (near.sum(1) * far.sum(1))).sum()
    (expected,) = torch.autograd.grad(plain, code)
    torch.testing.assert_close(grad, expected)


def test_dadh_triplets_are_zero_beyond_the_margin_and_without_triplets() -> None:
    labels = torch.eye(2)
    apart = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert torch.equal(weighted_triplets(apart, labels, apart, labels, 0.4), torch.zeros(2))
    assert torch.equal(
        weighted_triplets(apart, torch.ones(2, 2), apart, labels, 0.4), torch.zeros(2)
    )  # no negative
    assert torch.equal(
        weighted_triplets(apart, torch.zeros(2, 2), apart, labels, 0.4), torch.zeros(2)
    )  # no positive
    swapped = weighted_triplets(apart, labels, -apart, labels, 0.4)
    assert swapped.tolist() == pytest.approx([2.4, 2.4])


def test_dadh_discrete_step_leaves_class_codes_fixed() -> None:
    """Orthogonal codes of one-hot classes, mu = 0: B is already the sign of what its labels regress to."""
    codes = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    which = torch.arange(12) % 4
    joint, labels = codes[which], torch.eye(4)[which]
    assert torch.equal(discrete_step(joint, labels, draw(12, 4), 0.0, 1.0), joint)
    flipped = joint.clone()
    flipped[0] = -flipped[0]  # one item of three against its class is brought back
    assert torch.equal(discrete_step(flipped, labels, draw(12, 4), 0.0, 1.0), joint)


def test_dadh_discrete_step_is_the_ridge_regression() -> None:
    labels, joint, relaxed = multi_hot(20, 5), sign(draw(20, 8)), draw(20, 8, seed=1)
    inverse = torch.linalg.inv(labels.T @ labels + 0.5 * torch.eye(5))
    expected = sign(labels @ inverse @ labels.T @ joint + 0.3 * relaxed)
    assert torch.equal(discrete_step(joint, labels, relaxed, 0.3, 0.5), expected)
    unlabelled = discrete_step(joint, torch.zeros(20, 5), relaxed, 0.0, 1.0)
    assert torch.equal(unlabelled, joint)  # zeros keep the old bit


def test_dadh_takes_the_solved_code_after_an_epoch() -> None:
    _, batch, memory = pair_world()
    objective = DADH()
    objective.setup(facts_of(batch.labels, 4, widths={"image": 4, "text": 4}))
    before = sign(memory.codes["image"] + memory.codes["text"])
    assert torch.equal(objective.joint(memory, batch), before)
    objective.end_epoch(memory)
    relaxed = (memory.codes["image"] + memory.codes["text"]) / 2
    solved = discrete_step(before, batch.labels, relaxed, 1e-5, 1.0)
    assert torch.equal(objective.joint(memory, batch), solved)
    assert not torch.equal(solved, before)
    assert set(objective.joint_codes.unique().tolist()) == {-1.0, 1.0}


class Affine(nn.Module):
    """A critic w . x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight


def test_gradient_penalty_of_linear_critics() -> None:
    real, fake, mix = draw(5, 4), draw(5, 4, seed=1), torch.rand(5, 1)
    weight = unit(draw(1, 4, seed=2))[0]
    assert gradient_penalty(Affine(weight), real, fake, mix).item() == pytest.approx(0.0, abs=1e-10)
    assert gradient_penalty(Affine(3 * weight), real, fake, mix).item() == pytest.approx(4.0, rel=1e-5)
    flat = Affine(torch.zeros(4))
    penalty = gradient_penalty(flat, real, fake, mix)
    assert penalty.item() == pytest.approx(1.0, rel=1e-4)
    assert torch.isfinite(
        torch.autograd.grad(penalty, flat.weight)[0]
    ).all()  # where the norm has no derivative


def test_gradient_penalty_is_taken_between_real_and_fake() -> None:
    class Square(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values.square().sum(1) / 2  # gradient: the point itself

    real, fake = torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert gradient_penalty(Square(), real, fake, torch.tensor([[0.25]])).item() == pytest.approx(1.0)  # at 2


def test_an_undecided_critic_costs_log_two() -> None:
    flat, values = Affine(torch.zeros(4)), draw(5, 4)
    assert deceive(flat, values).item() == pytest.approx(math.log(2))
    assert critic_loss(flat, values, -values, torch.rand(5, 1), 0.0).item() == pytest.approx(2 * math.log(2))
    sure = Affine(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    assert torch.isfinite(deceive(sure, values))


# --- CPAH


def test_cpah_consistency_of_an_undecided_classifier_is_log_three() -> None:
    outputs, batch, _ = pair_world()
    objective = CPAH()
    objective.setup(facts_of(batch.labels, 4, widths={"image": 4, "text": 4}))
    with torch.no_grad():
        for parameter in objective.classifiers["consistency"].parameters():
            parameter.zero_()
    assert objective.consistency(outputs).item() == pytest.approx(math.log(3))
    assert objective.consistency({"text": outputs["text"]}).item() == pytest.approx(math.log(3))


def test_cpah_consistency_is_on_the_classifier_and_tells_the_three_kinds() -> None:
    """Features that say what they are, and a classifier that reads them off."""
    common, image, text = (torch.eye(3)[[kind] * 4] for kind in (1, 0, 2))
    outputs = {
        "image": HashOutput(draw(4, 3), draw(4, 3), common, {"private": image}),
        "text": HashOutput(draw(4, 3), draw(4, 3), common, {"private": text}),
    }
    objective = CPAH()
    objective.setup(facts_of(torch.eye(4), 3, widths={"image": 3, "text": 3}))
    objective.classifiers["consistency"] = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        objective.classifiers["consistency"].weight.copy_(50 * torch.eye(3))
    assert objective.consistency(outputs).item() < 1e-6
    swapped = {
        name: replace(o, features=o.aux["private"], aux={"private": common}) for name, o in outputs.items()
    }
    assert objective.consistency(swapped).item() > 40


def test_cpah_asks_for_its_encoders() -> None:
    outputs, batch, memory = pair_world()
    objective = CPAH()
    objective.setup(facts_of(batch.labels, 4, widths={"image": 4, "text": 4}))
    bare = {name: replace(output, aux={}) for name, output in outputs.items()}
    with pytest.raises(ValueError, match="name: cpah, inner"):
        objective(bare, batch, memory)


@pytest.mark.parametrize("make", [DADH, CPAH])
def test_feature_critics_need_one_width(make: type) -> None:
    with pytest.raises(ValueError, match=r"widths differ: .*hasher\.text\.widths"):
        make().setup(facts_of(torch.eye(4), 4, widths={"image": 4, "text": 5}))


# --- DAPH


def test_daph_golden_pair() -> None:
    """Own anchor at 1, one orthogonal negative: ln(1 + e^(-g (1 - sigma)))."""
    anchors, labels = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.eye(2)
    objective = DAPH(slope=20.0, margin=0.2)
    value = objective.similarity(linear(anchors), labels, anchors, labels)
    assert value.tolist() == pytest.approx([math.log1p(math.exp(-16.0))] * 2, rel=1e-3)
    soft = DAPH(slope=1.0, margin=0.5).similarity(linear(anchors), labels, anchors, labels)
    assert soft.tolist() == pytest.approx([math.log1p(math.exp(-0.5))] * 2, rel=1e-6)


def test_daph_equals_the_naive_loop() -> None:
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]]).double()
    theirs = torch.tensor(
        [[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1]]
    ).double()
    code, anchors = torch.tanh(draw(2, 5)).double(), sign(draw(6, 5, seed=1)).double()
    g, sigma, eta, expected = 3.0, 0.2, 0.7, []
    for h, y in zip(code, labels, strict=True):
        s = [float(h @ a) / 5 for a in anchors]
        shared = [float(y @ z) for z in theirs]
        against = sum(math.exp(g * s[j]) for j in range(6) if shared[j] == 0)
        same = [j for j in range(6) if torch.equal(y, theirs[j])]
        part = [j for j in range(6) if shared[j] > 0 and j not in same]
        mean = sum(shared[j] * s[j] for j in part) / sum(shared[j] for j in part)
        terms = [math.log(1 + against / math.exp(g * (s[j] - sigma))) for j in same]
        expected.append(sum(terms) / len(same) + eta * math.log(1 + against / math.exp(g * (mean - sigma))))
    value = DAPH(slope=g, margin=sigma, eta=eta).similarity(linear(code), labels, anchors, theirs)
    assert value.tolist() == pytest.approx(expected, rel=1e-6)


def test_daph_without_negatives_or_positives_is_zero_with_a_finite_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    yes, no = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    for value in (
        proxy_softmax(logits, yes, no, 20.0, 0.2),
        proxy_softmax(logits, no, yes, 20.0, 0.2),
        weighted_softmax(logits, torch.zeros(2, 3), yes, 20.0, 0.2),
    ):
        assert torch.equal(value.detach(), torch.zeros(2))
        assert torch.isfinite(torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]).all()


def test_daph_class_loss_of_one_class_is_the_softmax_against_the_others() -> None:
    labels, classes = torch.eye(3)[:1], torch.tensor([[1.0, 1.0, 1.0, 1.0], [1, -1, 1, -1], [1, 1, -1, -1]])
    objective = DAPH(slope=2.0, margin=0.25)
    objective.class_codes = classes
    expected = math.log1p(2 * math.exp(-2.0 * 0.75))
    assert objective._class_loss(classes[:1], labels).item() == pytest.approx(expected, rel=1e-5)


def test_daph_needs_a_first_stage() -> None:
    with pytest.raises(ValueError, match="proxy_epochs must be at least 1"):
        DAPH(proxy_epochs=0)


def test_daph_stage_two_pulls_to_the_anchors_of_both_modalities() -> None:
    labels = torch.eye(2)[[0, 1, 0, 1]]
    objective = DAPH(proxy_epochs=1)
    objective.setup(facts_of(labels, 4, widths={"image": 4, "text": 4}))
    outputs = {name: output_of(draw(4, 4, seed=n)) for n, name in enumerate(("image", "text"))}
    batch, memory = (
        image_batch(torch.zeros(4, 2), labels),
        memory_of({"image": draw(4, 4), "text": draw(4, 4)}, labels),
    )
    first = objective(outputs, batch, memory)
    assert set(first) == {"proxies", "crowding", "polarisation", "balance"}
    proxies = objective.anchors.clone()
    torch.testing.assert_close(proxies.norm(dim=2), torch.ones(2, 4))
    objective.end_epoch(memory)
    assert objective.stage == 2
    assert torch.equal(objective.anchors, sign(proxies))
    second = objective(outputs, batch, memory)
    values = [
        objective.similarity(o, labels, a, labels).mean() for o in outputs.values() for a in sign(proxies)
    ]
    assert second["similarity"].item() == pytest.approx(float(sum(values)) / 2, rel=1e-6)
    objective.end_epoch(memory)
    assert torch.equal(objective.anchors, sign(proxies))  # frozen from here on
