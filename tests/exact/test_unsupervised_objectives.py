"""Unsupervised image-text objectives against loops over pairs, and that they see no labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import facts_of, memory_of, train_config
from torch import Tensor

from robusthash.core.registry import build, catalogue
from robusthash.core.types import Batch, HashOutput, Outputs
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.models import build_hasher
from robusthash.objectives import DGCPN, DJSRH, DSAH, JDSH, UCCH, UKD, CodeMemory, HashObjective
from robusthash.objectives.ucch import ranking
from robusthash.objectives.ukd import nearest
from robusthash.objectives.unsupervised import fixed_features
from robusthash.training import HashingRecipe, OptimConfig, fit
from robusthash.training.distillation import Distilled

B, K = 5, 4
RAW = {"image_features": "raw", "text_features": "raw"}
NAMES = [card.name for card in catalogue("objective") if not card.supervised]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split_of(image: Tensor, text: Tensor, labels: Tensor | None = None, name: str = "train") -> Split:
    source = ArraySource({"image": image.float(), "text": text.float()})
    return Split(name, source, torch.arange(len(image)), labels, source.hashes())


IMAGE, TEXT = draw(B, 6).abs(), draw(B, 7, seed=1).abs()


def world(objective: HashObjective) -> tuple[Outputs, Batch, CodeMemory]:
    """The objective set up on five items without labels, their outputs, and a memory of other codes."""
    facts = replace(facts_of(torch.eye(B), K, widths={"image": 6, "text": 7}), labels=None)
    objective.setup(replace(facts, split=split_of(IMAGE, TEXT)))
    logits = {"image": draw(B, K, seed=2).float(), "text": draw(B, K, seed=3).float()}
    outputs = {name: HashOutput(u, u.tanh(), u) for name, u in logits.items()}
    memory = memory_of(
        {"image": draw(B, K, seed=4).tanh().float(), "text": draw(B, K, seed=5).tanh().float()}, None
    )
    return outputs, Batch({}, None, torch.arange(B)), memory


def cosine(left: Tensor, right: Tensor) -> list[list[float]]:
    """Cosines by a loop."""
    return [[float(a @ b / (a.norm() * b.norm())) for b in right.double()] for a in left.double()]


def mean_square(left: list[list[float]], right: list[list[float]]) -> float:
    pairs = [(a - b) ** 2 for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def grid(value: object) -> list[list[float]]:
    """(B, B) of a function of i and j."""
    return [[value(i, j) for j in range(B)] for i in range(B)]  # type: ignore[operator]


def cosines_of(outputs: Outputs, slope: float = 1.0) -> tuple[list[list[float]], ...]:
    v, t = ((slope * outputs[name].logits).tanh() for name in ("image", "text"))
    return cosine(v, v), cosine(t, t), cosine(v, t)


def test_djsrh_rebuilds_the_joint_matrix() -> None:
    objective = DJSRH(beta=0.7, eta=0.3, mu=1.2, intra=0.2, **RAW)
    outputs, batch, memory = world(objective)
    for _ in range(3):
        objective.end_epoch(memory)
    image, text = cosine(IMAGE, IMAGE), cosine(TEXT, TEXT)
    joint = grid(lambda i, j: 0.7 * (2 * image[i][j] - 1) + 0.3 * (2 * text[i][j] - 1))
    second = grid(lambda i, j: sum(joint[i][k] * joint[j][k] for k in range(B)) / B)
    wanted = grid(lambda i, j: 1.2 * (0.7 * joint[i][j] + 0.3 * second[i][j]))
    vv, tt, vt = cosines_of(outputs, slope=2.0)  # sqrt(3 + 1)
    terms = objective(outputs, batch, memory)
    intra = 0.2 * (mean_square(vv, wanted) + mean_square(tt, wanted))
    assert terms["intra"].item() == pytest.approx(intra, rel=1e-5)
    assert terms["similarity"].item() == pytest.approx(mean_square(vt, wanted), rel=1e-5)


def test_djsrh_of_identical_items_wants_mu() -> None:
    same = torch.ones(3, 3)
    assert torch.allclose(DJSRH(mu=1.5).target(same, same), torch.full((3, 3), 1.5))


def test_jdsh_stretches_both_ends() -> None:
    options = {"ends": (0.4, 0.7), "extremes": (-0.5, 0.7), "stretch": (0.3, 0.2), "mu": 1.4}
    objective = JDSH(alpha=0.5, beta=0.1, gamma=0.4, intra=0.1, **options, **RAW)
    outputs, batch, memory = world(objective)
    image, text = ([[2 * c - 1 for c in row] for row in cosine(x, x)] for x in (IMAGE, TEXT))
    mixed = cosine(torch.tensor(image), torch.tensor(text))

    def wanted(i: int, j: int) -> float:
        s = 0.5 * image[i][j] + 0.1 * text[i][j] + 0.4 * (mixed[i][j] + mixed[j][i]) / 2
        ends.add("low" if s < 0.4 else "high" if s > 0.7 else "middle")
        if s < 0.4:
            return 1.4 * s * (1 + 0.3 * math.exp(-(s + 0.5)))
        return 1.4 * s * (1 + 0.2 * math.exp(s - 0.7)) if s > 0.7 else 1.4 * s

    ends: set[str] = set()
    matrix = grid(wanted)
    assert len(ends) >= 2
    vv, tt, vt = cosines_of(outputs)
    tv = grid(lambda i, j: vt[j][i])
    terms = objective(outputs, batch, memory)
    assert terms["intra"].item() == pytest.approx(
        0.1 * (mean_square(vv, matrix) + mean_square(tt, matrix)), rel=1e-4
    )
    assert terms["similarity"].item() == pytest.approx(
        mean_square(vt, matrix) + mean_square(tv, matrix), rel=1e-4
    )
    assert terms["pairs"].item() == pytest.approx(-sum(vt[i][i] for i in range(B)) / B, rel=1e-4)


def test_dsah_terms() -> None:
    objective = DSAH(alpha=0.9, k=1.5, own=0.1, rebuild=0.5, **RAW)
    outputs, batch, memory = world(objective)
    image, text = ([[2 * c - 1 for c in row] for row in cosine(x, x)] for x in (IMAGE, TEXT))
    wanted = grid(lambda i, j: 1.5 * (0.9 * image[i][j] + 0.1 * text[i][j]))
    vv, tt, vt = cosines_of(outputs)
    tv = grid(lambda i, j: vt[j][i])
    intra = mean_square(vv, wanted) + mean_square(tt, wanted)
    for cosines, own in ((vv, image), (tt, text)):
        intra += 0.1 * mean_square(cosines, grid(lambda i, j, own=own: 1.5 * own[i][j]))
    terms = objective(outputs, batch, memory)
    assert terms["intra"].item() == pytest.approx(intra, rel=1e-4)
    assert terms["similarity"].item() == pytest.approx(mean_square(vt, wanted), rel=1e-4)
    assert terms["pairs"].item() == pytest.approx(sum((vt[i][i] - 1.5) ** 2 for i in range(B)) / B, rel=1e-4)
    assert terms["symmetry"].item() == pytest.approx(2 * mean_square(vt, tv), rel=1e-4)
    total = 0.0
    for name, rows in (("image", TEXT), ("text", IMAGE)):
        layer = objective.decoders[name]
        for code, row in zip(outputs[name].code, rows.float(), strict=True):
            target = row / row.norm() * len(row) ** 0.5
            total += float((layer.weight @ code + layer.bias - target).square().mean()) / B
    assert terms["decoders"].item() == pytest.approx(0.5 * total, rel=1e-4)


def test_dsah_decoders_reach_the_encoders() -> None:
    objective = DSAH(**RAW)
    outputs, batch, memory = world(objective)
    logits = outputs["image"].logits.clone().requires_grad_(True)
    live = {**outputs, "image": HashOutput(logits, logits.tanh(), logits)}
    (grad,) = torch.autograd.grad(objective(live, batch, memory)["decoders"], logits)
    assert bool((grad.abs().sum(1) > 0).all())


def dgcpn_matrix(keep: int, text: float, graph: float) -> list[list[float]]:
    vv, tt = cosine(IMAGE, IMAGE), cosine(TEXT, TEXT)
    both = grid(lambda i, j: text * tt[i][j] + (1 - text) * vv[i][j])
    shares = []
    for i in range(B):
        near = sorted((j for j in range(B) if j != i), key=lambda j: -both[i][j])[:keep]
        total = sum(both[i][j] for j in near)
        shares.append([both[i][j] / total if j in near else 0.0 for j in range(B)])
    return grid(
        lambda i, j: (
            2
            * (
                (1 - graph) * both[i][j]
                + graph * 2 * keep * sum(map(math.prod, zip(shares[i], shares[j], strict=True)))
            )
            - 1
        )
    )


def test_dgcpn_matrix_and_terms() -> None:
    objective = DGCPN(text=0.3, graph=0.4, neighbours=0.4, similarity=0.7, coherence=0.6, **RAW)
    outputs, batch, memory = world(objective)
    wanted = dgcpn_matrix(2, 0.3, 0.4)
    torch.testing.assert_close(objective.target(batch.ids), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    some = torch.tensor([3, 0])  # of a batch, the same entries
    torch.testing.assert_close(
        objective.target(some), torch.tensor(wanted)[some][:, some], rtol=1e-4, atol=1e-4
    )
    v, t = outputs["image"].code, outputs["text"].code
    expected = {"similarity": 0.0, "pairs": 0.0, "coherence": 0.0}
    for a, b in ((v, t), (torch.where(v >= 0, 1.0, -1.0), t), (v, torch.where(t >= 0, 1.0, -1.0))):
        vv, tt, vt = cosine(a, a), cosine(b, b), cosine(a, b)
        for matrix in (vv, tt, vt):
            off = [(matrix[i][j] - wanted[i][j]) ** 2 for i in range(B) for j in range(B) if i != j]
            expected["similarity"] += 0.7 * sum(off) / len(off) / 3
        expected["pairs"] += sum((vt[i][i] - 1.5) ** 2 for i in range(B)) / B / 3
        turned = grid(lambda i, j, vt=vt: vt[j][i])
        pairs = ((vt, vv), (vt, tt), (vv, tt), (vt, turned))
        expected["coherence"] += 0.6 * sum(mean_square(x, y) for x, y in pairs) / 3
    terms = objective(outputs, batch, memory)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_dgcpn_without_the_graph_is_the_cosine() -> None:
    objective = DGCPN(text=0.0, graph=0.0, **RAW)
    _, batch, _ = world(objective)
    expected = 2 * torch.tensor(cosine(IMAGE, IMAGE)) - 1
    torch.testing.assert_close(objective.target(batch.ids), expected, rtol=1e-4, atol=1e-4)


def test_ucch_contrast_with_the_bank_and_its_update() -> None:
    objective = UCCH(alpha=0.6, temperature=0.9, rho=0.4, warmup=0)
    outputs, batch, memory = world(objective)
    bank = objective.bank.clone()
    unit = {name: o.code / o.code.norm(dim=1, keepdim=True) for name, o in outputs.items()}
    signs, contrast = torch.where(bank >= 0, 1.0, -1.0), 0.0
    for code in unit.values():
        for i in range(B):
            logits = [float(code[i] @ signs[j]) / (0.9 * K**0.5) for j in range(B)]
            contrast += (math.log(sum(map(math.exp, logits))) - logits[i]) / B
    terms = objective(outputs, batch, memory)
    assert terms["contrast"].item() == pytest.approx(0.6 * contrast, rel=1e-5)
    mean = (unit["image"] + unit["text"]) / 2
    moved = 0.4 * bank + 0.6 * mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(objective.bank, moved / moved.norm(dim=1, keepdim=True))


def test_ucch_of_equal_scores_is_the_log_of_their_number() -> None:
    objective = UCCH(alpha=1.0, warmup=0)
    outputs, batch, memory = world(objective)
    objective.bank = torch.ones(B, K) / 2
    assert objective(outputs, batch, memory)["contrast"].item() == pytest.approx(2 * math.log(B), rel=1e-5)


def test_ucch_negatives_never_hold_the_pair_itself() -> None:
    objective = UCCH(negatives=2, warmup=0)
    world(objective)
    ids = torch.tensor([4, 1])
    bank, own = objective._compared(torch.zeros(2, K), ids)
    assert torch.equal(bank[own], objective.bank[ids])
    rest = [row for row in range(B) if row not in ids.tolist()]
    others = {tuple(row) for row in bank[2:].tolist()}
    assert len(bank) == 4
    assert others <= {tuple(objective.bank[row].tolist()) for row in rest}


def test_ucch_ranking_by_a_loop() -> None:
    cosines = draw(B, B).tanh()
    expected = 0.0
    for i in range(B):
        own = float(cosines[i, i])
        row = [float(s) - (0.0 if float(s) >= own - 0.2 else 0.1) for s in cosines[i]]
        expected += (math.log(sum(map(math.exp, row))) - own + 0.2) / B
    assert ranking(cosines, 0.2, 0.1).item() == pytest.approx(expected, rel=1e-9)


def test_ukd_learns_the_neighbours_of_either_modality() -> None:
    objective = UKD(neighbours=0.4, gamma=0.3, balance=True)
    outputs, batch, memory = world(objective)
    with pytest.raises(ValueError, match=r"set training\.recipe: ukd"):
        objective(outputs, batch, memory)
    objective.teach({"image": IMAGE.float(), "text": TEXT.float()})
    similar = torch.zeros(B, B)
    for rows in (IMAGE, TEXT):
        for i in range(B):
            near = sorted(range(B), key=lambda j: float((rows[i] - rows[j]).norm()))[:2]
            similar[i, near] = 1.0
    assert torch.equal(objective.similar(batch.ids), similar)
    weight = float((similar == 0).sum() / similar.sum())
    loss = 0.0
    for name, other in (("image", "text"), ("text", "image")):
        for i in range(B):
            for j in range(B):
                theta, s = float(outputs[name].code[i] @ memory.codes[other][j]) / 2, float(similar[i, j])
                loss += (weight if s else 1.0) * (math.log1p(math.exp(theta)) - s * theta) / B**2 / 2
    terms = objective(outputs, batch, memory)
    assert terms["similarity"].item() == pytest.approx(loss, rel=1e-5)
    joint = torch.where(memory.codes["image"] + memory.codes["text"] >= 0, 1.0, -1.0)
    apart = sum(float((o.code - joint).square().mean()) for o in outputs.values()) / 2
    assert terms["regularisation"].item() == pytest.approx(0.3 * apart, rel=1e-5)


def test_neighbours_by_labels_are_the_classes() -> None:
    labels = torch.eye(3)[torch.arange(12) % 3]
    found = torch.zeros(12, 12).scatter(1, nearest(labels, 4, block=5), 1.0)
    assert torch.equal(found, labels @ labels.T)


def pairs(labels: Tensor | None) -> RetrievalData:
    """24 training pairs of vectors, with these labels or none."""
    image, text = draw(40, 6).abs(), draw(40, 7, seed=1).abs()
    parts = {"train": range(24), "query": range(24, 30), "database": range(30, 40)}
    known = torch.eye(2)[torch.arange(40) % 2]
    splits = {}
    for name, rows in parts.items():
        at = torch.tensor(list(rows))
        own = (None if labels is None else labels[: len(at)]) if name == "train" else known[at]
        splits[name] = split_of(image[at], text[at], own, name)
    return RetrievalData("vectors", **splits, label_names=("a", "b"))


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_no_labels(name: str) -> None:
    """Shuffled or absent labels of the training items leave every weight as it is."""
    labels, weights = torch.eye(2)[torch.arange(24) % 2], []
    for some in (
        labels,
        labels.flip(1)[torch.randperm(24, generator=torch.Generator().manual_seed(0))],
        None,
    ):
        hasher = build_hasher(
            bits=8, image={"name": "vector", "inputs": 6, "widths": [8]}, text={"name": "mlp", "widths": [8]}, vocabulary=7
        )  # fmt: skip
        options = RAW if hasattr(build("objective", name), "features") else {}
        recipe = HashingRecipe(hasher, build("objective", {"name": name, **options}))
        config = train_config(3)
        if name == "ukd":
            recipe = Distilled(hasher, recipe.objective, {"name": "djsrh", **RAW}, teacher_epochs=1)
            config = replace(config, optim={**config.optim, "teacher": OptimConfig("sgd", 0.05)})
        before = {key: value.clone() for key, value in hasher.state_dict().items()}
        fit(recipe, pairs(some), config)
        weights.append(hasher.state_dict())
        assert any(not torch.equal(before[key], value) for key, value in weights[-1].items())
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_one_modality_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="learns from pairs of an image and its text"):
        build("objective", name).setup(facts_of(torch.eye(4), 8, widths={"image": 6}))


def test_what_no_features_can_be_made_of_is_refused() -> None:
    broken = IMAGE.clone()
    broken[3, 2] = math.nan
    with pytest.raises(
        ValueError, match="image features of 1 of 5 training items are NaN or infinite, first item 3"
    ):
        fixed_features(split_of(broken, TEXT), "image", "raw", {})
    with pytest.raises(ValueError, match=r"vectors of 6 features.*image_features=raw"):
        fixed_features(split_of(IMAGE, TEXT), "image", "efficientnet-lite0", {})
    ids = Split(
        "train",
        ArraySource({"text": torch.ones(5, 3, dtype=torch.int64)}),
        torch.arange(5),
        None,
        pairs(None).train.hashes[:5],
    )
    with pytest.raises(ValueError, match="text_features to 'minilm' or 'net'"):
        fixed_features(ids, "text", "raw", {})
    with pytest.raises(ValueError, match="the train items have text, and no image"):
        fixed_features(ids, "image", "raw", {})


def test_ukd_is_taught_by_an_unsupervised_objective_alone() -> None:
    hasher = build_hasher(bits=8, image={"name": "vector", "inputs": 6}, text="mlp", vocabulary=7)
    with pytest.raises(ValueError, match="teacher of 'ukd' is unsupervised, and dcmh needs labels"):
        Distilled(hasher, UKD(), "dcmh")
    with pytest.raises(ValueError, match=r"trains training\.objective: ukd, not djsrh"):
        Distilled(hasher, DJSRH())
