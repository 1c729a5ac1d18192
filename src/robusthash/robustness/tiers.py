"""Tiers for a given victim: the attacks of the tier and those that fit the victim, the curve and the
flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Budget, Threat, threat_on
from robusthash.data.splits import stable_subset
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack
from robusthash.evaluation.context import EvaluationContext, Progress, silent
from robusthash.evaluation.evaluate import as_codes, measure_codes
from robusthash.evaluation.runner import Attacker, AttackRuns, BlockStore, NoStore
from robusthash.metrics.results import EvalResult, Flag
from robusthash.objectives.base import HashObjective
from robusthash.robustness.checks.base import order
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.robustness.checks.suite_checks import suite_checks
from robusthash.robustness.eps_curve import Curve, eps_curve
from robusthash.robustness.specs.adaptive_attacks import adaptive_attacks
from robusthash.robustness.specs.oracle_attacks import (
    Surrogate,
    noise_attacks,
    oracle_attacks,
    transfer_attacks,
)
from robusthash.robustness.specs.published_suite import PAPER, paper_suite, with_legacy
from robusthash.robustness.suite import TIERS, Suite, assess_prepared, prepare_suite, tier
from robusthash.robustness.victim_behaviour import Observed, observed

OBSERVED = 16  # queries by whose passes a victim's behaviour is told
CHECKED = 128  # queries of the checks that attack on their own
CHECKED_TIERS = ("fast", "standard", "full")  # smoke is too short to judge, and paper is no evidence
SURROGATES = 3  # of a claim; they should differ in backbone, loss and length of code
CURVE_ATTACKS = ("guided", "soft-ap")
ORACLE_QUERIES = {"standard": 1000, "full": 5000}
CLAIMS = ("standard", "full")  # tiers whose numbers may be claimed


def observe(context: EvaluationContext, threat: Threat) -> Observed:
    """How the victim behaves on a few clean queries."""
    positions = torch.arange(min(OBSERVED, len(context.queries)))
    batch = context.queries.batch(positions).only(threat.balls).to(context.victim.device)
    return observed(context.victim, batch.inputs)


def extra_attacks(
    context: EvaluationContext,
    objective: HashObjective | None,
    threat: Threat,
    name: str,
    surrogates: Sequence[Surrogate] = (),
    seen: Observed | None = None,
) -> tuple[AttackSpec, ...]:
    """Lines on top of the gradient lines that every victim is given.

    Nothing in ``smoke`` and ``paper``. Noise and transfer from ``fast`` up; the adaptive lines of the defense
    and searches by 1,000 questions in ``standard``, by 5,000 in ``full``. Threats on image and text together,
    and token swaps, have no searches by questions; token swaps have no noise either.
    """
    if name not in TIERS or name == "smoke":
        return ()
    steps, specs = TIERS[name].steps, list[AttackSpec]()
    if name in CLAIMS:
        specs += adaptive_attacks(
            context.victim, objective, replace(threat, knowledge="W2"), steps, seen=seen
        )
    if surrogates:
        specs += transfer_attacks(context, surrogates, threat)
    if len(threat.balls) == 1:
        specs += noise_attacks(threat)
        if name in CLAIMS:
            specs += oracle_attacks(threat, ORACLE_QUERIES[name])
    return tuple(specs)


@dataclass(frozen=True)
class PreparedTier:
    """A tier for one victim: all its attacks, the bench of its queries, and what has to be said of it.

    Args:
        observed: how the victim behaves on a few clean queries.
        notes: what was left out.
    """

    name: str
    suite: Suite
    context: EvaluationContext
    threat: Threat
    observed: Observed
    notes: tuple[str, ...] = ()


def prepare_tier(
    context: EvaluationContext,
    name: str,
    threat: Threat | None = None,
    *,
    objective: HashObjective | None = None,
    surrogates: Sequence[Surrogate] = (),
    queries: int | None = None,
    steps: int | None = None,
) -> PreparedTier:
    """What a tier contains for the victim of a bench. Python and the command line both ask here.

    Args:
        name: ``smoke``, ``fast``, ``standard``, ``full``, or ``paper``: the attacks as published.
        threat: ``img-linf-8`` by default.
        objective: that the victim was trained with. ``paper`` needs it, and a defense that has adaptive
            attacks is attacked on it too.
        surrogates: for transfer attacks, from ``fast`` up.
        queries: instead of the tier's, chosen by content.
        steps: of the tier ``paper``, the most that an attack takes; the papers' own counts by default.

    Raises:
        KeyError: no such tier.
        ValueError: ``steps`` of another tier, ``paper`` without the objective, an attack that does not change
            what is queried, or a tier of which nothing is left because no gradient reaches the input.
    """
    threat = threat or threat_on(knowledge="W2")
    if name == PAPER:
        context = replace(context, protocol=with_legacy(context.protocol))
    suite, context, notes = prepare_suite(context, _suite(name, threat, objective, queries, steps))
    seen = observe(context, threat)
    if seen.cut:
        suite = without_gradient(suite)
        notes = (*notes, "no gradient reaches the input: no line that follows it was run")
    if name in CLAIMS and 0 < len(surrogates) < SURROGATES:
        notes = (*notes, f"{len(surrogates)} of the {SURROGATES} surrogates that a claim is made with")
    suite = suite.beside(extra_attacks(context, objective, threat, name, surrogates, seen))
    if all(spec.targeted for spec in suite.specs):
        raise ValueError(
            f"no gradient reaches the input of this victim, and the tier {name!r} has no other lines under "
            f"{threat.name}; use 'standard', which asks questions too"
        )
    return PreparedTier(name, suite, context, threat, seen, notes)


def _suite(
    name: str, threat: Threat, objective: HashObjective | None, queries: int | None, steps: int | None
) -> Suite:
    if name != PAPER:
        if steps is not None:
            raise ValueError(f"--steps shortens the attacks of the tier 'paper'; those of {name!r} are fixed")
        return tier(name, threat, queries=queries)
    if objective is None:
        raise ValueError("the tier 'paper' attacks the training objective too; give it as objective=")
    suite = paper_suite(objective, threat, steps=steps)
    return suite if queries is None else replace(suite, queries=queries)


def assess_tier(
    prepared: PreparedTier,
    *,
    curve: bool = False,
    checked: bool = True,
    store: BlockStore | None = None,
    progress: Progress = silent,
) -> EvalResult:
    """Run a prepared tier; see ``assess``.

    Raises:
        ValueError: a curve of a tier that does not have the lines it is made of.
    """
    suite, context, by_eps = prepared.suite, prepared.context, None
    if curve:
        chosen = curve_attacks(prepared)
        aside = None if store is None else store.within("curve")
        by_eps = eps_curve(context, chosen, prepared.threat, store=aside, progress=progress)
    checks = None
    if checked and prepared.name in CHECKED_TIERS:
        aside = None if store is None else store.within("checked")
        checks = TierChecks(suite, prepared.threat, by_eps, prepared.observed.cut, aside, progress)
    result = assess_prepared(context, suite, prepared.notes, store=store, progress=progress, checks=checks)
    return result if by_eps is None else by_eps.onto(result)


def curve_attacks(prepared: PreparedTier) -> tuple[AttackSpec, ...]:
    """The lines of a tier that its curve over budgets is made of.

    Raises:
        ValueError: it has none.
    """
    found = tuple(spec for spec in prepared.suite.specs if spec.name in CURVE_ATTACKS)
    if not found:
        raise ValueError(
            f"--eps-curve (curve=True) runs the lines {' and '.join(CURVE_ATTACKS)}, which {prepared.name!r} does not "
            "have for this victim"
        )
    return found


def without_gradient(suite: Suite) -> Suite:
    """The suite without the lines that follow a gradient of the victim itself, where none reaches the
    input."""
    return replace(suite, specs=tuple(spec for spec in suite.specs if not _follows(spec)))


def _follows(spec: AttackSpec) -> bool:
    if not isinstance(spec, GradientAttack) or spec.kind not in ("white-box", "refined"):
        return False
    return spec.attack.search.by_gradient


@dataclass(frozen=True)
class TierChecks:
    """Raises the flags of an assessment: the checks of the model, and those that compare the lines of the
    suite.

    Args:
        curve: the worst case by budget, where it was run.
        cut: no gradient reaches the input, so white-box lines were left out.
        keep: of the attacks that checks run themselves, so that they too go on where they were stopped.
    """

    suite: Suite
    threat: Threat
    curve: Curve | None = None
    cut: bool = False
    store: BlockStore | None = None
    progress: Progress = silent

    def __call__(
        self, context: EvaluationContext, attack_runs: AttackRuns, result: EvalResult
    ) -> tuple[Flag, ...]:
        model = model_checks(context, self.threat, queries=CHECKED)
        headline = context.protocol.headline
        untargeted = [spec for spec in attack_runs.specs if not spec.targeted]
        ap = {spec.name: result.per_query[f"{headline} under {spec.name}"][None] for spec in untargeted}
        more = self._more(context, untargeted, ap) if self.suite.name in CLAIMS else {}
        compared = suite_checks(
            ap,
            {spec.name: spec.kind for spec in untargeted},
            result.per_query["clean"],
            {spec.name: attack_runs.signs(spec.name)[:, :, 0] for spec in untargeted},
            result.reference["chance"],
            result.per_query.get("floor"),
            None if self.curve is None else dict(zip(self.curve.eps, self.curve.worst, strict=True)),
            more.get("unbounded"),
            more.get("doubled steps"),
            more.get("doubled restarts"),
            part=more.get("part"),
            cut=self.cut,
        )
        return order([*model, *compared])

    def _more(
        self, context: EvaluationContext, specs: Sequence[AttackSpec], ap: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The strongest white-box line on a part of the queries at eps = 1, and with twice its steps or
        restarts.

        An adaptive one takes its place where there is none: those that average over looks cost thirty times
            as much.
        """
        gradient = [spec for spec in specs if isinstance(spec, GradientAttack) and spec.kind != "refined"]
        able = [spec for spec in gradient if spec.kind == "white-box"] or gradient
        if not able or self.threat.edits:
            return {}
        best = min(able, key=lambda spec: float(ap[spec.name].mean()))
        part, few = stable_subset(context.queries, CHECKED), context.some(CHECKED)
        search: Any = best.attack.search
        longer = replace(best, attack=replace(best.attack, search=replace(search, steps=2 * search.steps)))
        once, further = range(best.restarts), range(best.restarts, 2 * best.restarts)
        first = ap[best.name].amin(0)[part]
        anywhere = self._lowest(few, best.at(_everything(self.threat, few)), once)
        return {
            "part": part,
            "unbounded": torch.minimum(first, anywhere),  # what lies in the small ball lies in the large one
            "doubled steps": self._lowest(few, longer, once),
            "doubled restarts": torch.minimum(first, self._lowest(few, best, further)),
        }

    def _lowest(self, context: EvaluationContext, spec: AttackSpec, restarts: range) -> Tensor:
        """(Q,) lowest AP over some restarts of a line."""
        attacker, headline, found = Attacker(context, self.store or NoStore()), context.protocol.headline, []
        for done, restart in enumerate(restarts):
            signs = [attacker.block(spec, restart, block).signs[:, 0] for block in range(context.blocks)]
            found.append(
                measure_codes(context, as_codes(torch.cat(signs)), context.query_labels).per_query[headline]
            )
            self.progress(done + 1, len(restarts), f"{spec.name} again")
        return torch.stack(found).amin(0)


def _everything(threat: Threat, context: EvaluationContext) -> Threat:
    """The threat with a budget from which every input of the range can be reached."""
    inputs = context.batch(0, threat.balls).inputs
    balls: dict[str, Budget] = {}
    for name, ball in threat.balls.items():
        width = ball.bounds[1] - ball.bounds[0]
        size = width * inputs[name][0].numel() ** {"linf": 0.0, "l2": 0.5}.get(ball.norm, 1.0)
        balls[name] = ball.with_eps(size)
    return Threat(balls, threat.knowledge)
