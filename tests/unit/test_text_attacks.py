"""Attacks on images, texts and pairs of both, in every direction; edits of words; what the pages make of
them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import linear_hasher, reference_of, train_config
from torch import Tensor

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.table_text import markdown
from robusthash.apps.experiment.tables import make_rows
from robusthash.apps.reports.run_report import write_report
from robusthash.attacks import Attack
from robusthash.attacks.base import Probe, Search
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import Agreement
from robusthash.attacks.pgd import APGD, PGD, RawGradient
from robusthash.attacks.text_edits import GreedyFlips
from robusthash.attacks.threat_model import Ball, Edits, Threat, edit_threat, threat_on
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal
from robusthash.data import ArraySource, RetrievalData, Split, load_data
from robusthash.evaluation import EvaluationContext, make_context, score_attack, score_clean
from robusthash.evaluation.attack_block import AttackedBlock, attack_block
from robusthash.evaluation.evaluate import attack_all, worst
from robusthash.metrics.distortion import text_measures
from robusthash.metrics.results import EvalResult, Setting, by_direction, headline_of
from robusthash.models import Hasher, build_hasher
from robusthash.objectives import DPSH
from robusthash.training import HashingRecipe, fit

NAMES = ("pgd", "hag", "sdha", "cgat", "mainstay", "mainstay-targeted", "p2p", "dhta", "guided-apgd")
PLACES = {"image": ("I2T", "I2I"), "text": ("T2I", "T2T"), "both": ("I2T", "I2I", "T2I", "T2T")}
CASES = [(name, on, direction) for name in NAMES for on, places in PLACES.items() for direction in places]
ENDS = {"I": "image", "T": "text"}


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return load_data("synthetic", train=96, query=16, database=64)


@pytest.fixture(scope="module")
def victim(data: RetrievalData) -> Hasher:
    text = {"name": "mlp", "widths": [32]}
    hasher = build_hasher(
        bits=16, image={"name": "small", "width": 8, "grid": 2}, text=text, vocabulary=data.vocabulary
    )
    fit(HashingRecipe(hasher, DPSH()), data, train_config(30))
    return hasher


@pytest.fixture(scope="module")
def contexts(victim: Hasher, data: RetrievalData) -> dict[str, EvaluationContext]:
    return {
        name: make_context(victim, data, direction=(ENDS[name[0]], ENDS[name[2]]), batch_size=9)
        for name in ("I2T", "I2I", "T2I", "T2T")
    }


def make(name: str, **options: object) -> Attack:
    return build("attack", {"name": name, "steps": 3, **options}, objective=DPSH())


@pytest.mark.parametrize(("name", "on", "direction"), CASES, ids=["-".join(case) for case in CASES])
def test_every_attack_in_every_direction(
    name: str, on: str, direction: str, contexts: dict[str, EvaluationContext]
) -> None:
    context, attack = contexts[direction], make(name, modality=on)
    attacked = attack_block(context, attack, 0)
    batch = context.batch(0, attack.threat.balls)
    query = context.direction[0]
    attack.threat.verify({**batch.inputs, query: attacked.inputs}, batch.inputs)
    if not attack.selects:  # one that selects returns the clean query where no point that it saw was worse
        assert bool((attacked.inputs != batch.inputs[query]).flatten(1).any(1).all())
    assert attacked.signs.shape == (9, 3 if attack.targeted else 1, 16)
    assert set(attacked.pixels) >= ({"mse", "linf"} if query == "image" else {"changed", "l1"})


@pytest.mark.parametrize("name", ["mainstay", "dhta", "guided-apgd", "sdha"])
def test_a_joint_attack_makes_one_pair_for_all_directions(
    name: str, contexts: dict[str, EvaluationContext]
) -> None:
    attack = make(name, modality="both")
    found = {direction: attack_block(context, attack, 0) for direction, context in contexts.items()}
    assert torch.equal(found["I2T"].inputs, found["I2I"].inputs)
    assert torch.equal(found["T2I"].inputs, found["T2T"].inputs)
    context = contexts["T2T"]
    batch = context.batch(0, attack.threat.balls)
    goal = Goal(batch.labels if not attack.targeted else context.targets[:9, 0], 1 if attack.targeted else -1)
    pair = attack(
        context.victim, batch, goal, context.known(attack), draws=Draws(context.seed, ("attack", "0"))
    )
    assert torch.equal(pair.inputs["image"], found["I2I"].inputs)
    assert torch.equal(pair.inputs["text"], found["T2T"].inputs)


def test_attacks_harm_the_modality_that_they_change(contexts: dict[str, EvaluationContext]) -> None:
    attacks = {
        "I2I": make("mainstay", steps=10, slope="one", eps=16 / 255, step_size=4 / 255),
        "T2T": build("attack", {"name": "text-edits", "edits": 3}, objective=DPSH()),
    }
    for direction, attack in attacks.items():
        context = contexts[direction]
        clean, found = score_clean(context), score_attack(context, attack, attack_all(context, attack))
        assert found["MAP"] < clean["MAP"] - 0.05
    assert found.setting.threat == "txt-bow-3"
    assert 0 < found.perceptibility["edits/max"] <= 3
    assert found.perceptibility["largest/max"] == 1.0


# --- rounding as a control


def mean_ap_of(context: EvaluationContext, bags: Tensor) -> float:
    """MAP of any bags in place of the queries, by the data themselves: a query split that holds them."""
    split = Split(
        "query",
        ArraySource({"text": bags}),
        torch.arange(len(bags)),
        context.query_labels,
        HASHES[: len(bags)],
    )
    data = replace(context.data, query=split)
    return score_clean(make_context(context.victim, data, direction=context.direction))["MAP"]


HASHES = np.array([f"{number:016d}".encode() for number in range(99)], dtype="S16")


@pytest.mark.parametrize("eps", [0.05, 0.45, 0.9])
def test_bags_are_scored_rounded_to_whole_words_too(
    eps: float, contexts: dict[str, EvaluationContext]
) -> None:
    context = contexts["T2I"]
    attack = make("mainstay", modality="text", eps=eps, step_size=eps / 2)
    attacked = attack_all(context, attack)
    result, clean = score_attack(context, attack, attacked), score_clean(context)
    assert result["MAP"] < clean["MAP"] or eps == 0.05
    assert result["MAP/rounded"] == pytest.approx(
        mean_ap_of(context, (attacked.inputs > 0.5).float()), abs=1e-9
    )
    assert (result["MAP/rounded"] == clean["MAP"]) == (eps < 0.5)  # below a half, rounding gives the bag back
    assert result["MAP"] == pytest.approx(mean_ap_of(context, attacked.inputs), abs=1e-9)
    lowest = worst(context, clean, {"mainstay": result})
    expected = torch.minimum(result.per_query["MAP/rounded"], clean.per_query["MAP"])
    assert torch.equal(lowest.per_query["wMAP/rounded"], expected)


def test_a_targeted_attack_on_bags_is_undone_by_rounding_too(contexts: dict[str, EvaluationContext]) -> None:
    attack = make("mainstay-targeted", modality="text")
    result = score_attack(contexts["T2I"], attack, attack_all(contexts["T2I"], attack))
    assert result["t-MAP/rounded"] == pytest.approx(result.reference["clean"], abs=1e-12)
    assert result["t-MAP"] > result.reference["clean"]


def test_edits_are_whole_words_already(contexts: dict[str, EvaluationContext]) -> None:
    attack = build("attack", {"name": "text-edits", "edits": 2, "like": "mainstay"}, objective=DPSH())
    result = score_attack(contexts["T2I"], attack, attack_all(contexts["T2I"], attack))
    assert result["MAP"] < score_clean(contexts["T2I"])["MAP"]
    assert torch.equal(result.per_query["MAP/rounded"], result.per_query["MAP"])


def test_images_and_vectors_of_features_have_no_whole_words(
    contexts: dict[str, EvaluationContext], data: RetrievalData
) -> None:
    attack = make("mainstay")
    assert (
        "MAP/rounded" not in score_attack(contexts["I2T"], attack, attack_all(contexts["I2T"], attack)).values
    )
    half = {  # topics: weights between 0 and 1
        name: replace(
            split,
            source=ArraySource({k: v * 0.5 for k, v in split.source.inputs(split.rows).items()}),
            rows=torch.arange(len(split)),
        )
        for name, split in data.splits.items()
    }
    context = make_context(contexts["T2I"].victim, replace(data, **half), direction=("text", "image"))
    attack = make("mainstay", modality="text")
    found = score_attack(context, attack, attack_all(context, attack))
    assert "MAP/rounded" not in found.values
    assert "wMAP/rounded" not in worst(context, score_clean(context), {"mainstay": found}).values


def test_blocks_of_earlier_versions_are_read_without_whole_words(
    contexts: dict[str, EvaluationContext],
) -> None:
    context, attack = contexts["T2I"], make("mainstay", modality="text")
    new = [attack_block(context, attack, block) for block in range(context.blocks)]
    arrays = new[0].arrays()
    again = AttackedBlock.from_arrays(arrays)
    assert torch.equal(again.whole_words, new[0].whole_words)
    assert again.whole_words.shape == again.signs.shape
    del arrays["whole_words"]
    whole = AttackedBlock.join([AttackedBlock.from_arrays(arrays), *new[1:]])
    result = score_attack(context, attack, whole)
    assert "MAP/rounded" not in result.values
    assert result["MAP"] == score_attack(context, attack, AttackedBlock.join(new))["MAP"]


@pytest.mark.parametrize("like", [*NAMES, {"name": "tha", "fit_steps": 5, "hidden": 16}], ids=str)
def test_edits_take_any_guide(like: object, contexts: dict[str, EvaluationContext]) -> None:
    attack = build("attack", {"name": "text-edits", "like": like, "edits": 2}, objective=DPSH())
    context = contexts["T2I"]
    attacked = attack_block(context, context.fitted(attack), 0)
    changed = (attacked.inputs != context.batch(0).inputs["text"]).sum(1)
    assert int(changed.max()) in (1, 2)
    assert attack.threat.name == "txt-bow-2"
    assert attack.threat.knowledge == build("attack", like, objective=DPSH()).threat.knowledge


@pytest.mark.parametrize("modality", ["image", "text"])
def test_nearly_every_item_gets_a_gradient(modality: str, victim: Hasher, data: RetrievalData) -> None:
    batch = data.database.batch(torch.arange(64)).only({modality})
    leaf = batch.inputs[modality].clone().requires_grad_(True)
    goal = Goal(batch.labels, -1)
    guidance = Mainstay()(victim, batch, goal, reference_of(victim, data.train), Draws(0))
    probe = Probe(victim({modality: leaf}), {modality: leaf}, batch, goal, 1.0, None)
    (grad,) = torch.autograd.grad(Agreement()(probe, guidance).sum(), leaf)
    assert float((grad.flatten(1).abs().sum(1) > 0).float().mean()) > 0.99


# --- edit budgets


def bags(rows: int = 4, words: int = 9, seed: int = 0) -> Tensor:
    return (torch.rand(rows, words, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


def test_an_edit_threat_counts_flips() -> None:
    threat, clean = edit_threat(2), bags()
    assert threat.name == "txt-bow-2"
    assert threat.scaled(0.6).name == "txt-bow-1"
    within = clean.clone()
    within[:, :2] = 1 - within[:, :2]
    threat.verify({"text": within}, {"text": clean})
    beyond = within.clone()
    beyond[0, 5] = 1 - beyond[0, 5]
    half = clean.clone()
    half[1, 1] = 0.5
    for wrong, said in ((beyond, "3 from its origin under flips, beyond 2"), (half, "other than 0 and 1")):
        with pytest.raises(ValueError, match=said):
            threat.verify({"text": wrong}, {"text": clean})
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Edits(-1)


def test_random_edits_are_exactly_m_and_keyed() -> None:
    clean, ids = bags(50), torch.arange(50)
    found = Edits(3).random_start(clean, ids, Draws(0))
    assert bool((Edits(3).size(found - clean) == 3).all())
    assert torch.equal(found[10:20], Edits(3).random_start(clean[10:20], ids[10:20], Draws(0)))
    assert not torch.equal(found, Edits(3).random_start(clean, ids, Draws(1)))


def test_what_is_no_bag_of_words_is_refused() -> None:
    for origin in (bags() * 2, bags().long(), bags()[:, :, None]):
        with pytest.raises(ValueError, match="bags of words of 0 and 1"):
            Edits(2).project(origin, origin)
    tokens = torch.randint(0, 9, (4, 6))
    with pytest.raises(ValueError, match=r"norm ball around torch.int64"):
        Ball("linf", 0.5).project(tokens, tokens)


@pytest.mark.parametrize(
    "search", [PGD(2), APGD(2), RawGradient(2)], ids=lambda search: type(search).__name__
)
def test_other_searches_refuse_edits(search: Search) -> None:
    with pytest.raises(ValueError, match="greedy-flips"):
        Attack("wrong", Mainstay(), Agreement(), search, edit_threat(2))


def test_greedy_flips_refuse_norm_balls() -> None:
    mixed = Threat({"image": Ball("linf", 8 / 255), "text": Edits(2)})
    for threat in (threat_on("text"), threat_on("image")):
        with pytest.raises(ValueError, match="greedy-flips"):
            Attack("wrong", Mainstay(), Agreement(), GreedyFlips(), threat)
    attack = Attack("mixed", Mainstay(), Agreement(), GreedyFlips(), mixed)
    victim = linear_hasher(torch.eye(3), modality="text")
    batch = Batch({"image": torch.rand(2, 3), "text": bags(2, 3)}, torch.ones(2, 1), torch.arange(2))
    with pytest.raises(ValueError, match="edits of texts alone"):
        attack.search(lambda inputs, progress: (None, None), batch, mixed, Draws(0), None, None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GreedyFlips(0)
    assert victim.bits == 3


def test_text_measures() -> None:
    clean = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    found = text_measures(clean, torch.tensor([[1.0, 1.0, 0.25, 1.0]]))
    assert {name: float(values[0]) for name, values in found.items()} == {
        "changed": 0.5,
        "edits": 2.0,
        "l1": 1.25,
        "largest": 1.0,
    }


# --- runs, reports, tables


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = {
        "name": "pairs",
        "data": {"name": "synthetic", "train": 64, "query": 12, "database": 48},
        "hasher": {
            "bits": 8,
            "image": {"name": "small", "width": 4},
            "text": {"name": "mlp", "widths": [16]},
        },
        "training": {"objective": "dpsh", "epochs": 2, "batch_size": 32},
        "evaluation": {
            "directions": ["I2T", "I2I", "T2I", "T2T"],
            "attacks": [
                {"name": "mainstay", "steps": 2},
                {"name": "mainstay", "steps": 2, "modality": "both"},
                "text-edits",
                {"name": "text-edits", "like": "dhta"},
            ],
        },
        "runtime": {"device": "cpu"},
    }
    return training_stages.run_all(make_config(recipe), tmp_path_factory.mktemp("runs"))


def test_a_run_in_all_directions(run: Run) -> None:
    results = run.evaluated()
    images = {"clean", "mainstay", "mainstay on both", "worst"}
    texts = {"clean", "mainstay on both", "text-edits", "text-edits like dhta", "worst"}
    grouped = by_direction(results)
    assert {context: set(group) for context, group in grouped.items()} == {
        "I2T": images,
        "I2I": images,
        "T2I": texts,
        "T2T": texts,
    }
    assert headline_of(results["T2I worst"]) == "wMAP"
    assert headline_of(results["T2I text-edits like dhta"]) == "t-MAP"
    assert results["I2T clean"].setting.direction == "I2T"
    page = write_report(run).read_text(encoding="utf-8")
    for said in (
        "Results, I2T",
        "Results, T2T",
        "entries changed, mean",
        "pixels changed",
        "I2T, I2I, T2I, T2T",
    ):
        assert said in page
    assert page.count("of 8-bit images") == 2
    assert page.count(">of whole words<") == 2


def test_a_suite_on_texts_takes_words_exactly_and_vectors_in_the_range_of_the_training_set(run: Run) -> None:
    words = assessing.assess(run, "standard", "txt-bow-2", 6, direction="T2I", checked=False, stored=False)
    assert words is not None
    exact, greedy = (words.per_query[f"MAP under {line}"] for line in ("exact", "greedy words, codes"))
    assert float(exact.mean()) <= float(greedy.mean())
    assert torch.equal(words.per_query["wMAP"], words.per_query["MAP under refined exact"])
    assert torch.equal(words.per_query["wMAP"], words.per_query["wMAP/rounded"])
    vector = assessing.assess(run, "smoke", "txt-feat-linf", 6, direction="T2I", stored=False)
    assert vector is not None
    assert vector["wMAP"] <= vector["clean"]


def test_tables_of_directions(run: Run) -> None:
    rows = make_rows([run.path])
    chance = {
        context: group["clean"].reference["chance"]
        for context, group in by_direction(run.evaluated()).items()
    }
    assert rows[0].chance == chance
    whole, few = markdown(rows), markdown(rows, ["T2I clean", "T2I worst"])
    assert "| chance I2T | chance I2I | chance T2I | chance T2T |" in whole
    assert few.splitlines()[0] == "| recipe | T2I clean | T2I worst | chance T2I | training minutes | seeds |"
    assert f"{chance['T2I']:.3f}" in few.splitlines()[2]
    assert len({line.count("|") for line in whole.splitlines()}) == 1


def test_a_joint_attack_written_to_a_file(run: Run, tmp_path: Path) -> None:
    evaluation_stages.attack_to_file(
        run, {"name": "mainstay", "steps": 2, "modality": "both"}, tmp_path / "pair.npz"
    )
    evaluation_stages.attack_to_file(run, "text-edits", tmp_path / "text.npz")
    with np.load(tmp_path / "pair.npz") as pair, np.load(tmp_path / "text.npz") as text:
        assert pair["inputs"].shape[1:] == (3, 16, 16)
        assert pair["inputs_text"].shape == text["inputs"].shape
        assert set(np.unique(text["inputs"])) == {0.0, 1.0}
        assert pair["codes_text"].shape == pair["codes"].shape == (12, 1)


def test_results_are_grouped_by_direction_and_relevance() -> None:
    plain = EvalResult(Setting("", "", "", {}, "I2T", 8), {}, {})
    names = ["I2T clean", "I2T by class clean", "I2T by class worst", "I2T worst"]
    results = {}
    for name in names:
        scored_on, _, attack = name.rpartition(" ")
        results[name] = replace(plain, name=name, scored_on=scored_on, attack=attack)
    grouped = by_direction(results)
    assert {context: list(group) for context, group in grouped.items()} == {
        "I2T": ["clean", "worst"],
        "I2T by class": ["clean", "worst"],
    }
    clean, worst = replace(plain, attack="clean"), replace(plain, attack="worst")
    assert list(by_direction({"clean": clean, "worst": worst})) == [""]
    with pytest.raises(ValueError, match="'T2I worst' has no clean"):
        by_direction(
            {"I2T clean": replace(clean, scored_on="I2T"), "T2I worst": replace(worst, scored_on="T2I")}
        )
