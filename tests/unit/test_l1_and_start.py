"""Attacks under L1 budgets, and SAAT's start at the clean image."""

from __future__ import annotations

import pytest
import torch
from helpers import make_data, trained_hasher

from robusthash.attacks import Attack, cgat, image_threat, mainstay, mainstay_targeted, pgd
from robusthash.attacks.pgd import APGD
from robusthash.attacks.published import steps_on
from robusthash.attacks.threat_model import named_threat
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal
from robusthash.data import RetrievalData
from robusthash.evaluation import evaluate, make_context
from robusthash.evaluation.context import EvaluationContext
from robusthash.models import Hasher
from robusthash.objectives import DPSH
from robusthash.robustness.assess import assess
from robusthash.robustness.suite import tier

EPS = 2.0  # of 432 entries


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def victim(data: RetrievalData) -> Hasher:
    return trained_hasher(data)


@pytest.fixture(scope="module")
def context(victim: Hasher, data: RetrievalData) -> EvaluationContext:
    return make_context(victim, data)


def attacked_score(attack: Attack, context: EvaluationContext, start: bool) -> torch.Tensor:
    """(B,) what the attack ascends, at the clean inputs or at what it found."""
    batch = context.batch(0)
    goal, known, draws = Goal(batch.labels, -1), context.known(attack), Draws(0)
    score, _ = attack.aim(context.victim, batch, goal, known, draws)
    found = attack.perturb(context.victim, batch, goal, known, draws=draws)
    with torch.no_grad():
        return score(batch.inputs if start else found.inputs, 1.0)[0]


@pytest.mark.parametrize("name", ["pgd", "mainstay"])
def test_published_attacks_take_an_l1_budget_and_use_it(name: str, context: EvaluationContext) -> None:
    attack = build("attack", {"name": name, "eps": EPS, "norm": "l1", "steps": 20}, objective=DPSH())
    assert attack.threat.name == "img-l1-2"
    assert attack.search.step_size == EPS / 8
    clean, found = (attacked_score(attack, context, start) for start in (True, False))
    assert bool((found > clean).all())
    result = evaluate(context.victim, context.data, attack=attack)
    assert result.setting.threat == "img-l1-2"
    assert result.perceptibility["l1/max"] <= EPS * (1 + 1e-5)
    assert result.perceptibility["l1/mean"] > 0.9 * EPS
    assert result.perceptibility["l0/mean"] < 0.5  # few pixels, as an L1 ball has it
    assert result["MAP"] <= evaluate(context.victim, context.data)["MAP"]


def test_apgd_under_l1_beats_random_points_of_the_ball(context: EvaluationContext) -> None:
    attack = mainstay(eps=EPS, norm="l1", slope="one")
    searched = Attack("apgd", attack.guide, attack.loss, APGD(20), attack.threat)
    batch = context.batch(0)
    score, _ = searched.aim(context.victim, batch, Goal(batch.labels, -1), context.known(searched), Draws(0))
    found = attacked_score(searched, context, False)
    for seed in range(3):
        noise = attack.threat.random_start(batch.inputs, batch.ids, Draws(seed))
        with torch.no_grad():
            assert bool((found >= score(noise, 1.0)[0]).all())


def test_a_suite_runs_under_an_l1_threat(context: EvaluationContext) -> None:
    threat = named_threat("img-l1-2", "W2")
    result = assess(context, tier("smoke", threat))
    assert result.setting.threat == "img-l1-2"
    assert result["wMAP"] <= result["clean"]


def test_l1_has_no_customary_budget() -> None:
    with pytest.raises(ValueError, match="no customary eps here; give eps"):
        pgd(DPSH(), norm="l1")
    with pytest.raises(KeyError, match="img-l1"):
        named_threat("img-l1")
    assert named_threat("img-l1-12").name == image_threat(12, "l1").name == "img-l1-12"
    assert image_threat(12, "l1").from_settings(image_threat(12, "l1").settings()) == image_threat(12, "l1")
    assert image_threat(12, "l1").scaled(0.5).name == "img-l1-6"


def test_steps_of_l2_and_l1_are_an_eighth_of_the_budget_and_others_as_they_were() -> None:
    assert steps_on("image", 5, threat=image_threat(0.5, "l2")).step_size == 0.5 / 8
    assert steps_on("image", 5, threat=image_threat()).step_size == 1 / 255
    assert steps_on("image", 5, 0.3, threat=image_threat(0.5, "l2")).step_size == 0.3


@pytest.mark.parametrize("make", [mainstay, mainstay_targeted, cgat])
def test_the_start_at_the_clean_image_can_be_asked_for(make, context: EvaluationContext) -> None:
    """One step of next to no length returns the start itself."""
    batch = context.batch(0)
    for random in (True, False):
        attack = make(steps=1, step_size=1e-12, random_start=random)
        goal = Goal(batch.labels, 1 if attack.targeted else -1)
        found = attack.perturb(context.victim, batch, goal, context.known(attack), draws=Draws(0))
        assert torch.equal(found.inputs["image"], batch.inputs["image"]) != random
    assert make().search.random_start is True  # as SAAT's code
