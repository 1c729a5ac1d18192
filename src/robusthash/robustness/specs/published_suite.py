"""The attacks as published: for numbers to compare with printed ones, never evidence of robustness."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

from robusthash.attacks.base import Attack
from robusthash.attacks.pgd import PGD
from robusthash.attacks.threat_model import Threat, threat_on
from robusthash.core.registry import build, card, catalogue
from robusthash.evaluation.attack_spec import GradientAttack, Kind
from robusthash.metrics.protocol import Protocol
from robusthash.objectives.base import HashObjective
from robusthash.robustness.suite import Suite, attacked_modality

PAPER = "paper"
KINDS: dict[str, Kind] = {"T": "transfer", "B1": "black-box", "B2": "black-box"}  # by what an attack knows
LEGACY = "MAP@5000/hits/legacy"  # printed by the published code, in a stable order
SHORT = {"name": "pgd", "steps": 20, "step_size": 2 / 255}  # half of the papers stop at 20 steps on images


def paper_suite(
    objective: HashObjective,
    threat: Threat | None = None,
    queries: int | None = 1000,
    steps: int | None = None,
    pairs: bool = False,
) -> Suite:
    """Every published attack once, with its own steps, step size, slope and knowledge.

    Each returns its last point. An attack that a file registers with ``evidence`` ``paper`` or ``paper+code``
    joins by itself, with the options that are registered as ``published``, and of the reconstructions one
    that registers such; ``pgd-20`` joins the 100 steps of ``pgd``. Attacks that compare image and text join
    with ``pairs``. The threat gives the budget alone; under another norm, which counts in other units, steps
    keep their share of it.

    Args:
        steps: no attack takes more, and what learns takes no more epochs; the suite, and the budget of its
            results, then say so in their names.
        pairs: victim and data have both image and text.

    Raises:
        ValueError: a budget of edits, under which no attack was published.
    """
    threat = threat or threat_on(knowledge="W2")
    if threat.edits:
        raise ValueError(f"no attack was published under {threat.name}; the tier 'paper' takes a norm")
    on = attacked_modality(threat)
    modality: dict[str, Any] = {} if on == "image" else {"modality": on}
    joins = {"any", on, *(("cross-modal",) if pairs else ())}
    known = [c for c in catalogue("attack") if c.evidence.startswith("paper") or c.published]
    cards = [c for c in known if c.modality in joins]
    settings = {card.name: {"name": card.name, **card.published} for card in cards}
    if on != "text":
        settings["pgd-20"] = SHORT
    specs = []
    for name, options in settings.items():
        if modality and not takes_modality(options["name"], on):
            continue
        attack = build("attack", {**options, **modality}, objective=objective)
        kind = KINDS.get(attack.threat.knowledge, "white-box")
        specs.append(GradientAttack(name, _with_steps(attack, threat, steps), kind=kind).at(threat))
    title = PAPER if steps is None else f"{PAPER} at most {steps} steps"
    return Suite(title, tuple(specs), queries)


def takes_modality(name: str, modality: str) -> bool:
    """True for an attack that changes this modality; some change images alone, ``dacm`` no pair."""
    takes = "modality" in signature(card("attack", name).make).parameters
    return takes and (modality, name) != ("both", "dacm")


def published(name: str) -> bool:
    """True for the name of a suite of attacks as published, however many steps they took."""
    return name == PAPER or name.startswith(f"{PAPER} at most ")


def _with_steps(attack: Attack, threat: Threat, most: int | None) -> Attack:
    """The attack with steps of the same share of the budget under another norm, and with at most ``most``."""
    search: Any = attack.search  # every search of a published attack counts steps
    before, after = (next(iter(t.balls.values())) for t in (attack.threat, threat))
    if before.norm != after.norm and isinstance(search, PGD):
        search = replace(search, step_size=search.step_size / before.eps * after.eps or search.step_size)
    if most is not None:
        search = replace(search, steps=min(search.steps, most))
        attack = replace(attack, guide=attack.guide.at_most(most))
    return replace(attack, search=search, threat=replace(threat, knowledge=attack.threat.knowledge))


def with_legacy(protocol: Protocol) -> Protocol:
    """The protocol with MAP@5000 in stable-sort order next to its own measures."""
    return replace(protocol, measures=tuple(dict.fromkeys((*protocol.measures, LEGACY))))
