"""DSH, DSDH, LTHNet, OrthoHash and HSWD against loops, brute force and what their cards say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import facts_of, image_batch, make_data, memory_of, output_of, small_hasher, train_config
from torch import Tensor

from robusthash.core.registry import build
from robusthash.core.types import HashOutput
from robusthash.data.base import ArraySource, RetrievalData, Split
from robusthash.evaluation import evaluate
from robusthash.models import build_hasher
from robusthash.models.heads import MetaEmbeddingHead
from robusthash.objectives.a2net import A2Net
from robusthash.objectives.adsh import ADSH
from robusthash.objectives.base import quantisation
from robusthash.objectives.centers import OrthoHash
from robusthash.objectives.dsdh import DSDH, label_codes
from robusthash.objectives.hswd import HSWD, coin_distance
from robusthash.objectives.lthnet import LTHNet, class_weights
from robusthash.objectives.pairwise import DPSH, DSH, HashNet
from robusthash.training import HashingRecipe, fit
from robusthash.training.shallow_recipe import ShallowRecipe

LABELS = torch.eye(3)[torch.arange(12) % 3]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_output(code: Tensor) -> HashOutput:
    return HashOutput(code, code, code, {})


# --- DSH


def test_dsh_equals_the_double_loop() -> None:
    code, bank = 2 * numbers(5, 4), 2 * numbers(12, 4, seed=1)
    objective = DSH(margin=1.5, alpha=0.3)
    expected = []
    for v, y in zip(code.tolist(), LABELS[:5].tolist(), strict=True):
        losses = []
        for u, z in zip(bank.tolist(), LABELS.tolist(), strict=True):
            distance = sum((a - b) ** 2 for a, b in zip(v, u, strict=True))
            losses.append(distance / 2 if y == z else max(0.0, 1.5 * 4 - distance) / 2)
        expected.append(sum(losses) / len(losses) / 4)
    found = objective.similarity(linear_output(code), LABELS[:5], bank, LABELS)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    pull = [0.3 * sum(abs(abs(x) - 1) for x in v) / 4 for v in code.tolist()]
    assert objective.regularisation(linear_output(code)).tolist() == pytest.approx(pull, rel=1e-5)


def test_dsh_rests_on_codes_that_are_equal_or_half_of_the_bits_apart() -> None:
    codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, -1, -1]])
    labels = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert DSH().similarity(linear_output(codes), labels, codes, labels).tolist() == [0.0] * 3
    assert DSH().regularisation(linear_output(codes)).tolist() == [0.0] * 3
    near = codes.clone()
    near[2, 3] = 1.0  # one bit apart
    assert float(DSH().similarity(linear_output(near), labels, near, labels)[2]) > 0


# --- DSDH


def dsdh_value(codes: Tensor, outputs: Tensor, labels: Tensor, pull: float, w: Tensor, decay: float) -> float:
    fit_error = (labels - codes @ w).square().sum() + decay * w.square().sum()
    return float(fit_error + pull * (codes - outputs).square().sum())


def test_label_codes_are_no_worse_than_any_code_that_differs_in_one_column() -> None:
    outputs, labels = numbers(4, 3).double(), torch.eye(2)[torch.tensor([0, 1, 0, 1])].double()
    start = torch.where(outputs >= 0, 1.0, -1.0).double()
    w = torch.linalg.solve(start.T @ start + 0.5 * torch.eye(3).double(), start.T @ labels)
    found = label_codes(start, outputs, labels, pull=0.2, decay=0.5, sweeps=50)
    best = dsdh_value(found, outputs, labels, 0.2, w, 0.5)
    assert best <= dsdh_value(start, outputs, labels, 0.2, w, 0.5)
    for k in range(3):
        for column in itertools.product([-1.0, 1.0], repeat=4):
            other = found.clone()
            other[:, k] = torch.tensor(column).double()
            assert best <= dsdh_value(other, outputs, labels, 0.2, w, 0.5) + 1e-9


def test_a_sweep_of_label_codes_never_raises_the_objective() -> None:
    outputs, labels = numbers(40, 8).double(), torch.eye(3)[torch.arange(40) % 3].double()
    codes, values = torch.where(numbers(40, 8, seed=2) >= 0, 1.0, -1.0).double(), []
    for _ in range(6):
        w = torch.linalg.solve(codes.T @ codes + torch.eye(8).double(), codes.T @ labels)
        values.append(dsdh_value(codes, outputs, labels, 0.1, w, 1.0))
        codes = label_codes(codes, outputs, labels, pull=0.1, decay=1.0, sweeps=1)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_dsdh_is_dpsh_with_a_pull_to_the_solved_codes() -> None:
    objective = DSDH(eta=6.0)
    objective.setup(facts_of(LABELS, 4))
    assert float(objective.pull) == pytest.approx(6.0 * 4 / 12)
    logits, memory = numbers(12, 4), memory_of({"image": torch.tanh(numbers(12, 4, seed=1))}, LABELS)
    batch, outputs = image_batch(torch.zeros(12, 2), LABELS), {"image": output_of(logits)}
    first = objective(outputs, batch, memory)
    plain = DPSH().similarity(outputs["image"], LABELS, memory.codes["image"], LABELS).mean()
    assert float(first["similarity"]) == pytest.approx(float(plain))
    own = torch.where(memory.codes["image"] >= 0, 1.0, -1.0)  # before anything is solved
    assert float(first["regularisation"]) == pytest.approx(
        2.0 * float((torch.tanh(logits) - own).square().mean())
    )
    objective.end_epoch(memory)
    solved = objective.solved.codes
    assert set(solved.unique().tolist()) == {-1.0, 1.0}
    then = objective(outputs, batch, memory)["regularisation"]
    assert float(then) == pytest.approx(2.0 * float((torch.tanh(logits) - solved).square().mean()))
    assert "solved.codes" in objective.state_dict()
    assert "solved.codes" not in objective.saved_state()
    torch.testing.assert_close(
        objective.regularisation(outputs["image"]), 2.0 * quantisation(outputs["image"])
    )


# --- OrthoHash


def test_orthohash_equals_the_softmax_of_cosines() -> None:
    objective = OrthoHash(scale=5.0, margin=0.3)
    objective.setup(facts_of(LABELS, 6))
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    logits = numbers(3, 6)
    expected = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        cosines = [
            sum(a * b for a, b in zip(z, o, strict=True)) / math.sqrt(6 * sum(a * a for a in z))
            for o in objective.centers.tolist()
        ]
        values = [5.0 * (c - 0.3 * t) for c, t in zip(cosines, y, strict=True)]
        total = math.log(sum(math.exp(v) for v in values))
        expected.append(-sum(t / max(sum(y), 1) * (v - total) for t, v in zip(y, values, strict=True)))
    found = objective.similarity(output_of(logits), labels, logits, labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert found[2] == 0.0
    torch.testing.assert_close(objective.similarity(output_of(7 * logits), labels, logits, labels), found)


# --- HSWD


def test_coin_distance_is_zero_for_a_permutation_of_the_coins_and_one_for_zeros() -> None:
    coins = torch.where(numbers(9, 4) >= 0, 1.0, -1.0)
    shuffled = torch.stack([column[torch.randperm(9)] for column in coins.T], 1)
    assert coin_distance(shuffled, coins) == 0.0
    assert coin_distance(torch.zeros(9, 4), coins) == 1.0
    values = numbers(9, 4, seed=3)
    best = min(
        float((values[list(order), 0] - coins[:, 0]).square().mean())
        for order in itertools.islice(itertools.permutations(range(9)), 0, None, 997)
    )
    assert float(coin_distance(values[:, :1], coins[:, :1])) <= best + 1e-6


def test_hswd_adds_its_weight_times_the_distance_to_fresh_coins() -> None:
    base, objective, half = HashNet(), HSWD(weight=0.4), HSWD(weight=0.2)
    for part in (base, objective, half):
        part.setup(facts_of(LABELS, 4))
    memory = memory_of({"image": torch.tanh(numbers(12, 4, seed=1))}, LABELS)
    given = ({"image": output_of(numbers(12, 4))}, image_batch(torch.zeros(12, 2), LABELS), memory)
    terms, plain = objective(*given), base(*given)
    assert {name: float(terms[name]) for name in plain} == {name: float(plain[name]) for name in plain}
    assert float(terms["coins"]) == pytest.approx(2 * float(half(*given)["coins"]))
    before = float(terms["coins"])
    assert float(objective(*given)["coins"]) == before  # of the same step
    objective.advance()
    assert float(objective(*given)["coins"]) != before
    with pytest.raises(ValueError, match="another objective"):
        HSWD(base="hswd")


def test_hswd_keeps_what_its_base_keeps_and_hands_on_its_epochs() -> None:
    objective = build("objective", {"name": "hswd", "base": {"name": "dsdh", "sweeps": 2}})
    objective.setup(facts_of(LABELS, 4))
    objective.end_epoch(memory_of({"image": torch.tanh(numbers(12, 4))}, LABELS))
    assert bool((objective.base.solved.codes != 0).all())
    assert not any("solved" in name for name in objective.saved_state())
    assert "base.pull" in objective.saved_state()


# --- LTHNet


def test_lthnet_is_the_cross_entropy_where_beta_is_zero() -> None:
    objective = LTHNet(beta=0.0)
    objective.setup(facts_of(LABELS, 4))
    assert objective.weights.tolist() == [1.0] * 3
    output = output_of(numbers(12, 4))
    expected = torch.nn.functional.cross_entropy(
        output.code @ objective.matrix.T + objective.bias, LABELS.argmax(1), reduction="none"
    )
    torch.testing.assert_close(objective.similarity(output, LABELS, output.code, LABELS), expected)


def test_lthnet_weighs_rare_classes_by_their_effective_number() -> None:
    weights = class_weights(torch.tensor([1.0, 10.0, 0.0]), beta=0.9)
    assert weights.tolist() == pytest.approx([1.0, (1 - 0.9) / (1 - 0.9**10), 0.0])
    rare = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    objective = LTHNet(beta=0.99)
    objective.setup(facts_of(rare, 4))
    assert objective.weights[0] == 1.0
    assert 0.3 < objective.weights[1] < 0.4  # nearly 1 / 3
    with pytest.raises(ValueError, match="beta"):
        LTHNet(beta=1.0)


def test_meta_embedding_adds_class_means_by_attention_and_selector() -> None:
    torch.manual_seed(0)
    head = MetaEmbeddingHead(5, 4, classes=3, hidden=6)
    head.means.copy_(numbers(3, 6))
    x = numbers(2, 5, seed=2)
    d = (x @ head.inner.weight.T + head.inner.bias).relu()
    p = torch.softmax(d @ head.attention.weight.T + head.attention.bias, 1)
    e = torch.tanh(d @ head.selector.weight.T + head.selector.bias)
    expected = (d + e * (p @ head.means)) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x)[0], expected)
    torch.nn.init.zeros_(head.selector.weight)
    torch.nn.init.zeros_(head.selector.bias)
    torch.testing.assert_close(head(x)[0], d @ head.linear.weight.T + head.linear.bias)


def test_class_means_are_renewed_before_training_and_after_every_epoch() -> None:
    data = make_data()
    head = {"name": "meta-embedding", "classes": 3, "hidden": 6}
    hasher = build_hasher(bits=8, image={"name": "small", "width": 4, "grid": 1}, head=head)
    recipe = HashingRecipe(hasher, LTHNet())
    recipe.setup(data, 0, 16)
    before = hasher.heads["image"].means.clone()
    assert bool((before != 0).any())
    fit(recipe, data, train_config(2))
    part = hasher.heads["image"]
    assert not torch.equal(part.means, before)
    with torch.no_grad():
        batch = data.train.batch(torch.arange(len(data.train)))
        direct = part.direct(hasher(batch.inputs)["image"].features)
    expected = batch.labels.T @ direct / batch.labels.sum(0)[:, None]
    torch.testing.assert_close(part.means, expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_other_classes_than_the_data_is_refused() -> None:
    head = {"name": "meta-embedding", "classes": 4, "hidden": 6}
    hasher = small_hasher(head=head)
    with pytest.raises(ValueError, match=r"4 classes, the data 3; set hasher\.head\.classes: 3"):
        HashingRecipe(hasher, LTHNet()).setup(make_data(), 0, 16)


# --- A2-Net


def test_a2net_is_adsh_with_reconstruction_and_decorrelation() -> None:
    objective, plain = A2Net(reconstruction=0.5, decorrelation=2.0), ADSH()
    for part in (objective, plain):
        part.setup(facts_of(LABELS, 4, widths={"image": 4}))
    memory = memory_of({"image": torch.tanh(numbers(12, 4, seed=1))}, LABELS)
    output, batch = output_of(numbers(12, 4)), image_batch(torch.zeros(12, 2), LABELS)
    terms, own = objective({"image": output}, batch, memory), plain({"image": output}, batch, memory)
    assert {name: float(terms[name]) for name in own} == {name: float(own[name]) for name in own}
    decoder, code = objective.decoders["image"], output.code
    gap = output.logits @ decoder.weight.T + decoder.bias - output.features
    assert float(terms["reconstruction"].detach()) == pytest.approx(0.5 * float(gap.detach().square().mean()))
    pairs = [(float(code[:, j] @ code[:, k]) / 12 - (j == k)) ** 2 for j in range(4) for k in range(4)]
    assert float(terms["decorrelation"]) == pytest.approx(2.0 * sum(pairs) / 16, rel=1e-5)
    assert not any("decoders" in name for name in objective.saved_state())


# --- each of them against ITQ on the same features


def vectors() -> RetrievalData:
    """Vectors of four classes; ten directions of larger variance have nothing to do with the class."""
    axes = torch.linalg.qr(numbers(20, 20, seed=8)).Q
    splits = {}
    for seed, (name, items) in enumerate({"train": 160, "query": 40, "database": 160}.items()):
        labels = torch.eye(4)[torch.arange(items) % 4]
        signal = torch.cat([3.0 * numbers(items, 10, seed=seed + 20), 1.5 * labels.repeat(1, 2)], 1)
        signal = torch.cat([signal, torch.zeros(items, 2)], 1) + 0.3 * numbers(items, 20, seed=seed + 30)
        source = ArraySource({"image": signal @ axes})
        splits[name] = Split(name, source, torch.arange(items), labels, source.hashes())
    return RetrievalData("vectors", **splits, label_names=tuple("abcd"))


@pytest.mark.parametrize(
    ("objective", "head"),
    [
        ({"name": "dsh", "balance": True}, "linear"),
        ({"name": "dsdh", "eta": 1.0, "balance": True}, "tanh"),
        ("lthnet", "tanh"),
        ("orthohash", "batchnorm"),
        ("hswd", "tanh"),
        ("a2-net", "tanh"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_a_supervised_objective_beats_itq_on_the_same_features(objective: Any, head: str) -> None:
    """A linear head on fixed vectors whose largest directions have nothing to do with the class."""
    data = vectors()
    trained = build_hasher(bits=8, image={"name": "features", "inputs": 20}, head=head)
    recipe = {"name": "asymmetric", "items": 160, "inner_epochs": 1} if objective == "a2-net" else "hashing"
    made = build("recipe", recipe, hasher=trained, objective=build("objective", objective))
    fit(made, data, train_config(12, lr=0.02))
    base = build_hasher(bits=8, image={"name": "features", "inputs": 20}, head="linear")
    fit(ShallowRecipe(base, DPSH(), "itq"), data, train_config(1))
    found, least = (float(evaluate(hasher, data)["MAP"]) for hasher in (trained, base))
    assert found > least + 0.1
