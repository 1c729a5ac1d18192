"""A query that shares a label with every label set of the database has no target: targeted attacks leave it
out."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from helpers import make_data, small_hasher

from robusthash.core.registry import build, card, catalogue
from robusthash.data import RetrievalData
from robusthash.evaluation import evaluate, make_context
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import attack_all, score_attack
from robusthash.objectives import DPSH
from robusthash.robustness import assess, paper_suite

TARGETED = [c.name for c in catalogue("attack") if c.targeted and c.modality != "cross-modal"]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    """Queries 2 and 5 have all labels, a set that no other item has."""
    made = make_data(query=8)
    labels = made.query.labels.clone()
    labels[[2, 5]] = 1.0
    assert not (made.database.labels.sum(1) == 3).any()
    return replace(made, query=replace(made.query, labels=labels))


@pytest.fixture(scope="module")
def context(data: RetrievalData) -> EvaluationContext:
    return make_context(small_hasher(), data)


def short(name: str) -> dict[str, int]:
    """Two steps or one epoch, and five steps to fit, of what the attack takes."""
    takes = inspect.signature(card("attack", name).make).parameters
    few = {"steps": 2, "fit_steps": 5, "hidden": 16, "epochs": 1, "width": 4}
    return {option: value for option, value in few.items() if option in takes}


@pytest.mark.parametrize("name", TARGETED)
def test_each_targeted_attack_leaves_it_out_and_counts_it(name: str, data: RetrievalData) -> None:
    attack = build("attack", {"name": name, **short(name)}, objective=DPSH())
    result = evaluate(small_hasher(), data, attack=attack)
    assert result.empty == 2
    assert "2 queries have no possible target and are left out" in result.notes
    missing = torch.nonzero(result.per_query["t-MAP"].isnan()).flatten().tolist()
    assert missing == [2, 5]
    kept = result.per_query["t-MAP"][[0, 1, 3, 4, 6, 7]]
    assert result.values["t-MAP"] == pytest.approx(float(kept.mean()))


@pytest.mark.parametrize("name", [n for n in TARGETED if n != "tha"])
def test_the_other_queries_come_out_as_without_it(
    name: str, data: RetrievalData, context: EvaluationContext
) -> None:
    """The draws are keyed by query, so leaving one out changes no other."""
    attack = build("attack", {"name": name, **short(name)}, objective=DPSH())
    whole = score_attack(context, attack, attack_all(context, attack)).per_query["t-MAP"]
    plain = replace(data, query=replace(data.query, labels=make_data(query=8).query.labels))
    usual = evaluate(small_hasher(), plain, attack=attack).per_query["t-MAP"]
    assert torch.equal(whole[[0, 1, 3, 4, 6, 7]], usual[[0, 1, 3, 4, 6, 7]])


def test_the_paper_tier_runs_to_its_end(context: EvaluationContext) -> None:
    suite = paper_suite(DPSH(), queries=None, steps=2)
    lines = tuple(
        line for line in suite.specs if line.name in ("p2p", "dhta", "mainstay", "mainstay-targeted")
    )
    result = assess(context, replace(suite, specs=lines))
    assert "2 queries have no possible target and are left out" in result.notes
    assert {"p2p", "dhta", "mainstay-targeted"} <= set(result.attacks)
