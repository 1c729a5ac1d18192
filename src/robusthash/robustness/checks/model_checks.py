"""Signs that a robustness number may not be trusted: every check of a victim, run on a few queries before a
suite.

Each gives a ``Flag`` with value, threshold, level and a one-line remedy. What could not be run is amber and
says why. The checks that compare lines of a suite are ``checks_suite.suite_checks``.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.base import Loss
from robusthash.attacks.losses import ObjectiveLoss, ScaleFree
from robusthash.attacks.threat_model import Threat
from robusthash.data.base import RetrievalData, Split, batches, content_hash
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import score_clean
from robusthash.metrics.distance_histogram import prepared_profile
from robusthash.metrics.ranking_measures import tie_gap
from robusthash.metrics.results import Flag
from robusthash.objectives.base import HashObjective
from robusthash.robustness.checks.base import CHECKS, above, flag, order
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
from robusthash.robustness.checks.suite_checks import suite_checks

__all__ = ["CHECKS", "model_checks", "require_usable", "suite_checks"]


def model_checks(
    context: EvaluationContext,
    threat: Threat,
    objective: Loss | HashObjective | None = None,
    *,
    queries: int = 128,
    steps: int = 100,
) -> tuple[Flag, ...]:
    """F1-F3, F10-F17 and F19-F23: everything that needs only the victim.

    Args:
        threat: what is to be attacked; the checks themselves know all that a W2 attacker knows.
        objective: what the attack ascends: an attack loss, a training objective, or by default the house
            objective.
        queries: so many of the bench, chosen by content; F17 and F21 look at all.
        steps: of the search whose path F10-F12 look at.

    Raises:
        ValueError: a threat that leaves the query modality alone; a model that cannot be used at all, see
            ``require_usable``.
    """
    modality = context.direction[0]
    if modality not in threat.balls:
        raise ValueError(
            f"{threat.name} leaves the {modality} queries of this direction alone; nothing to check"
        )
    if queries < 1 or steps < 2:
        raise ValueError(f"checks need at least 1 query and 2 steps, got {queries} and {steps}")
    threat = Threat({modality: threat.balls[modality]}, "W2")
    loss = ScaleFree() if objective is None else objective
    if isinstance(loss, HashObjective):
        loss = ObjectiveLoss(loss)
    collapse = f17_collapse(context)  # of codes alone, so all queries are cheap
    context = context.some(queries)
    inputs = (
        context.queries.batch(torch.arange(len(context.queries))).only({modality}).to(context.victim.device)
    )
    require_usable(context.victim, inputs)
    clean = score_clean(context)
    repeated = f1_repeated(context.victim, inputs.inputs)
    inside, trained = f15_f19_inside(context.victim, inputs.inputs)
    gradients, runnable = gradient_checks(context, threat, loss)
    searched = path_checks(context, threat, loss, steps, runnable)
    if any(found.id == "F3" for found in searched):
        gradients = [found for found in gradients if found.id != "F3"]
    value, chance = clean.values[context.protocol.headline], clean.reference["chance"]
    return order(
        [
            *(repeated, inside, trained, *gradients, *searched),
            f14_differences(context, threat),
            f16_precision(context.victim, inputs.inputs),
            collapse,
            f20_range(context.victim, inputs.inputs, threat, value, chance),
            f21_leakage(context.data),
            f22_no_budget(context, threat),
            f23_class(context.victim, inputs.inputs),
        ]
    )


def passive_checks(context: EvaluationContext, threat: Threat, queries: int = 16) -> tuple[Flag, ...]:
    """F1, F15, F17, F19 and F20: what is seen without any attack, so of models without gradients too.

    Args:
        queries: so many of the bench, chosen by content; F17 looks at all.
    """
    collapse, context = f17_collapse(context), context.some(queries)
    modality = context.direction[0]
    inputs = (
        context.queries.batch(torch.arange(len(context.queries))).only({modality}).to(context.victim.device)
    )
    clean = score_clean(context)
    value, chance = clean.values[context.protocol.headline], clean.reference["chance"]
    inside, trained = f15_f19_inside(context.victim, inputs.inputs)
    repeated = f1_repeated(context.victim, inputs.inputs)
    return order(
        [repeated, inside, collapse, trained, f20_range(context.victim, inputs.inputs, threat, value, chance)]
    )


def f17_collapse(context: EvaluationContext) -> Flag:
    """Few distinct codes: the gap between the best and the worst order of ties, or bits that are nearly
    constant."""
    gap = float(tie_gap(prepared_profile(context.query, context.query_labels, context.prepared)).mean())
    entropy = float(bit_entropy(context.database.signs()).mean())
    distinct = len(torch.unique(context.database.packed, dim=0))
    if gap <= CHECKS["F17"].threshold and entropy < 0.3:
        remedy = f"bits carry {entropy:.2f} bit each; {distinct} distinct codes in the database: {CHECKS['F17'].remedy}"
        return flag("F17", entropy, "red", threshold=0.3, remedy=remedy)
    return above("F17", gap)


def bit_entropy(signs: Tensor) -> Tensor:
    """(K,) entropy of each bit of (N, K) codes, in bits."""
    share = (signs > 0).double().mean(0)
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)


def f21_leakage(data: RetrievalData) -> Flag:
    """Queries whose very values stand in the database or the training set too.

    The data set's own content hashes were compared when it was made; those are of files where it holds files,
    so what the model is fed is hashed here.
    """
    hashed = partial(_content, batch_size=256)
    queries = hashed(data.query)
    shared = np.zeros(len(queries), dtype=bool)
    for other in (data.database, data.train):
        shared |= np.isin(queries, hashed(other)) | np.isin(data.query.hashes, other.hashes)
    return above("F21", int(shared.sum()))


def _content(split: Split, batch_size: int) -> np.ndarray:
    """(N,) hashes of the values of each item, all modalities together."""
    found: list[bytes] = []
    for batch in batches(split, batch_size):
        columns = [values.numpy() for _, values in sorted(batch.inputs.items())]
        found += [
            content_hash(b"".join(column[row].tobytes() for column in columns)) for row in range(len(batch))
        ]
    return np.array(found, dtype="S16")
