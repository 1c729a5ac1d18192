"""Suites: fixed sets of attacks in tiers of effort, the queries they run on, and one number at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from robusthash.attacks.base import Attack, Search
from robusthash.attacks.embedding_attacks import on_embeddings
from robusthash.attacks.pgd import Polish
from robusthash.attacks.published import guided_apgd, guided_sharp
from robusthash.attacks.ranking_losses import (
    flip_apgd,
    guided_targeted_apgd,
    margin_pn_apgd,
    soft_ap_apgd,
    wrong_apgd,
)
from robusthash.attacks.text_edits import ExactFlips, GreedyFlips, GreedySwaps
from robusthash.attacks.threat_model import Attacked as Modality
from robusthash.attacks.threat_model import Edits, Threat, threat_on
from robusthash.core.embeddings import Distance
from robusthash.core.identity import marked_identity
from robusthash.core.registry import nearest
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.aggregate import aggregate
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, RefinedAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import AttackRuns, BlockStore, NoStore, run_attacks
from robusthash.metrics.results import EvalResult, Flag


@dataclass(frozen=True)
class Suite:
    """Attacks, and the number of queries they are run on.

    Args:
        queries: chosen by ``data.splits.stable_subset``; None takes all.
        floor: random starts of each query in the search for its floor AP.
    """

    name: str
    specs: tuple[AttackSpec, ...]
    queries: int | None = None
    floor: int = 0

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if len(set(names)) < len(names) or "clean" in names:
            raise ValueError(f"attacks need names of their own, and none may be 'clean'; got {names}")

    def at(self, threat: Threat) -> Suite:
        """The same suite under another threat."""
        return replace(self, specs=tuple(spec.at(threat) for spec in self.specs))

    @property
    def own(self) -> tuple[AttackSpec, ...]:
        """The attacks that every victim is given: all but the adaptive ones, which go with a defense."""
        return tuple(spec for spec in self.specs if spec.kind != "adaptive")

    def with_attacks(self, specs: Sequence[AttackSpec]) -> Suite:
        """The suite with more attacks, before those that refine what was found."""
        refined = tuple(spec for spec in self.specs if isinstance(spec, RefinedAttack))
        others = tuple(spec for spec in self.specs if not isinstance(spec, RefinedAttack))
        return replace(self, specs=(*others, *specs, *refined))

    def digest(self) -> str:
        """Identity of all that its attacks depend on, with the number of the scheme before it."""
        return marked_identity([[spec.name, spec.restarts, spec.settings()] for spec in self.specs])


@dataclass(frozen=True)
class _Tier:
    names: tuple[str, ...]
    restarts: int
    steps: int
    queries: int | None
    floor: int
    targeted: bool = False
    refined: tuple[str, ...] = ()


_STANDARD = ("guided", "sharp", "wrong", "pursuit", "flip", "soft-ap", "margin-pn")
_REFINED = ("soft-ap", "margin-pn", "guided")
TIERS = {
    "smoke": _Tier(("guided",), 1, 10, 64, 0),
    "fast": _Tier(("guided", "soft-ap"), 1, 20, 500, 0),
    "standard": _Tier(_STANDARD, 2, 100, 1000, 8, targeted=True, refined=_REFINED),
    "full": _Tier(_STANDARD, 5, 300, None, 8, targeted=True, refined=_REFINED),
}


def tier(
    name: str,
    threat: Threat | None = None,
    *,
    extra_attacks: Sequence[AttackSpec] = (),
    queries: int | None = None,
) -> Suite:
    """A suite by its tier of effort.

    ``smoke`` shows that it runs, ``fast`` is for development, ``standard`` for claims, ``full`` for disputes.

    ========  =======================================================  ========  =====  =======
    tier      gradient attacks                                         restarts  steps  queries
    ========  =======================================================  ========  =====  =======
    smoke     guided                                                   1         10     64
    fast      guided, soft-ap                                          1         20     500
    standard  guided, sharp, wrong, pursuit, flip, soft-ap, margin-pn; 2         100    1000
              targeted guided (once, towards each target);
              then soft-ap, margin-pn, guided once more, each from
              the worst point of each query so far (``RefinedAttack``)
    full      as standard                                              5         300    all
    ========  =======================================================  ========  =====  =======

    Args:
        threat: ``img-linf-8`` by default. Under a budget of words greedy flips take the place of APGD, an
            attack ``exact`` tries every word, and it alone refines; under one of tokens greedy swaps do, and
            nothing refines. Nor does anything under a joint threat, whose pairs no direction's AP may choose.
            ``sharp``, whose steps have lengths, is left out for words and tokens.
        extra_attacks: other than the gradient attacks of every victim: transfer, black-box, noise, and the
            adaptive ones of the defense.
        queries: instead of the tier's.

    Raises:
        KeyError: no such tier; the attacks as published are ``published_suite.paper_suite``.
    """
    if name not in TIERS:
        raise KeyError(f"no tier is called {name!r}{nearest(name, [*TIERS, 'paper'])}")
    effort, threat = TIERS[name], threat or threat_on(knowledge="W2")
    steps, on = effort.steps, attacked_modality(threat)
    attacks = {
        "guided": guided_apgd(steps=steps, modality=on),
        "sharp": guided_sharp(steps=steps, modality=on),
        "wrong": wrong_apgd(steps=steps, modality=on),
        "pursuit": wrong_apgd(steps=steps, modality=on, margin=False),
        "flip": flip_apgd(steps=steps, modality=on),
        "soft-ap": soft_ap_apgd(steps=steps, modality=on),
        "margin-pn": margin_pn_apgd(steps=steps, modality=on),
        "guided-targeted": guided_targeted_apgd(steps=steps, modality=on),
    }
    if threat.edits:
        del attacks["sharp"]
    attacks = {spec: _under(attack, threat) for spec, attack in attacks.items()}
    specs = [GradientAttack(spec, attacks[spec], effort.restarts) for spec in effort.names if spec in attacks]
    if effort.targeted:
        specs.append(GradientAttack("guided-targeted", attacks["guided-targeted"]))
    budgets = list(threat.balls.values())
    if effort.refined and len(budgets) == 1 and isinstance(budgets[0], Edits):
        exact = replace(attacks["guided"], search=ExactFlips(), threat=replace(threat, knowledge="W2"))
        specs += [GradientAttack("exact", exact), RefinedAttack("refined exact", exact)]
    elif effort.refined and len(budgets) == 1 and not threat.edits:
        polish = {spec: replace(attacks[spec], search=Polish(steps)) for spec in effort.refined}
        specs += [RefinedAttack(f"refined {spec}", attack) for spec, attack in polish.items()]
    suite = Suite(name, tuple(specs), effort.queries if queries is None else queries, effort.floor)
    return suite.with_attacks(extra_attacks)


def attacked_modality(threat: Threat) -> Modality:
    """The modality that a threat changes, as attacks name it.

    Raises:
        ValueError: a modality that no attack by gradients changes.
    """
    attacked = "both" if len(threat.balls) > 1 else next(iter(threat.balls))
    if attacked not in get_args(Modality):
        raise ValueError(f"a suite attacks {', '.join(get_args(Modality))}, not {attacked!r}")
    return attacked  # type: ignore[return-value]


def _under(attack: Attack, threat: Threat) -> Attack:
    """The attack under the threat with its own knowledge, by a search that the budget allows."""
    search: Search = attack.search
    if threat.edits:
        (budget,) = threat.balls.values()
        search = GreedyFlips() if isinstance(budget, Edits) else GreedySwaps()
    return replace(attack, search=search, threat=replace(threat, knowledge=attack.threat.knowledge))


# ------------------------------------------------------------------------------------------ the assessment

Checks = Callable[[EvaluationContext, AttackRuns, EvalResult], tuple[Flag, ...]]
"""Raises flags from all that an assessment found."""


def prepare_suite(
    context: EvaluationContext, suite: Suite, threat: Threat | None = None
) -> tuple[Suite, EvaluationContext, tuple[str, ...]]:
    """The suite under its threat, the context of its queries, and notes of what had to be left out.

    Raises:
        ValueError: no untargeted attack, or one that does not change what is queried.
    """
    if threat is not None:
        suite = suite.at(threat)
    suite, notes = for_distance(suite, context.victim.distance)
    for spec in suite.specs:
        if spec.threat.side != "query":
            raise ValueError(
                f"{spec.threat.name} changes the database, and a suite attacks queries; robusthash "
                "poison RUN measures it (perturb_database and insert_items in Python)"
            )
        if context.direction[0] not in spec.threat.balls:
            raise ValueError(
                f"the attack {spec.name!r} changes {sorted(spec.threat.balls)}, and the queries are "
                f"{context.direction[0]}s; choose another threat or direction"
            )
    untargeted = tuple(spec for spec in suite.specs if not spec.targeted)
    if not untargeted:
        raise ValueError(f"the suite {suite.name!r} has no untargeted attack, so no worst case")
    if suite.queries is not None:
        context = context.some(suite.queries)
    if len(untargeted) < len(suite.specs) and not bool(context.targets.any()):
        note = "no targeted attack: every label set of the database shares a label with every query"
        return replace(suite, specs=untargeted), context, (*notes, note)
    return suite, context, notes


def for_distance(suite: Suite, distance: Distance) -> tuple[Suite, tuple[str, ...]]:
    """The suite for a search by this distance, and a note that names the attacks which it leaves out.

    Float vectors have no bits: our attacks on codes become those on vectors, searches by oracle queries stay
    as they are, and all others are left out.
    """
    if distance == "hamming":
        return suite, ()
    specs: list[AttackSpec] = []
    for spec in suite.specs:
        if isinstance(spec, GradientAttack) and spec.view is None:
            with contextlib.suppress(ValueError):
                specs.append(replace(spec, attack=on_embeddings(spec.attack)))
        elif spec.kind in ("black-box", "noise"):
            specs.append(spec)
    names = {spec.name for spec in specs}
    left = [spec.name for spec in suite.specs if spec.name not in names]
    note = f"left out, since they work on bits and the search is by {distance} distance: {', '.join(left)}"
    return replace(suite, specs=tuple(specs)), (note,) if left else ()


def assess_prepared(
    context: EvaluationContext,
    suite: Suite,
    notes: tuple[str, ...] = (),
    *,
    store: BlockStore = NoStore(),
    progress: Progress = silent,
    checks: Checks | None = None,
) -> EvalResult:
    """``assess`` what ``prepare_suite`` returned; ``checks`` raises the flags of the result."""
    runs = run_attacks(context, suite.specs, store, progress)
    assert runs is not None  # one shard, the whole
    result = aggregate(context, runs, suite.floor)
    # adaptive attacks go with the defense, which is the model's: without them results of two models compare
    own = replace(suite, specs=suite.own)
    digests = {name: value for name, value in result.setting.digests.items() if name != "budget"}
    setting = replace(
        result.setting,
        attacks=tuple(spec.name for spec in own.specs),
        budget=f"suite {suite.name}, {len(own.specs)} lines",
        tier=suite.name,
        digests={**digests, "suite": own.digest()},
    )
    name = f"{setting.threat} {suite.name}"
    result = replace(result, name=name, setting=setting, notes=(*notes, *result.notes))
    return result if checks is None else replace(result, flags=checks(context, runs, result))
