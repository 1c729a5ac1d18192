"""The attacks as published: for numbers to hold beside printed ones, never evidence of robustness."""

from __future__ import annotations

from dataclasses import replace

from robusthash.attacks.base import Attack
from robusthash.attacks.threat import Threat, threat_on
from robusthash.core.registry import build, catalogue
from robusthash.evaluation.lines import Gradient
from robusthash.evaluation.protocol import Protocol
from robusthash.evaluation.suite import Suite, attacked_modality
from robusthash.objectives.base import HashObjective

PAPER = "paper"
LEGACY = "MAP@5000/hits/legacy"  # what the published code prints, in a stable order
SHORT = {"name": "pgd", "steps": 20, "step_size": 2 / 255}  # of image attacks: half of the papers stop at 20 steps


def paper_suite(objective: HashObjective, threat: Threat | None = None, queries: int | None = 1000) -> Suite:
    """Every published attack once, with its own steps, step size, slope and knowledge; each returns its last point.

    An attack that a file registers with ``evidence`` ``paper`` or ``paper+code`` joins by itself. ``pgd-20`` stands
    beside the 100 steps of ``pgd``. The threat gives the budget alone.

    Raises:
        ValueError: a budget of edits, under which no attack was published.
    """
    threat = threat or threat_on(knowledge="W2")
    if threat.edits:
        raise ValueError(f"no attack was published under {threat.name}; the tier 'paper' takes a norm, as img-linf-8")
    on = attacked_modality(threat)
    wanted = {} if on == "image" else {"modality": on}
    published = [c for c in catalogue("attack") if c.evidence.startswith("paper") and c.modality in ("any", on)]
    attacks: dict[str, Attack] = {
        card.name: build("attack", {"name": card.name, **wanted}, objective=objective) for card in published
    }
    if on != "text":
        attacks["pgd-20"] = build("attack", {**SHORT, **wanted}, objective=objective)
    lines = [Gradient(name, attack).at(threat) for name, attack in attacks.items()]
    return Suite(PAPER, tuple(lines), queries)


def with_legacy(protocol: Protocol) -> Protocol:
    """The protocol with MAP@5000 in stable-sort order beside its own measures."""
    return replace(protocol, measures=tuple(dict.fromkeys((*protocol.measures, LEGACY))))
