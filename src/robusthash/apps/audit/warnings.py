"""Warnings of an audit: signs that something is wrong with the model itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robusthash.apps.audit.photo_collection import Photos
from robusthash.apps.audit.targets import Target
from robusthash.attacks.threat_model import threat_on
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Inputs
from robusthash.data.transforms import EVERYDAY
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import Flag
from robusthash.models.external.loaders import NAMES
from robusthash.models.external.wrapper import normalisation_warning
from robusthash.models.hasher import frozen
from robusthash.robustness.checks.base import above, order
from robusthash.robustness.checks.gradient_checks import gradient
from robusthash.robustness.checks.model_checks import model_checks, passive_checks

_PHOTOS = 16  # on which gradients and normalisation are checked

_CUT = (
    "something inside cuts the gradient (rounding, detach, no_grad, bits in place of numbers), so attacks "
    "that follow the weights saw nothing: hand over the numbers before that step, and audit again"
)


def model_flags(
    target: Target,
    context: EvaluationContext,
    eps: float,
    queries: int = _PHOTOS,
    progress: Progress = silent,
) -> tuple[Flag, ...]:
    """The checks of the model: all of them where torch computes it, as ``robusthash check`` runs them.

    A function outside torch gets those that need no gradient: F1, F15, F17, F19 and F20. A perceptual hash
    gets F2 and F3 besides; its gradient is that of its smooth form, so that finite differences of its bits
    (F14) and what follows from them say nothing. An endpoint gets none.

    Args:
        queries: photographs that are looked at; F17 and F21 look at all.
    """
    if target.endpoint is not None:
        return ()
    threat = threat_on("image", eps)
    if target.by_torch and target.name not in NAMES:
        flags = model_checks(context, threat, queries=queries, purpose=target.purpose, progress=progress)
        return tuple(map(_in_an_audit, flags))
    flags = passive_checks(context, threat, purpose=target.purpose)
    return order([*flags, *(_gradient_flags(context.some(queries)) if target.by_torch else ())])


def _in_an_audit(result: Flag) -> Flag:
    """A red F2 with the remedy of those who handed a model over."""
    return replace(result, remedy=_CUT) if (result.id, result.level) == ("F2", "red") else result


def _gradient_flags(context: EvaluationContext) -> list[Flag]:
    """F2 and F3 by one backward pass, away from each photograph's own code."""
    zero, broken = [], []

    def confidence(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
        logits = context.victim(inputs)["image"].logits
        return logits.abs().mean(1), logits

    with frozen(context.victim):
        for block in range(context.blocks):
            value, logits, slopes, _ = gradient(confidence, context.batch(block).inputs)
            rows = slopes["image"].flatten(1)
            finite = [torch.isfinite(rows).all(1), torch.isfinite(value), torch.isfinite(logits).all(1)]
            zero.append((rows == 0).all(1))
            broken.append(~torch.stack(finite).all(0))
    flat = above("F2", torch.cat(zero).double().mean().item())
    return [_in_an_audit(flat), above("F3", torch.cat(broken).double().mean().item())]


def model_warnings(target: Target, context: EvaluationContext, photos: Photos) -> list[str]:
    """Sentences on constant bits and on normalisation."""
    warnings = []
    rows, bits = context.database.rows(), context.victim.bits
    same = int((rows == rows[:1]).all(0).sum())
    if same > bits / 4:
        what = "bits" if context.victim.distance == "hamming" else "numbers"
        warnings.append(
            f"{same} of {bits} {what} are the same for every photograph, so they tell nothing apart."
        )
    if target.foreign and target.endpoint is None and target.name not in NAMES:
        few = photos.first(_PHOTOS)
        changed = EVERYDAY[2](EVERYDAY[1](few))
        if warning := normalisation_warning(context.victim, few, changed):
            warnings.append(warning)
    return warnings
