"""Assessments of a victim: a tier by its name or a suite of one's own, whole or in shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from robusthash.attacks.threat_model import Threat
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockStore, NoStore, run_attacks
from robusthash.metrics.results import EvalResult
from robusthash.objectives.base import HashObjective
from robusthash.robustness.specs.transfer_attacks import Surrogate
from robusthash.robustness.suite import Suite, assess_prepared, prepare_suite
from robusthash.robustness.tiers import assess_tier, prepare_tier


def assess(
    context: EvaluationContext,
    suite: Suite | str = "standard",
    threat: Threat | None = None,
    *,
    objective: HashObjective | None = None,
    surrogates: Sequence[Surrogate] = (),
    queries: int | None = None,
    curve: bool = False,
    checked: bool = True,
    store: BlockStore = NoStore(),
    progress: Progress = silent,
) -> EvalResult:
    """The worst case of each query over the clean input and every attack and restart of a suite.

    A tier by name is all that ``robusthash assess --tier`` runs: its attacks, those that fit the victim
    (noise, searches by oracle queries, transfer from surrogates, adaptive attacks of its defense), and the
    checks.

    The result holds ``wMAP`` with its interval (and so for every AP of the protocol), ``wMAP/8bit`` and of
    bags of words ``wMAP/rounded``, ``HRS``, and where attacks are targeted ``t-MAP``, ``gain``, ``t-ASR``,
    ``TR`` and the ``collateral MAP``. ``attacks`` has of each attack its MAP, its unique wins, how far
    towards the searched floor it came, ASR, flips and cost; ``winner`` names the attack and restart of each
    query; ``reference`` has chance, least, floor and clean.

    A victim that declares itself ``randomised`` is scored by the mean AP over fresh draws of its noise, other
    draws than those by which the worst is chosen.

    Args:
        suite: a tier by name (``smoke``, ``fast``, ``standard``, ``full``, ``paper``), or a suite, which is
            run as it is and raises no flags.
        threat: of the attacker, instead of the one in the suite; ``img-linf-8`` for a tier by name.
        objective: of a tier, that the victim was trained with; ``paper`` needs it, and a defense that has
            adaptive attacks is attacked on it too.
        surrogates: of a tier, models for transfer attacks, from ``fast`` up (``make_surrogate``).
        queries: instead of the suite's; chosen by content.
        curve: of a tier, the worst case at seven budgets too.
        checked: of the tiers from ``fast`` up, raise the flags.
        store: of attacked blocks; the same call then goes on where it was stopped.

    Raises:
        ValueError: no context or no threat; an option of tiers with a suite of one's own; and see
            ``tiers.prepare_tier``.

    Example:
        >>> import robusthash as rh
        >>> data = rh.load_data("synthetic")
        >>> context = rh.make_context(rh.build_hasher(bits=16), data)
        >>> result = rh.assess(context, "smoke")
        >>> result["wMAP"] <= result.reference["clean"]
        True
    """
    _check(context, threat)
    if isinstance(suite, str):
        prepared = prepare_tier(
            context, suite, threat, objective=objective, surrogates=surrogates, queries=queries
        )
        return assess_tier(prepared, curve=curve, checked=checked, store=store, progress=progress)
    if curve:
        raise ValueError(
            f"the curve goes with a tier; of the suite {suite.name!r} take eps_curve(context, specs, threat)"
        )
    own, context, notes = prepare_suite(context, _on(suite, objective, surrogates, queries), threat)
    return assess_prepared(context, own, notes, store=store, progress=progress)


def run_shard(
    context: EvaluationContext,
    suite: Suite | str,
    shard: tuple[int, int],
    threat: Threat | None = None,
    *,
    objective: HashObjective | None = None,
    surrogates: Sequence[Surrogate] = (),
    queries: int | None = None,
    store: BlockStore,
    progress: Progress = silent,
) -> None:
    """Run only the blocks of shard (i, n) of ``assess``; ``assess`` with the same store joins them all."""
    _check(context, threat)
    if isinstance(suite, str):
        prepared = prepare_tier(
            context, suite, threat, objective=objective, surrogates=surrogates, queries=queries
        )
        suite, context = prepared.suite, prepared.context
    else:
        suite, context, _ = prepare_suite(context, _on(suite, objective, surrogates, queries), threat)
    run_attacks(context, suite.specs, store, progress, shard)


def _check(context: Any, threat: Any) -> None:
    """Refuse what is easily taken for a context or a threat, with the call that makes one."""
    if not isinstance(context, EvaluationContext):
        got = type(context).__name__
        raise ValueError(f"an assessment takes make_context(victim, data), got a {got}")
    if not isinstance(threat, Threat | None):
        raise ValueError(
            "threat= takes one that robusthash.attacks.image_threat(8 / 255) or named_threat('img-linf-8') "
            f"makes, got {threat!r}"
        )


def _on(
    suite: Suite, objective: HashObjective | None, surrogates: Sequence[Surrogate], queries: int | None
) -> Suite:
    """The suite on this number of queries; options that only a tier can use are refused."""
    if objective is not None or surrogates:
        raise ValueError(
            f"the suite {suite.name!r} holds all its attacks: objective= and surrogates= go with a tier by "
            "name; add attacks by Suite.with_attacks"
        )
    return suite if queries is None else replace(suite, queries=queries)
