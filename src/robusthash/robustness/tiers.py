"""Tiers for a given victim: the attacks of the tier and those that fit the victim, the curve, the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Budget, Threat, threat_on
from robusthash.core.runtime import Progress, silent
from robusthash.data.splits import stable_subset
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack
from robusthash.evaluation.code_measures import measure_codes
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import AttackRuns, BlockRunner, BlockStore, NoStore
from robusthash.metrics.results import EvalResult, Flag
from robusthash.objectives.base import HashObjective
from robusthash.robustness.checks.base import order
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.robustness.checks.suite_checks import MoreEffort, suite_checks
from robusthash.robustness.eps_curve import Curve, eps_curve
from robusthash.robustness.specs.adaptive_attacks import adaptive_attacks
from robusthash.robustness.specs.oracle_attacks import noise_attacks, oracle_attacks
from robusthash.robustness.specs.published_suite import PAPER, paper_suite, with_legacy
from robusthash.robustness.specs.transfer_attacks import Surrogate, transfer_attacks
from robusthash.robustness.suite import TIERS, Suite, assess_prepared, for_distance, prepare_suite, tier
from robusthash.robustness.victim_behaviour import VictimBehaviour, observed

OBSERVED = 16  # queries on which a victim's behaviour is observed
CHECKED = 128  # queries of the checks that attack on their own
CHECKED_TIERS = ("fast", "standard", "full")  # smoke is too short to judge, and paper is no evidence
SURROGATES = 3  # of a claim; they should differ in backbone, loss and length of code
CURVE_ATTACKS = ("guided", "soft-ap")
ORACLE_QUERIES = {"standard": 1000, "full": 5000}
CLAIMS = ("standard", "full")  # tiers whose numbers may be claimed


@dataclass(frozen=True)
class PreparedTier:
    """A tier for one victim: all its attacks, the context of its queries, and notes of what was left out."""

    name: str
    suite: Suite
    context: EvaluationContext
    threat: Threat
    observed: VictimBehaviour  # behaviour of the victim on a few clean queries
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
    attacks: Sequence[AttackSpec] = (),
) -> PreparedTier:
    """The tier of a victim. Python and the command line both prepare it here.

    Args:
        name: ``smoke``, ``fast``, ``standard``, ``full``, or ``paper``: the attacks as published.
        threat: ``img-linf-8`` by default.
        objective: that the victim was trained with. ``paper`` needs it, and a defense that has adaptive
            attacks is attacked on it too.
        surrogates: for transfer attacks, from ``fast`` up.
        queries: instead of the tier's, chosen by content.
        steps: of the tier ``paper``, the most that an attack takes; the papers' own counts by default.
        attacks: of one's own, besides those of the tier.

    Raises:
        KeyError: no such tier.
        ValueError: ``steps`` of another tier, ``paper`` without the objective, an attack that does not change
            what is queried, or a tier of which nothing is left because no gradient reaches the input.
    """
    threat = threat or threat_on(knowledge="W2")
    if name == PAPER:
        context = replace(context, protocol=with_legacy(context.protocol))
    both = {"image", "text"} <= {*context.victim.modalities} & {*context.data.modalities}
    whole = _suite(name, threat, objective, queries, steps, both).with_attacks(attacks)
    suite, context, notes = prepare_suite(context, whole)
    behaviour = observe(context, threat)
    if behaviour.cut:
        suite = without_gradient(suite)
        notes = (*notes, "no gradient reaches the input: no attack that follows it was run")
    if name in CLAIMS and 0 < len(surrogates) < SURROGATES:
        notes = (*notes, f"{len(surrogates)} of the {SURROGATES} surrogates that a claim is made with")
    extra = extra_attacks(context, objective, threat, name, surrogates, behaviour)
    suite, left = for_distance(suite.with_attacks(extra), context.victim.distance)
    notes = (*notes, *left)
    if all(spec.targeted for spec in suite.specs):
        raise ValueError(
            f"no gradient reaches the input of this victim, and the tier {name!r} has no other attacks under "
            f"{threat.name}; use 'standard', which has oracle queries too"
        )
    return PreparedTier(name, suite, context, threat, behaviour, notes)


def _suite(
    name: str,
    threat: Threat,
    objective: HashObjective | None,
    queries: int | None,
    steps: int | None,
    pairs: bool,
) -> Suite:
    if name != PAPER:
        if steps is not None:
            raise ValueError(f"--steps shortens the attacks of the tier 'paper'; those of {name!r} are fixed")
        return tier(name, threat, queries=queries)
    if objective is None:
        raise ValueError("the tier 'paper' attacks the training objective too; give it as objective=")
    suite = paper_suite(objective, threat, steps=steps, pairs=pairs)
    return suite if queries is None else replace(suite, queries=queries)


def observe(context: EvaluationContext, threat: Threat) -> VictimBehaviour:
    """The victim's behaviour on a few clean queries."""
    positions = torch.arange(min(OBSERVED, len(context.queries)))
    batch = context.queries.batch(positions).only(threat.balls).to(context.victim.device)
    return observed(context.victim, batch.inputs)


def without_gradient(suite: Suite) -> Suite:
    """The suite without the attacks that follow a gradient of the victim itself."""

    def follows(spec: AttackSpec) -> bool:
        if not isinstance(spec, GradientAttack) or spec.kind not in ("white-box", "refined"):
            return False
        return spec.attack.search.by_gradient

    return replace(suite, specs=tuple(spec for spec in suite.specs if not follows(spec)))


def extra_attacks(
    context: EvaluationContext,
    objective: HashObjective | None,
    threat: Threat,
    name: str,
    surrogates: Sequence[Surrogate] = (),
    behaviour: VictimBehaviour | None = None,
) -> tuple[AttackSpec, ...]:
    """Attacks on top of the gradient attacks that every victim is given.

    None in ``smoke`` and ``paper``. Noise and transfer from ``fast`` up; the adaptive attacks of the defense
    and searches by 1,000 oracle queries in ``standard``, by 5,000 in ``full``. Threats on image and text
    together, and token swaps, have no searches by oracle queries; token swaps have no noise either.
    """
    if name not in TIERS or name == "smoke":
        return ()
    specs: list[AttackSpec] = []
    if name in CLAIMS:
        known = replace(threat, knowledge="W2")
        specs += adaptive_attacks(context.victim, objective, known, TIERS[name].steps, behaviour=behaviour)
    if surrogates:
        specs += transfer_attacks(context, surrogates, threat)
    if len(threat.balls) == 1:
        specs += noise_attacks(threat)
        if name in CLAIMS:
            specs += oracle_attacks(threat, ORACLE_QUERIES[name])
    return tuple(specs)


def assess_tier(
    prepared: PreparedTier,
    *,
    curve: bool = False,
    checked: bool = True,
    store: BlockStore = NoStore(),
    progress: Progress = silent,
) -> EvalResult:
    """Run a prepared tier; see ``assess``."""
    suite, context, by_eps, checks = prepared.suite, prepared.context, None, None
    if curve:
        specs = curve_attacks(prepared)
        by_eps = eps_curve(context, specs, prepared.threat, store=store.within("curve"), progress=progress)
    if checked and prepared.name in CHECKED_TIERS:
        cut, own_store = prepared.observed.cut, store.within("checked")
        checks = TierChecks(suite, prepared.threat, by_eps, cut, own_store, progress)
    result = assess_prepared(context, suite, prepared.notes, store=store, progress=progress, checks=checks)
    return result if by_eps is None else by_eps.onto(result)


def curve_attacks(prepared: PreparedTier) -> tuple[AttackSpec, ...]:
    """The attacks of a tier that its curve over budgets runs; a ValueError where it has none."""
    specs = tuple(spec for spec in prepared.suite.specs if spec.name in CURVE_ATTACKS)
    if not specs:
        raise ValueError(
            f"--eps-curve (curve=True) runs the attacks {' and '.join(CURVE_ATTACKS)}, which "
            f"{prepared.name!r} does not have for this victim"
        )
    return specs


@dataclass(frozen=True)
class TierChecks:
    """Raises the flags of an assessment: the checks of the model, and those that compare the attacks.

    Args:
        curve: the worst case by budget, where it was run.
        cut: no gradient reaches the input, so white-box attacks were left out.
        store: of the attacks that checks run themselves, so that they too go on where they were stopped.
    """

    suite: Suite
    threat: Threat
    curve: Curve | None = None
    cut: bool = False
    store: BlockStore = field(default_factory=NoStore)
    progress: Progress = silent

    def __call__(self, context: EvaluationContext, runs: AttackRuns, result: EvalResult) -> tuple[Flag, ...]:
        model = model_checks(context, self.threat, queries=CHECKED)
        untargeted = [spec for spec in runs.specs if not spec.targeted]
        key = result.setting.key
        ap = {spec.name: result.per_query[key.name(attack=spec.name)][None] for spec in untargeted}
        more = self._longer_attacks(context, untargeted, ap) if self.suite.name in CLAIMS else MoreEffort()
        compared = suite_checks(
            ap,
            {spec.name: spec.kind for spec in untargeted},
            result.per_query["clean"],
            {spec.name: runs.signs(spec.name)[:, :, 0] for spec in untargeted},
            result.reference["chance"],
            floor=result.per_query.get("floor"),
            curve=None if self.curve is None else dict(zip(self.curve.eps, self.curve.worst, strict=True)),
            more=more,
            cut=self.cut,
        )
        return order([*model, *compared])

    def _longer_attacks(
        self, context: EvaluationContext, specs: Sequence[AttackSpec], ap: Mapping[str, Tensor]
    ) -> MoreEffort:
        """AP of a part under the strongest white-box attack at eps = 1, and with twice its steps or restarts.

        An adaptive one takes its place where there is none: those that average over noise cost thirty times
        as much.
        """
        gradient = [spec for spec in specs if isinstance(spec, GradientAttack) and spec.kind != "refined"]
        able = [spec for spec in gradient if spec.kind == "white-box"] or gradient
        if not able or self.threat.edits:
            return MoreEffort()
        best = min(able, key=lambda spec: float(ap[spec.name].mean()))
        search: Any = best.attack.search
        longer = replace(best, attack=replace(best.attack, search=replace(search, steps=2 * search.steps)))
        once, further = range(best.restarts), range(best.restarts, 2 * best.restarts)
        part, few = stable_subset(context.queries, CHECKED), context.some(CHECKED)
        first = ap[best.name].amin(0)[part]
        anywhere = self._lowest(few, best.at(_everything(self.threat, few)), once)
        return MoreEffort(
            part=part,
            unbounded=torch.minimum(first, anywhere),  # the small ball lies in the large one
            doubled_steps=self._lowest(few, longer, once),
            doubled_restarts=torch.minimum(first, self._lowest(few, best, further)),
        )

    def _lowest(self, context: EvaluationContext, spec: AttackSpec, restarts: range) -> Tensor:
        """(Q,) lowest AP over some restarts of an attack."""
        runner, columns = BlockRunner(context, self.store), []
        for done, restart in enumerate(restarts):
            codes = context.query.of(runner.queries(spec, restart).signs[:, 0])
            measured = measure_codes(context, codes, context.query_labels)
            columns.append(measured.per_query[context.protocol.headline])
            self.progress(done + 1, len(restarts), f"{spec.name} again")
        return torch.stack(columns).amin(0)


def _everything(threat: Threat, context: EvaluationContext) -> Threat:
    """The threat with a budget by which every input of the range can be reached."""
    inputs = context.batch(0, threat.balls).inputs
    balls: dict[str, Budget] = {}
    for name, ball in threat.balls.items():
        width = ball.bounds[1] - ball.bounds[0]
        size = width * inputs[name][0].numel() ** {"linf": 0.0, "l2": 0.5}.get(ball.norm, 1.0)
        balls[name] = ball.with_eps(size)
    return Threat(balls, threat.knowledge)
