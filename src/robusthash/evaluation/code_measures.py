"""Measures of any codes, or float vectors, in place of the queries of a context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.embeddings import Embeddings, Searched
from robusthash.core.hamming import pack
from robusthash.core.types import Codes
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.context import NOISE_SAMPLES, EvaluationContext
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.embedding_measures import measure_embeddings
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.protocol import Measured, measure
from robusthash.metrics.results import EvalResult


def ap_names(names: Iterable[str]) -> list[str]:
    """Select the measure names of an AP that has a worst case: not the optimistic and pessimistic ones."""
    keys = [MeasureKey.parse(name) for name in names]
    return [str(k) for k in keys if k.is_ap and not k.role and k.ties not in ("optimistic", "pessimistic")]


def ap_alone(context: EvaluationContext) -> EvaluationContext:
    """The context under a protocol of these AP alone, for scores that are computed many times."""
    measures = tuple(ap_names(context.protocol.measures))
    return replace(context, protocol=replace(context.protocol, measures=measures))


def measure_codes(context: EvaluationContext, query: Searched, labels: Tensor) -> Measured:
    """Measure any codes, or float vectors, in place of the queries, under the protocol of the context."""
    protocol, database, database_labels = context.protocol, context.database, context.database_labels
    if isinstance(query, Embeddings) and isinstance(database, Embeddings):
        return measure_embeddings(protocol, query, labels, database, database_labels)
    if isinstance(query, Embeddings):
        raise ValueError("float vectors cannot search a database of codes")
    profile = prepared_profile(query, labels, context.prepared)
    return measure(protocol, query, labels, context.codes, database_labels, profile=profile)


def as_codes(signs: Tensor) -> Codes:
    """(Q, K) signs -> packed codes with positions as ids."""
    return Codes(pack(signs), signs.shape[1], torch.arange(len(signs)))


def mean_ap(context: EvaluationContext, samples: Tensor) -> dict[str, Tensor]:
    """(Q,) each AP of the protocol, averaged over (S, Q, K) codes under noise. Never the lowest of them."""
    lean = ap_alone(context)
    measured = [
        measure_codes(lean, context.query.of(codes), lean.query_labels).per_query for codes in samples
    ]
    names = ap_names(measured[0])
    return {name: torch.stack([values[name] for values in measured]).mean(0) for name in names}


def ap_under_noise(
    context: EvaluationContext, samples: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Q,) AP by measure under (2, S, Q, K) codes: those that choose the worst case, and those that score."""
    choose, score = (mean_ap(context, codes) for codes in samples)
    return choose, score


def with_ap(measured: Measured, ap: Mapping[str, Tensor]) -> Measured:
    """The measures with these per-query AP in place of their own."""
    values = {**measured.values, **{name: float(column.mean()) for name, column in ap.items()}}
    return replace(measured, values=values, per_query={**measured.per_query, **ap})


def choosing_ap(results: Mapping[str, EvalResult]) -> dict[str, dict[str, Tensor]]:
    """The AP that choose the worst case of a randomised victim, by result and measure.

    Raises:
        ValueError: a result that was scored on a single draw of the noise.
    """
    if lacking := [name for name, result in results.items() if not result.selection]:
        raise ValueError(
            f"the victim is randomised, and {lacking[0]!r} was scored on one draw of its noise: the least of "
            "noisy looks is no worst case; score it by score_clean or score_attack"
        )
    return {name: result.selection for name, result in results.items()}


def noise_notes(context: EvaluationContext) -> tuple[str, ...]:
    """The note on how the AP of a randomised victim are averaged."""
    note = f"a randomised victim: AP are means over {NOISE_SAMPLES} fresh draws of its noise"
    also = "those of 8-bit images, whole words and targets are of one draw each"
    return (f"{note}; {also}",) if context.randomised else ()


def unmoved_note(
    context: EvaluationContext, threat: Threat, attacked: AttackedBlock, name: str = ""
) -> tuple[str, ...]:
    """The note that an attack with a budget changed no query, or no code of any.

    Args:
        name: of the attack, in the results of several.
    """
    if not any(ball.eps for ball in threat.balls.values()):
        return ()
    start = f"the attack {name}" if name else "the attack"
    largest = attacked.pixels.get("linf", attacked.pixels.get("edits"))
    if largest is None or largest.any():
        if bool((attacked.signs != context.query.rows()[:, None]).any()):
            return ()
        return (
            f"{start} moved no code: take more steps, longer ones, or another attack; its AP says nothing "
            "about robustness",
        )
    return (
        f"{start} changed no query: the gradient it follows is zero everywhere (rounding, a threshold, "
        "saturated outputs), or no point that it saw was worse; its AP says nothing about robustness",
    )
