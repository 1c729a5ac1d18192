"""SSAH, AGAH and DCPH against loops and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import facts_of, image_batch, memory_of, train_config
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, Outputs
from robusthash.data import load_data
from robusthash.models import build_hasher
from robusthash.objectives import AGAH, DCPH, SSAH, CodeMemory, HashObjective
from robusthash.objectives.agah import ClassAttention, solved_map
from robusthash.objectives.cross_modal import gradient_penalty
from robusthash.objectives.dcph import spread_codes
from robusthash.training import HashingRecipe, OptimConfig, fit

B, K, D = 6, 4, 5
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]])
WIDTHS = {"image": D, "text": D}
NAMES = ("ssah", "agah", "dcph")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def world(objective: HashObjective) -> tuple[Outputs, Batch, CodeMemory]:
    """The objective set up on six items, their outputs, and a memory of other codes."""
    objective.setup(facts_of(LABELS, K, widths=WIDTHS))
    outputs = {}
    for seed, name in enumerate(WIDTHS):
        logits, features = draw(B, K, seed=seed), draw(B, D, seed=10 + seed).relu()
        plain = features / features.norm(dim=1, keepdim=True).clamp_min(1e-8)
        outputs[name] = HashOutput(logits, logits.tanh(), features, {"plain": plain})
    memory = memory_of({name: draw(B, K, seed=20 + n).tanh() for n, name in enumerate(WIDTHS)}, LABELS)
    return outputs, image_batch(torch.zeros(B, 2), LABELS), memory


def likelihood(left: Tensor, right: Tensor) -> float:
    """Mean over pairs of log(1 + e^T) - S T by a loop."""
    total = 0.0
    for i in range(B):
        for j in range(B):
            theta, similar = float(left[i] @ right[j]) / 2, float(LABELS[i] @ LABELS[j]) > 0
            total += math.log1p(math.exp(theta)) - similar * theta
    return total / B**2


# --- SSAH


def test_ssah_terms() -> None:
    objective = SSAH(
        codes=0.9, features=0.3, beta=0.2, labels=0.4, adversarial=0.5, hidden=8, critic_hidden=(7,)
    )
    outputs, batch, memory = world(objective)
    label = objective.label_net(LABELS)
    nets = {**outputs, "label": label}
    joint = sign(memory.codes["image"] + memory.codes["text"] + label.code)
    expected = {
        "similarity": 0.9 * sum(likelihood(o.code, label.code) for o in nets.values()) / 3,
        "features": 0.3 * sum(likelihood(o.features, label.features) for o in nets.values()) / 3,
        "regularisation": 0.2 * sum(float((o.code - joint).square().mean()) for o in nets.values()) / 3,
        "labels": 0.0,
        "adversarial": 0.0,
    }
    for name, o in nets.items():
        guess = 1 / (1 + torch.exp(-objective.classifiers[name](o.features)))
        expected["labels"] += 0.4 * float((guess - LABELS).square().mean()) / 3
    for name, o in outputs.items():
        seen = 1 / (1 + torch.exp(-objective.critics[name](o.features)))
        expected["adversarial"] += 0.5 * float(-seen.log().mean()) / 2
    terms = objective(outputs, batch, memory)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_ssah_critics_tell_the_label_net_from_the_others() -> None:
    objective = SSAH(hidden=8, critic_hidden=(7,))
    outputs, batch, _ = world(objective)
    terms = objective.critic(outputs, batch)
    for name, output in outputs.items():
        real, fake = (
            torch.sigmoid(objective.critics[name](f))
            for f in (objective.label_net(LABELS).features, output.features)
        )
        expected = float(-real.log().mean() - (1 - fake).log().mean())
        assert terms[f"critic/{name}"].item() == pytest.approx(expected, rel=1e-4)


def test_ssah_of_an_undecided_critic_is_log_two() -> None:
    objective = SSAH(adversarial=1.0, hidden=8)
    outputs, batch, memory = world(objective)
    with torch.no_grad():
        for parameter in objective.critics.parameters():
            parameter.zero_()
    assert objective(outputs, batch, memory)["adversarial"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_ssah_teaches_from_the_label_net_and_lets_it_learn() -> None:
    """No gradient from images flows into the codes that they are compared with; the net's own term has one."""
    objective = SSAH(features=0.0, beta=0.0, labels=0.0, adversarial=0.0, hidden=8)
    outputs, batch, memory = world(objective)
    weight = objective.label_net.head.weight
    loss = objective(outputs, batch, memory)["similarity"]
    (grad,) = torch.autograd.grad(loss, weight)
    own = objective.label_net(LABELS)
    alone = objective.losses(own, LABELS, own.code.detach(), LABELS).mean() / 3
    torch.testing.assert_close(grad, torch.autograd.grad(alone, weight)[0])


# --- AGAH


class Rows(nn.Module):
    """An encoder that gives its input."""

    width = D

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return values, {}


def test_agah_attention_by_a_loop_and_of_each_item_alone() -> None:
    encoder = ClassAttention(Rows(), 3, keep=0.8)
    values, means = draw(4, D), draw(3, D, seed=1)
    assert torch.allclose(encoder(values)[0].norm(dim=1), torch.full((4,), 0.8))  # no class means yet
    encoder.class_features.copy_(means)
    for i, row in enumerate(values):
        f = row / row.norm()
        m = [1 / (1 + math.exp(-5 * float(f @ a))) for a in means]
        seen = sum(w * a for w, a in zip(m, means, strict=True)) / sum(m)
        torch.testing.assert_close(encoder(values)[0][i], 0.8 * f + 0.2 * seen)
        torch.testing.assert_close(encoder(values[i : i + 1])[0][0], encoder(values)[0][i])


def test_agah_terms() -> None:
    objective = AGAH(even=0.3, to_map=0.2, eta=0.4, adversarial=0.5, margin=0.3, hidden=(7,))
    outputs, batch, memory = world(objective)
    expected = dict.fromkeys(("similarity", "regularisation", "even", "map", "adversarial"), 0.0)
    cosine = nn.functional.cosine_similarity
    for name, other in (("image", "text"), ("text", "image")):
        h, bank = outputs[name].code, memory.codes[other]
        for i in range(B):
            d = [1 - float(cosine(h[i], u, dim=0)) for u in bank]
            near = [j for j in range(B) if float(LABELS[i] @ LABELS[j]) > 0]
            far = [j for j in range(B) if j not in near]
            hinges = [max(0.0, d[j] - d[k] + 0.3) for j in near for k in far]
            expected["similarity"] += sum(hinges) / len(hinges) / B / 2
            even = float(cosine(h[i].abs(), torch.ones(K), dim=0))
            expected["even"] += 0.3 / (1 + math.exp(even)) / B / 2
        goal = h @ objective.class_codes.T / K - (2 * LABELS - 1)
        expected["map"] += 0.2 * float(goal.square().mean()) / 2
        expected["regularisation"] += 0.4 * float((h - sign(h)).square().mean()) / 2
        # image features before the critic whose real side is text, and the other way round
        expected["adversarial"] -= 0.5 * float(objective.critics[other](outputs[name].aux["plain"]).mean())
    terms = objective(outputs, batch, memory)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_agah_critics_are_wassersteins() -> None:
    objective = AGAH(penalty=2.0, hidden=(7,))
    outputs, batch, _ = world(objective)
    terms = objective.critic(outputs, batch)
    for real, fake in (("image", "text"), ("text", "image")):
        critic, mix = (
            objective.critics[real],
            objective.draws.within("penalty", 0, real).uniform(batch.ids, (1,)),
        )
        sides = [outputs[name].aux["plain"] for name in (real, fake)]
        expected = (
            critic(sides[1]).mean() - critic(sides[0]).mean() + 2 * gradient_penalty(critic, *sides, mix)
        )
        torch.testing.assert_close(terms[f"critic/{real}"], expected)


def test_agah_map_is_the_best_bit_of_each_column() -> None:
    """With the term of M itself left out by hand, no flip of a bit that was just solved is better."""
    codes, start = [sign(draw(B, K, seed=n)) for n in (1, 2)], sign(draw(3, K, seed=3))
    found = solved_map(start, codes, LABELS)
    assert set(found.unique().tolist()) <= {-1.0, 1.0}

    def cost(current: Tensor) -> float:
        items = sum(float((z @ current.T - K * (2 * LABELS - 1)).square().sum()) for z in codes)
        return items + float((start @ current.T - K * (2 * torch.eye(3) - 1)).square().sum())

    assert cost(found) <= cost(start)
    for c in range(3):  # the last column was solved with all others as they are now
        flipped = found.clone()
        flipped[c, K - 1] *= -1
        assert cost(found) <= cost(flipped) + 1e-4


def test_agah_gives_its_encoders_the_mean_features_of_each_class() -> None:
    encoders = {name: ClassAttention(Rows(), 3) for name in WIDTHS}
    objective = AGAH()
    outputs, batch, memory = world(objective)
    objective.setup(replace(facts_of(LABELS, K, widths=WIDTHS), encoders=encoders))
    objective(outputs, batch, memory)
    objective.end_epoch(memory)
    for c in range(3):
        rows = [o.aux["plain"][i] for o in outputs.values() for i in range(B) if LABELS[i, c]]
        mean = torch.stack(rows).mean(0)
        for encoder in encoders.values():
            torch.testing.assert_close(encoder.class_features[c], mean / mean.norm())
    assert not objective.counts.any()


def test_agah_asks_for_its_encoders() -> None:
    facts = facts_of(LABELS, K, widths=WIDTHS)
    other = {"image": Rows(), "text": ClassAttention(Rows(), 3)}
    with pytest.raises(
        ValueError, match=r"the image encoder is another; use hasher\.image: \{name: agah, classes: 3"
    ):
        AGAH().setup(replace(facts, encoders=other))
    with pytest.raises(ValueError, match=r"the text encoder has classes: 2; use .*classes: 3"):
        AGAH().setup(replace(facts, encoders={"text": ClassAttention(Rows(), 2)}))


# --- DCPH


def test_dcph_loss_by_a_loop() -> None:
    objective = DCPH(slope=3.0, margin=0.2, eta=0.5, steps=5)
    outputs, batch, memory = world(objective)
    total = 0.0
    for output in outputs.values():
        for h, y in zip(output.code, LABELS, strict=True):
            s = [float(h @ c) / K for c in objective.class_codes]
            own = [k for k in range(3) if y[k]]
            against = sum(math.exp(3 * s[q]) for q in range(3) if not y[q])
            margin = 0.2 / len(own) ** 0.5
            top = [math.exp(3 * (s[k] - margin)) for k in own]
            total += sum(-math.log(t / (t + against)) for t in top) / len(own) / B / 2
    terms = objective(outputs, batch, memory)
    assert terms["similarity"].item() == pytest.approx(total, rel=1e-5)
    spread = sum(float((o.code - sign(o.code)).square().mean()) for o in outputs.values()) / 2
    assert terms["regularisation"].item() == pytest.approx(0.5 * spread, rel=1e-5)


def test_dcph_proxies_lie_apart_and_depend_on_the_seed_alone() -> None:
    codes = spread_codes(6, 32, 300, 64, Draws(0, ("dcph",)))
    assert torch.equal(codes, spread_codes(6, 32, 300, 64, Draws(0, ("dcph",))))
    cosines = codes @ codes.T / 32
    assert float(cosines[~torch.eye(6, dtype=torch.bool)].max()) < 0.5
    assert not torch.equal(codes, spread_codes(6, 32, 300, 64, Draws(1, ("dcph",))))


def test_dcph_of_an_item_with_every_label_is_zero() -> None:
    objective = DCPH(steps=5)
    world(objective)
    assert (
        objective.similarity(
            HashOutput(draw(1, K), draw(1, K), draw(1, K)), torch.ones(1, 3), LABELS, LABELS
        ).item()
        < 1e-6
    )


# --- bad input


@pytest.mark.parametrize("name", NAMES)
def test_data_without_labels_are_refused_at_setup(name: str) -> None:
    facts = replace(facts_of(LABELS, K, widths=WIDTHS), labels=None, share_similar=0.0)
    learned = f"{name} learns from labels, and none of the {len(LABELS)} training items has one"
    said = "this objective needs labels, and the training split has none" if name == "dcph" else learned
    with pytest.raises(ValueError, match=said):
        build("objective", name).setup(facts)


@pytest.mark.parametrize("name", NAMES)
def test_labels_without_negatives_are_refused(name: str) -> None:
    said = "all items have every label" if name == "dcph" else "all training items share one"
    labels = torch.ones(4, 2) if name == "dcph" else torch.hstack([torch.ones(4, 1), torch.eye(4)])
    with pytest.raises(ValueError, match=said):
        build("objective", name).setup(facts_of(labels, K, widths=WIDTHS))


@pytest.mark.parametrize("name", ["ssah", "agah"])
def test_features_of_two_widths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"widths differ: .*hasher\.text\.widths"):
        build("objective", name).setup(facts_of(LABELS, K, widths={"image": 5, "text": 4}))


@pytest.mark.parametrize("name", NAMES)
def test_they_train_on_synthetic_pairs(name: str) -> None:
    data = load_data("synthetic", train=48, query=8, database=16)
    classes = data.train.labels.shape[1]
    image, text = {"name": "small", "width": 4, "grid": 1}, {"name": "mlp", "widths": [16]}
    if name == "agah":
        image, text = ({"name": "agah", "classes": classes, "inner": inner} for inner in (image, text))
    hasher = build_hasher(bits=8, image=image, text=text, vocabulary=data.vocabulary)
    groups = ("hasher",) if name == "dcph" else ("hasher", "critic")
    optim = {group: OptimConfig("adam", 0.003, weight_decay=0.0) for group in groups}
    lines = fit(HashingRecipe(hasher, build("objective", name)), data, replace(train_config(4), optim=optim))
    assert lines[-1]["similarity"] < lines[0]["similarity"]
    if name == "agah":
        norms = hasher.encoders["image"].class_features.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(classes))
