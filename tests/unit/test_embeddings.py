"""Float vectors as what is searched: distances, ranking measures, attacks, suites."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import robusthash as rh
from robusthash.attacks.base import Attack, Probe
from robusthash.attacks.embedding_attacks import AllItems, EmbeddingSoftAP, on_embeddings
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import HAGLoss
from robusthash.attacks.pgd import PGD
from robusthash.attacks.published import guided_apgd
from robusthash.attacks.ranking_losses import (
    flip_apgd,
    guided_targeted_apgd,
    margin_pn_apgd,
    soft_ap_apgd,
    wrong_apgd,
)
from robusthash.attacks.threat_model import threat_on
from robusthash.core import embeddings
from robusthash.core.embeddings import METRICS, Embeddings, distances, nearest, ordered
from robusthash.core.hamming import pack
from robusthash.core.runtime import Draws
from robusthash.core.types import Codes, Goal, HashOutput
from robusthash.evaluation.context import make_context
from robusthash.evaluation.evaluate import attack_all, evaluate, score_attack, score_clean
from robusthash.metrics.embedding_measures import embedding_ap, measure_embeddings
from robusthash.metrics.protocol import Protocol, load_protocol
from robusthash.models.external.wrapper import AsIs
from robusthash.models.hasher import Encoder, Hasher
from robusthash.robustness.assess import assess
from robusthash.robustness.specs.oracle_attacks import noise, oracle_attacks

Q, N, D, C = 30, 180, 12, 4


def vectors(count: int, seed: int, metric: str = "cosine") -> Embeddings:
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return Embeddings(rows * (1 + torch.arange(count)[:, None] % 3), metric, torch.arange(count))


def multi_hot(count: int, seed: int) -> Tensor:
    return (torch.rand(count, C, generator=torch.Generator().manual_seed(seed)) < 0.35).float()


def plain_distances(query: Embeddings, database: Embeddings) -> np.ndarray:
    left, right = query.vectors.double().numpy(), database.vectors.double().numpy()
    if query.metric == "euclidean":
        return np.sqrt(((left[:, None] - right[None]) ** 2).sum(2))
    lengths = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)[None]
    return 1 - (left @ right.T) / lengths


# ------------------------------------------------------------------------------------------ measures


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("cells", [1 << 20, 400])
def test_measures_are_those_of_an_independent_formula(metric, cells, monkeypatch):
    monkeypatch.setattr(embeddings, "_CELLS", cells)  # all queries at once, and two at a time
    query, database = vectors(Q, 1, metric), vectors(N, 2, metric)
    labels, stored = multi_hot(Q, 3), multi_hot(N, 4)
    names = ("MAP", "MAP@50/mink", "P@10", "R@10", "nDCG@20", "PR", "P@N", "P@r<=2")
    measured = measure_embeddings(Protocol("own", names), query, labels, database, stored)
    apart, relevant = plain_distances(query, database), (labels @ stored.T > 0).numpy()
    assert np.abs(distances(query, database).numpy() - apart).max() < 1e-9
    some = relevant.any(1)
    for row in np.flatnonzero(some):
        order = np.argsort(apart[row])
        hit = relevant[row][order]
        expected = average_precision_score(relevant[row], -apart[row])
        assert abs(float(measured.per_query["MAP"][row]) - expected) < 1e-12
        cut = (hit * np.cumsum(hit) / np.arange(1, N + 1))[:50].sum() / min(hit.sum(), 50)
        assert abs(float(measured.per_query["MAP@50/mink"][row]) - cut) < 1e-12
        assert abs(float(measured.per_query["P@10"][row]) - hit[:10].mean()) < 1e-12
        assert abs(float(measured.per_query["R@10"][row]) - hit[:10].sum() / hit.sum()) < 1e-12
        gain = 2.0 ** (labels[row] @ stored.T).numpy() - 1
        best, discount = np.sort(gain)[::-1][:20], np.log2(np.arange(2, 22))
        dcg = (gain[order][:20] / discount).sum() / (best / discount).sum()
        assert abs(float(measured.per_query["nDCG@20"][row]) - dcg) < 1e-12
    assert measured.empty == int((~some).sum()) > 0
    assert measured.values["MAP"] == pytest.approx(float(measured.per_query["MAP"].mean()), abs=1e-15)
    share = relevant[some].sum(1) / N
    assert measured.reference["chance"] == pytest.approx(share.sum() / Q, abs=0.02)
    first = np.stack([relevant[row][np.argsort(apart[row])] for row in range(Q)])
    assert measured.curves["P@N"]["precision"][0] == pytest.approx(first[:, :100].mean(), abs=1e-12)
    assert measured.curves["PR"]["precision"].shape == (100,)
    assert "P@r<=2" not in measured.values
    assert any("P@r<=2" in note and metric in note for note in measured.notes)


def test_blocks_of_queries_change_no_number(monkeypatch):
    query, database, labels, stored = vectors(Q, 1), vectors(N, 2), multi_hot(Q, 3), multi_hot(N, 4)
    for protocol in ("house", "saat", "dsarh", "crossmodal"):
        results = []
        for cells in (1 << 20, 700):
            monkeypatch.setattr(embeddings, "_CELLS", cells)
            results.append(measure_embeddings(load_protocol(protocol), query, labels, database, stored))
        one, two = results
        assert set(one.values) == set(two.values)
        for name in one.values:
            assert one.values[name] == pytest.approx(two.values[name], abs=1e-14)
        for name, curve in one.curves.items():
            assert torch.allclose(curve["precision"], two.curves[name]["precision"], atol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_distances_are_ties_in_expectation(metric):
    """Copies of a few vectors, also scaled ones under cosine: AP is the mean over all orders within ties."""
    base = vectors(5, 7, metric).vectors
    factors = torch.tensor([0.25, 1.0, 8.0]) if metric == "cosine" else torch.ones(3)
    rows = (base[None] * factors[:, None, None]).flatten(0, 1)
    stored = torch.zeros(15, 2)
    stored[torch.arange(15), torch.tensor([0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0])] = 1
    query = Embeddings(vectors(4, 8, metric).vectors, metric, torch.arange(4))
    database = Embeddings(rows, metric, torch.arange(15))
    labels = torch.eye(2)[[0, 1, 0, 1]]
    found = embedding_ap(query, labels, database, stored)
    apart, generator = plain_distances(query, database), np.random.default_rng(0)
    for row in range(4):
        hit, values = (labels[row] @ stored.T > 0).numpy(), []
        for _ in range(4000):
            order = np.lexsort((generator.random(15), apart[row].round(9)))
            seen = hit[order]
            values.append((seen * np.cumsum(seen) / np.arange(1, 16)).sum() / seen.sum())
        assert float(found[row]) == pytest.approx(np.mean(values), abs=0.01)
    tied = measure_embeddings(Protocol("ties", ("MAP", "tie_gap")), query, labels, database, stored)
    assert tied.values["tie_gap"] > 0.05
    assert torch.allclose(tied.per_query["MAP"], found, atol=1e-12)


def test_the_ranking_is_exact_and_by_position_within_ties():
    database = Embeddings(torch.tensor([[1.0, 0], [0, 1], [2, 0], [-1, 0]]), "cosine", torch.arange(4))
    query = Embeddings(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "cosine", torch.arange(2))
    positions, apart = nearest(query, database, 9)
    assert positions.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]
    assert apart[0].tolist() == [0, 0, 1, 2]
    assert apart[1].tolist() == [1, 1, 1, 1]
    ((_, _, _, group),) = ordered(query, database)
    assert group.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="cannot be compared"):
        distances(query, replace(database, metric="euclidean"))
    codes = Codes(pack(torch.ones(4, 8)), 8, torch.arange(4))
    with pytest.raises(ValueError, match="codes and float vectors"):
        nearest(query, codes, 1)


# ------------------------------------------------------------------------------------------- a small net


class Small(Encoder):
    """A net whose embedding is ``features``; never negative with ``positive``."""

    def __init__(self, positive: bool) -> None:
        super().__init__()
        self.width, self.positive = D, positive
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 64), nn.ReLU()
        )
        self.last = nn.Linear(64, D)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.last(self.net(images - 0.5))
        return (nn.functional.softplus(rows) + 1.0 if self.positive else rows), {}


@cache
def data() -> rh.data.RetrievalData:
    return rh.load_data("synthetic", query=40)


@cache
def trained(metric: str, positive: bool = False) -> Hasher:
    """An embedding by distances to class means within a batch, in forty steps."""
    torch.manual_seed(0)
    encoder = Small(positive)
    optimiser = torch.optim.Adam(encoder.parameters(), 3e-3)
    train = data().train.batch(torch.arange(len(data().train)))
    images, labels = train.inputs["image"], train.labels
    for _ in range(40):
        rows, _ = encoder(images)
        if metric == "cosine":
            rows = nn.functional.normalize(rows - rows.mean(0) * float(positive), dim=1)
        means = labels.T @ rows / labels.sum(0)[:, None].clamp_min(1)
        loss = nn.functional.cross_entropy(-10 * torch.cdist(rows, means), labels.argmax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Hasher({"image": encoder}, {"image": AsIs(D, metric)}, {"foreign": "small"}).eval()


def test_wrap_makes_an_embedding_of_a_net():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, D), nn.Softplus())
    for metric in METRICS:
        victim = rh.wrap(net, bits=D, output="float", metric=metric)
        assert victim.distance == metric
        assert evaluate(victim, data())["MAP"] > evaluate(rh.wrap(net, bits=D), data())["MAP"]
    with pytest.raises(ValueError, match="metric must be one of cosine, euclidean, got 'l2'"):
        rh.wrap(net, bits=D, output="float", metric="l2")


ATTACKS = {
    "guided": guided_apgd,
    "wrong": wrong_apgd,
    "flip": flip_apgd,
    "soft-ap": soft_ap_apgd,
    "margin-pn": margin_pn_apgd,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("positive", [False, True])
def test_attacks_lower_the_ap_of_the_models_own_distance(metric, positive):
    context = make_context(trained(metric, positive), data())
    clean = score_clean(context)
    assert clean.setting.distance == metric
    if positive:  # cut at 0, every code would be the same and MAP that of chance
        assert bool((context.database.rows() > 0).all())
    assert clean["MAP"] > clean.reference["chance"] + 0.2
    for name, attack in ATTACKS.items():
        chosen = attack(eps=24 / 255, steps=10)
        result = score_attack(context, chosen, attack_all(context, chosen))
        assert result["MAP"] < clean["MAP"] - 0.05, name
        assert result["distance"] > 0
        assert result["MAP/8bit"] < clean["MAP"]


def test_a_targeted_attack_raises_the_ap_of_the_target():
    result = evaluate(trained("cosine"), data(), attack=guided_targeted_apgd(eps=32 / 255, steps=10))
    assert result["t-MAP"] > result.reference["clean"] + 0.1
    assert result["gain"] > 0.1


def test_the_slope_of_the_soft_ap_is_that_of_finite_differences():
    context = make_context(trained("cosine"), data())
    batch, known = context.batch(0), context.known(on_embeddings(soft_ap_apgd()))
    for metric in METRICS:
        goal = Goal(batch.labels, -1)
        victim = trained(metric)
        guidance = AllItems()(victim, batch, goal, known, Draws(0))
        rows = victim(batch.inputs)["image"].logits.detach().double()
        parts = {name: getattr(guidance, name).double() for name in ("codes", "low", "high", "weights")}
        guidance = replace(guidance, **parts)

        def value(rows, guidance=guidance, goal=goal):
            output = HashOutput(rows, rows, rows)
            return EmbeddingSoftAP()(Probe({"image": output}, {}, batch, goal, 1.0, known), guidance)

        leaf = rows.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(value(leaf).sum(), leaf)
        way = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)).double()
        step = 1e-7
        measured = (value(rows + step * way) - value(rows - step * way)) / (2 * step)
        assert torch.allclose(measured, (slope * way).sum(1), atol=1e-4)


def test_an_attack_on_bits_is_refused_by_name():
    bits = Attack("hag", Own(), HAGLoss(), PGD(5), threat_on("image", 8 / 255))
    with pytest.raises(ValueError, match=r"'hag' .* works on bits.*guided-apgd"):
        evaluate(trained("cosine"), data(), attack=bits)
    with pytest.raises(ValueError, match="no binary codes"):
        rh.encode_split(trained("cosine"), data().query)


def test_a_suite_on_an_embedding_names_the_distance_and_what_it_leaves_out():
    context = make_context(trained("euclidean"), data())
    result = assess(context, "fast", threat_on("image", 32 / 255, knowledge="W2"), queries=12)
    assert result.setting.distance == "euclidean"
    assert result["wMAP"] < result.reference["clean"] - 0.1
    assert {"guided", "soft-ap", "uniform noise"} <= set(result.attacks)
    assert any("floor" in note for note in result.notes)
    flags = {flag.id: flag.level for flag in result.flags}
    assert {flags[id] for id in ("F1", "F2", "F3", "F15", "F17", "F19", "F22")} == {"pass"}
    assert flags["F14"] == "pass"


@pytest.mark.parametrize("metric", METRICS)
def test_searches_by_questions_work_on_an_embedding(metric):
    context = make_context(trained(metric), data(), queries=8)
    clean = score_clean(context)["MAP"]
    threat = threat_on("image", 32 / 255)
    specs = [*oracle_attacks(threat, budget=40, k=10), noise("uniform noise", threat, 10)]
    for spec in specs:
        attacked = spec.run(context, 0, 0)
        assert float(score_attack(context, _described(spec), attacked)["MAP"]) <= clean + 1e-9, spec.name
    moved = replace(specs[0], judge="moved").run(context, 0, 0)
    assert float(score_attack(context, _described(specs[0]), moved)["distance"]) > 0


def _described(spec):
    return SimpleNamespace(name=spec.name, threat=spec.threat, budget="", targeted=False)
