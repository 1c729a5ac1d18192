"""All checks of a model, run on a few queries before a suite; those of suites are in ``suite_checks``.

Each gives a ``Flag`` with value, threshold, level and remedy. One that could not be run is amber and says
why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.base import Loss
from robusthash.attacks.losses import ObjectiveLoss, ScaleFree
from robusthash.attacks.threat_model import Threat
from robusthash.core.embeddings import Embeddings
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Batch
from robusthash.data.base import RetrievalData, Split, batches, content_hash
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import score_clean
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.protocol import Protocol
from robusthash.metrics.ranking_measures import tie_gap
from robusthash.metrics.results import Flag
from robusthash.objectives.base import HashObjective
from robusthash.robustness.checks.base import CHECKS, Level, above, flag, order
from robusthash.robustness.checks.behaviour_checks import (
    f1_repeated,
    f15_f19_inside,
    f16_precision,
    f20_range,
    f23_class,
    require_usable,
)
from robusthash.robustness.checks.gradient_checks import (
    f14_differences,
    f22_no_budget,
    gradient_checks,
    path_checks,
)

Purpose = Literal["this", "other", "unknown"]
"""What the codes were made for: the question that a context asks, another one, or nobody knows."""

_LITTLE = 0.3  # bits of information in a bit of the code


def model_checks(
    context: EvaluationContext,
    threat: Threat,
    objective: Loss | HashObjective | None = None,
    *,
    queries: int = 128,
    steps: int = 100,
    purpose: Purpose = "this",
    progress: Progress = silent,
) -> tuple[Flag, ...]:
    """F1-F3, F10-F17 and F19-F23: everything that needs only the victim.

    Args:
        threat: of the attack; the checks themselves know all that a W2 attacker knows.
        objective: of the attack: a loss, a training objective, or by default the scale-free loss.
        queries: N of the context, chosen by content; F17 and F21 look at all.
        steps: of the search whose path F10-F12 look at.
        purpose: see ``f17_collapse``.

    Raises:
        ValueError: a threat that leaves the query modality alone; a model that cannot be used at all, see
            ``require_usable``.
    """
    modality = context.direction[0]
    if modality not in threat.balls:
        raise ValueError(f"{threat.name} leaves {modality} queries alone; nothing to check")
    if queries < 1 or steps < 2:
        raise ValueError(f"checks need at least 1 query and 2 steps, got {queries} and {steps}")
    threat = Threat({modality: threat.balls[modality]}, "W2")
    loss = ObjectiveLoss(objective) if isinstance(objective, HashObjective) else objective or ScaleFree()
    victim, some = context.victim, context.some(queries)
    batch = _batch(some)
    require_usable(victim, batch)
    parts: list[Callable[[], list[Flag]]] = [
        lambda: [f1_repeated(victim, batch.inputs), *f15_f19_inside(victim, batch.inputs)],
        lambda: _with_path(some, threat, loss, steps),
        lambda: [f14_differences(some, threat)],
        lambda: [f16_precision(victim, batch.inputs), f17_collapse(context, purpose)],
        lambda: [f20_range(victim, batch.inputs, threat, *_clean_and_chance(some))],
        lambda: [f21_leakage(context.data), f22_no_budget(some, threat), f23_class(victim, batch.inputs)],
    ]
    flags: list[Flag] = []
    for number, part in enumerate(parts):
        progress(number, len(parts), "checking the model")
        flags += part()
    progress(len(parts), len(parts), "checking the model")
    return order(flags)


def _with_path(context: EvaluationContext, threat: Threat, loss: Loss, steps: int) -> list[Flag]:
    """F2, F3, F10-F13; F3 of the path where it broke off."""
    gradients, runnable = gradient_checks(context, threat, loss)
    path = path_checks(context, threat, loss, steps, runnable)
    if any(result.id == "F3" for result in path):
        gradients = [result for result in gradients if result.id != "F3"]
    return [*gradients, *path]


def passive_checks(
    context: EvaluationContext, threat: Threat, queries: int = 16, purpose: Purpose = "this"
) -> tuple[Flag, ...]:
    """F1, F15, F17, F19 and F20, which need no attack: for models without gradients too.

    Args:
        queries: N of the context, chosen by content; F17 looks at all.
        purpose: see ``f17_collapse``.
    """
    victim, some = context.victim, context.some(queries)
    inputs = _batch(some).inputs
    inside = f15_f19_inside(victim, inputs)
    repeated = f1_repeated(victim, inputs)
    ranged = f20_range(victim, inputs, threat, *_clean_and_chance(some))
    return order([repeated, *inside, f17_collapse(context, purpose), ranged])


def _batch(context: EvaluationContext) -> Batch:
    """All queries, in their own modality."""
    batch = context.queries.batch(torch.arange(len(context.queries)))
    return batch.only({context.direction[0]}).to(context.victim.device)


def _clean_and_chance(context: EvaluationContext) -> tuple[float, float]:
    clean = score_clean(context)
    return clean[clean.setting.key], clean.reference["chance"]


def f17_collapse(context: EvaluationContext, purpose: Purpose = "this") -> Flag:
    """Few distinct codes: the gap between the best and the worst order of ties, or nearly constant bits.

    Args:
        purpose: what the codes are for: the question that the context asks, another one, or nobody knows. One
            code for each class is what a search by class is trained for, so where copies are asked for, its
            ties are amber; and so are its constant bits, where the photographs are of few of its classes.
    """
    if isinstance(context.query, Embeddings):
        lean = replace(context, protocol=Protocol("ties", ("MAP", "tie_gap")))
        return above("F17", score_clean(lean)["tie_gap"])
    gap = float(tie_gap(prepared_profile(context.query_codes, context.query_labels, context.prepared)).mean())
    entropy = float(bit_entropy(context.codes.signs()).mean())
    distinct, held = len(torch.unique(context.codes.packed, dim=0)), len(context.codes)
    shared = f"{distinct} distinct codes for {held} items; a search by class is meant to share them, "
    shared += "and is measured by class (audit --labels); for finding copies, train on copies"
    level: Level = "red" if purpose == "this" else "amber"
    if gap <= CHECKS["F17"].threshold and entropy < _LITTLE:
        remedy = f"bits carry {entropy:.2f} bit each; {distinct} distinct codes in the database: "
        level = "amber" if purpose == "other" else "red"
        return flag("F17", entropy, level, threshold=_LITTLE, remedy=remedy + CHECKS["F17"].remedy)
    if level == "amber" and entropy < _LITTLE and purpose == "unknown":
        level = "red"
    result = above("F17", gap, level)
    return flag("F17", gap, "amber", remedy=shared) if result.level == "amber" else result


def bit_entropy(signs: Tensor) -> Tensor:
    """(K,) entropy of each bit of (N, K) codes, in bits."""
    share = (signs > 0).double().mean(0)
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)


def f21_leakage(data: RetrievalData) -> Flag:
    """Queries whose very values are in the database or the training set too.

    The data set's own content hashes were compared when it was made; those are of files where it holds files,
    so the inputs of the model are hashed here.
    """
    queries = _hashes(data.query)
    shared = np.zeros(len(queries), dtype=bool)
    for other in (data.database, data.train):
        shared |= np.isin(queries, _hashes(other)) | np.isin(data.query.hashes, other.hashes)
    return above("F21", int(shared.sum()))


def _hashes(split: Split) -> np.ndarray:
    """(N,) hashes of the values of each item, all modalities together."""
    hashes: list[bytes] = []
    for batch in batches(split, 256):
        columns = [values.numpy() for _, values in sorted(batch.inputs.items())]
        hashes += [content_hash(b"".join(c[row].tobytes() for c in columns)) for row in range(len(batch))]
    return np.array(hashes, dtype="S16")
