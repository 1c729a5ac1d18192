"""Tiers for a given victim: the attacks of the tier and those that fit the victim, the curve and the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.threat import Budget, Threat, threat_on
from robusthash.data.splits import stable_subset
from robusthash.evaluation.adaptive import adaptive_lines
from robusthash.evaluation.attempts import Attacker, Attempts, Forget, Keep
from robusthash.evaluation.bench import Bench, Progress, silent
from robusthash.evaluation.blackbox import Surrogate, noise_lines, question_lines, transfer_lines
from robusthash.evaluation.checks import model_checks
from robusthash.evaluation.checks_base import order
from robusthash.evaluation.checks_suite import suite_checks
from robusthash.evaluation.curve import Curve, eps_curve
from robusthash.evaluation.evaluate import as_codes, measure_codes
from robusthash.evaluation.lines import Gradient, Line
from robusthash.evaluation.observed import Observed, observed
from robusthash.evaluation.presets import PAPER, paper_suite, with_legacy
from robusthash.evaluation.results import EvalResult, Flag
from robusthash.evaluation.suite import TIERS, Suite, assess_prepared, prepare_suite, tier
from robusthash.objectives.base import HashObjective

OBSERVED = 16  # queries by whose passes a victim's behaviour is told
CHECKED = 128  # queries of the checks that attack on their own
CHECKED_TIERS = ("fast", "standard", "full")  # smoke is too short to judge, and paper is no evidence
SURROGATES = 3  # of a claim; they should differ in backbone, loss and length of code
CURVE_LINES = ("guided", "soft-ap")
ORACLE_QUERIES = {"standard": 1000, "full": 5000}
CLAIMS = ("standard", "full")  # tiers whose numbers may be claimed


def observe(bench: Bench, threat: Threat) -> Observed:
    """How the victim behaves on a few clean queries."""
    positions = torch.arange(min(OBSERVED, len(bench.queries)))
    batch = bench.queries.batch(positions).only(threat.balls).to(bench.victim.device)
    return observed(bench.victim, batch.inputs)


def extra_lines(
    bench: Bench,
    objective: HashObjective | None,
    threat: Threat,
    name: str,
    surrogates: Sequence[Surrogate] = (),
    seen: Observed | None = None,
) -> tuple[Line, ...]:
    """Lines on top of the gradient lines that every victim is given.

    Nothing in ``smoke`` and ``paper``. Noise and transfer from ``fast`` up; the adaptive lines of the defense and
    searches by 1,000 questions in ``standard``, by 5,000 in ``full``. Threats on image and text together, and token
    swaps, have no searches by questions; token swaps have no noise either.
    """
    if name not in TIERS or name == "smoke":
        return ()
    steps, lines = TIERS[name].steps, list[Line]()
    if name in CLAIMS:
        lines += adaptive_lines(bench.victim, objective, replace(threat, knowledge="W2"), steps, seen=seen)
    if surrogates:
        lines += transfer_lines(bench, surrogates, threat)
    if len(threat.balls) == 1:
        lines += noise_lines(threat)
        if name in CLAIMS:
            lines += question_lines(threat, ORACLE_QUERIES[name])
    return tuple(lines)


@dataclass(frozen=True)
class PreparedTier:
    """A tier for one victim: all its attacks, the bench of its queries, and what has to be said of it.

    Args:
        observed: how the victim behaves on a few clean queries.
        notes: what was left out.
    """

    name: str
    suite: Suite
    bench: Bench
    threat: Threat
    observed: Observed
    notes: tuple[str, ...] = ()


def prepare_tier(
    bench: Bench,
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
        objective: that the victim was trained with. ``paper`` needs it, and a defense that has adaptive attacks is
            attacked on it too.
        surrogates: for transfer attacks, from ``fast`` up.
        queries: instead of the tier's, chosen by content.
        steps: of the tier ``paper``, the most that an attack takes; the papers' own counts by default.

    Raises:
        KeyError: no such tier.
        ValueError: ``steps`` of another tier, ``paper`` without the objective, an attack that does not change what is
            queried, or a tier of which nothing is left because no gradient reaches the input.
    """
    threat = threat or threat_on(knowledge="W2")
    if name == PAPER:
        bench = replace(bench, protocol=with_legacy(bench.protocol))
    suite, bench, notes = prepare_suite(bench, _suite(name, threat, objective, queries, steps))
    seen = observe(bench, threat)
    if seen.cut:
        suite = without_gradient(suite)
        notes = (*notes, "no gradient reaches the input: no line that follows it was run")
    if name in CLAIMS and 0 < len(surrogates) < SURROGATES:
        notes = (*notes, f"{len(surrogates)} of the {SURROGATES} surrogates that a claim is made with")
    suite = suite.beside(extra_lines(bench, objective, threat, name, surrogates, seen))
    if all(line.targeted for line in suite.lines):
        raise ValueError(
            f"no gradient reaches the input of this victim, and the tier {name!r} has no other lines under "
            f"{threat.name}; use 'standard', which asks questions too"
        )
    return PreparedTier(name, suite, bench, threat, seen, notes)


def _suite(name: str, threat: Threat, objective: HashObjective | None, queries: int | None, steps: int | None) -> Suite:
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
    keep: Keep | None = None,
    progress: Progress = silent,
) -> EvalResult:
    """Run a prepared tier; see ``assess``.

    Raises:
        ValueError: a curve of a tier that does not have the lines it is made of.
    """
    suite, bench, by_eps = prepared.suite, prepared.bench, None
    if curve:
        chosen = curve_lines(prepared)
        aside = None if keep is None else keep.within("curve")
        by_eps = eps_curve(bench, chosen, prepared.threat, keep=aside, progress=progress)
    checks = None
    if checked and prepared.name in CHECKED_TIERS:
        aside = None if keep is None else keep.within("checked")
        checks = TierChecks(suite, prepared.threat, by_eps, prepared.observed.cut, aside, progress)
    result = assess_prepared(bench, suite, prepared.notes, keep=keep, progress=progress, checks=checks)
    return result if by_eps is None else by_eps.onto(result)


def curve_lines(prepared: PreparedTier) -> tuple[Line, ...]:
    """The lines of a tier that its curve over budgets is made of.

    Raises:
        ValueError: it has none.
    """
    found = tuple(line for line in prepared.suite.lines if line.name in CURVE_LINES)
    if not found:
        raise ValueError(
            f"--eps-curve (curve=True) runs the lines {' and '.join(CURVE_LINES)}, which {prepared.name!r} does not "
            "have for this victim"
        )
    return found


def without_gradient(suite: Suite) -> Suite:
    """The suite without the lines that follow a gradient of the victim itself, where none reaches the input."""
    return replace(suite, lines=tuple(line for line in suite.lines if not _follows(line)))


def _follows(line: Line) -> bool:
    if not isinstance(line, Gradient) or line.kind not in ("white-box", "refined"):
        return False
    return bool(getattr(line.attack.search, "by_gradient", True))


@dataclass(frozen=True)
class TierChecks:
    """Raises the flags of an assessment: the checks of the model, and those that compare the lines of the suite.

    Args:
        curve: the worst case by budget, where it was run.
        cut: no gradient reaches the input, so white-box lines were left out.
        keep: of the attacks that checks run themselves, so that they too go on where they were stopped.
    """

    suite: Suite
    threat: Threat
    curve: Curve | None = None
    cut: bool = False
    keep: Keep | None = None
    progress: Progress = silent

    def __call__(self, bench: Bench, attempts: Attempts, result: EvalResult) -> tuple[Flag, ...]:
        model = model_checks(bench, self.threat, queries=CHECKED)
        headline = bench.protocol.headline
        untargeted = [line for line in attempts.lines if not line.targeted]
        ap = {line.name: result.per_query[f"{headline} under {line.name}"][None] for line in untargeted}
        more = self._more(bench, untargeted, ap) if self.suite.name in CLAIMS else {}
        compared = suite_checks(
            ap,
            {line.name: line.kind for line in untargeted},
            result.per_query["clean"],
            {line.name: attempts.signs(line.name)[:, :, 0] for line in untargeted},
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

    def _more(self, bench: Bench, lines: Sequence[Line], ap: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The strongest white-box line on a part of the queries at eps = 1, and with twice its steps or restarts.

        An adaptive one takes its place where there is none: those that average over looks cost thirty times as much.
        """
        gradient = [line for line in lines if isinstance(line, Gradient) and line.kind != "refined"]
        able = [line for line in gradient if line.kind == "white-box"] or gradient
        if not able or self.threat.edits:
            return {}
        best = min(able, key=lambda line: float(ap[line.name].mean()))
        part, few = stable_subset(bench.queries, CHECKED), bench.some(CHECKED)
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

    def _lowest(self, bench: Bench, line: Line, restarts: range) -> Tensor:
        """(Q,) lowest AP over some restarts of a line."""
        attacker, headline, found = Attacker(bench, self.keep or Forget()), bench.protocol.headline, []
        for done, restart in enumerate(restarts):
            signs = [attacker.block(line, restart, block).signs[:, 0] for block in range(bench.blocks)]
            found.append(measure_codes(bench, as_codes(torch.cat(signs)), bench.query_labels).per_query[headline])
            self.progress(done + 1, len(restarts), f"{line.name} again")
        return torch.stack(found).amin(0)


def _everything(threat: Threat, bench: Bench) -> Threat:
    """The threat with a budget from which every input of the range can be reached."""
    inputs = bench.batch(0, threat.balls).inputs
    balls: dict[str, Budget] = {}
    for name, ball in threat.balls.items():
        width = ball.bounds[1] - ball.bounds[0]
        size = width * inputs[name][0].numel() ** {"linf": 0.0, "l2": 0.5}.get(ball.norm, 1.0)
        balls[name] = replace(ball, eps=size)
    return Threat(balls, threat.knowledge)
