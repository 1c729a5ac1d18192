"""Every registered attack keeps what attacks promise, and so does every variant of the searches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.checks import (
    ATTACK_CHECKS,
    DRAWS,
    LEARNED_CHECKS,
    World,
    agreement,
    check_labels,
    make_attack,
    run,
)
from robusthash.attacks import Attack, image_threat
from robusthash.attacks.base import Probe
from robusthash.attacks.cmla import CMLALoss
from robusthash.attacks.guides import Own
from robusthash.attacks.losses import Agreement, mainstay_loss
from robusthash.attacks.pgd import APGD, PGD, RawGradient
from robusthash.attacks.threat_model import threat_on
from robusthash.core.registry import Card, catalogue
from robusthash.core.types import Goal, Guidance

CARDS = [card for card in catalogue("attack") if card.modality != "tokens"]  # those: test_token_swaps.py
IDS = [card.name for card in CARDS]


# attacks that search on a model of their own, or not at all, never look at the victim
LEARNED = [card for card in CARDS if card.name in {"pros-gan", "ta-dch", "classifier", "aach", "eqb2a"}]
DIRECT = [card for card in CARDS if card not in LEARNED]


def place_of(card: Card, world: World, pairs: World) -> World:
    return pairs if card.modality in ("text", "cross-modal") else world


@pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("card", DIRECT, ids=lambda card: card.name)
def test_registered(card: Card, check: Callable[[Attack, World], None], world: World, pairs: World) -> None:
    place = place_of(card, world, pairs)
    attack = make_attack(card.name, place.objective)
    if card.name == "cmla":  # its price of a change may outweigh what three steps gain
        attack = replace(attack, loss=CMLALoss(size=0.0))
    check(place.fitted(attack), place)


@pytest.mark.parametrize("card", LEARNED, ids=lambda card: card.name)
def test_those_that_learn_a_model_of_their_own(card: Card, world: World, pairs: World) -> None:
    place = place_of(card, world, pairs)
    attack = place.fitted(make_attack(card.name, place.objective))
    for check in LEARNED_CHECKS:
        check(attack, place)


@pytest.mark.parametrize("card", CARDS, ids=IDS)
def test_labels_are_asked_for_where_needed(card: Card, world: World, pairs: World) -> None:
    place = place_of(card, world, pairs)
    check_labels(place.fitted(make_attack(card.name, place.objective)), place, card.supervised)


def test_cards_say_what_the_attacks_are(world: World) -> None:
    assert {
        "pgd",
        "hag",
        "sdha",
        "cgat",
        "mainstay",
        "mainstay-targeted",
        "p2p",
        "dhta",
        "guided-apgd",
    } <= set(IDS)
    for card in CARDS:
        attack = make_attack(card.name, world.objective)
        assert attack.targeted == card.targeted
        assert attack.name == card.name
        assert card.summary
        assert card.evidence == "own" or card.paper


VARIANTS = {
    "momentum": {"search": PGD(3, momentum=1.0)},
    "l2": {"threat": image_threat(0.5, "l2"), "search": PGD(3, step_size=0.2)},
    "apgd-random": {"search": APGD(3, random_start=True)},
    "apgd-l2": {"threat": image_threat(0.5, "l2"), "search": APGD(3)},
    "adam": {"search": RawGradient(3, "adam", lr=0.01)},
    "masked": {"loss": mainstay_loss("code", targeted=False)},
    "published-slope": {"slope": "published"},
}


@pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, check: Callable[[Attack, World], None], world: World) -> None:
    plain = make_attack("mainstay", world.objective, slope="one")
    check(replace(plain, **VARIANTS[name]), world)


PAIRED = {
    "image": {},
    "text": {"threat": threat_on("text")},
    "both": {"threat": threat_on("both")},
    "text-apgd": {"threat": threat_on("text"), "search": APGD(3)},
    "both-apgd": {"threat": threat_on("both"), "search": APGD(3)},
    "both-adam": {"threat": threat_on("both"), "search": RawGradient(3, "adam", lr=0.01)},
    "both-own": {"threat": threat_on("both"), "guide": Own()},
}


@pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", PAIRED)
def test_variants_on_pairs(name: str, check: Callable[[Attack, World], None], pairs: World) -> None:
    plain = make_attack("mainstay", pairs.objective, slope="one")
    check(replace(plain, **PAIRED[name]), pairs)


@pytest.mark.parametrize(
    "name", [c.name for c in CARDS if "restarts" in inspect.signature(c.make).parameters]
)
def test_restarts_are_never_worse(name: str, world: World) -> None:
    attacks = [make_attack(name, world.objective, restarts=restarts) for restarts in (1, 2, 4)]
    goal = world.goal(attacks[0])
    outs = [run(attack, world) for attack in attacks]
    scores = [goal.sign * agreement(attacks[0], world, o.inputs, goal, o.guidance) for o in outs]
    assert bool((scores[1] >= scores[0]).all())
    assert bool((scores[2] >= scores[1]).all())
    assert bool((scores[2] > scores[0]).any()), (
        "four restarts found nothing that one did not: are they the same?"
    )
    assert (outs[1].forward, outs[1].backward) == (2 * outs[0].forward + 2, 2 * outs[0].backward)

    def minus_ones(signs: Tensor) -> Tensor:
        return (signs < 0).sum(1).float()

    chosen = [minus_ones(run(attack, world, select=minus_ones).signs) for attack in attacks]
    assert bool((chosen[1] >= chosen[0]).all())
    assert bool((chosen[2] >= chosen[1]).all())


def test_slope_is_scheduled_over_the_steps(world: World) -> None:
    alphas: list[float] = []

    class Noted(Agreement):
        def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
            alphas.append(probe.alpha)
            return super().__call__(probe, guidance)

    attack = make_attack("mainstay", world.objective, steps=100)
    assert attack.slope == "published"
    small = replace(world.batch, inputs={"image": world.batch.inputs["image"][:1]}, ids=world.batch.ids[:1])
    goal = Goal(world.batch.labels[:1], -1)
    run(replace(attack, loss=Noted()), world, batch=small, goal=goal)
    assert alphas == [0.1] * 50 + [0.2] * 10 + [0.3] * 10 + [0.5] * 10 + [0.7] * 10 + [1.0] * 10
    alphas.clear()
    run(replace(attack, loss=Noted(), slope="one"), world, batch=small, goal=goal)
    assert alphas == [1.0] * 100
    with pytest.raises(ValueError, match=r"APGD compares scores of different steps.* give it slope 'one'"):
        replace(attack, search=APGD(5))


def test_mainstay_lowers_the_relevance_of_what_is_near(world: World) -> None:
    """The point of it all: attacked codes lie farther from relevant codes than clean ones; targeted ones
    nearer."""
    codes, labels = world.reference.codes["image"], world.reference.labels
    with torch.no_grad():
        clean = torch.where(
            copy.deepcopy(world.victim).eval()(world.batch.inputs)["image"].logits >= 0, 1.0, -1.0
        )

    def gap(signs: Tensor, wanted: Tensor) -> Tensor:
        near = (wanted @ labels.T > 0).float()
        agreement = signs @ codes.T / codes.shape[1]
        return (agreement * near).sum(1) / near.sum(1) - (agreement * (1 - near)).sum(1) / (1 - near).sum(1)

    away = run(make_attack("mainstay", world.objective, steps=20), world)
    assert float(gap(away.signs, world.batch.labels).mean()) < float(gap(clean, world.batch.labels).mean())
    towards = run(make_attack("mainstay-targeted", world.objective, steps=20), world)
    assert float(gap(towards.signs, world.targets).mean()) > float(gap(clean, world.targets).mean())


def test_fgsm_is_one_full_step_of_pgd_and_raises_the_objective(world: World) -> None:
    fgsm = make_attack("pgd", world.objective, steps=1, step_size=8 / 255)
    assert fgsm.search == PGD(1, 8 / 255)
    many = make_attack("pgd", world.objective, steps=10, step_size=2 / 255)
    goal, guidance = world.goal(many), Guidance(torch.empty(0, world.victim.bits))
    before = -agreement(many, world, world.batch.inputs, goal, guidance)
    after = -agreement(many, world, run(many, world).inputs, goal, guidance)
    assert bool((after >= before).all())


def test_bad_settings_are_refused(world: World) -> None:
    plain = make_attack("mainstay", world.objective)
    for change, said in [
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"slope": "steep"}, "'steep'"),
        ({"selects": True}, "W2"),
    ]:
        with pytest.raises(ValueError, match=said):
            replace(plain, **change)
    makers: list[tuple[Callable[[], Any], str]] = [
        (lambda: PGD(0), "steps must be at least 1, got 0"),
        (lambda: APGD(1), "at least 2 steps, got 1"),
        (lambda: RawGradient(0), "steps must be at least 1, got 0"),
        (lambda: RawGradient(5, "lion"), "'lion'"),  # type: ignore[arg-type]
        (lambda: make_attack("mainstay", world.objective, eps=8), "outside"),
    ]
    for make, said in makers:
        with pytest.raises(ValueError, match=said):
            make()


def test_a_modality_that_is_not_there_is_named(world: World) -> None:
    attack = make_attack("mainstay", world.objective)
    bare = replace(world.batch, inputs={"text": torch.rand(8, 5)})
    with pytest.raises(ValueError, match="'image'"):
        run(attack, world, batch=bare)


def test_draws_are_scoped_by_attack_and_restart(world: World) -> None:
    """Two attacks of one evaluation do not share their random starts."""
    first = make_attack("mainstay", world.objective)
    other = replace(first, name="another")
    assert not torch.equal(
        run(first, world, draws=DRAWS).inputs["image"],
        run(other, world, draws=DRAWS).inputs["image"],
    )
