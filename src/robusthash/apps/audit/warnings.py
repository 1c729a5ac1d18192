"""The warning lights of an audit: what looks wrong with the model itself, before anything is done to a
photograph."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.apps.audit.photo_collection import Photos
from robusthash.apps.audit.targets import Target
from robusthash.attacks.threat_model import threat_on
from robusthash.core.types import Inputs
from robusthash.data.transforms import EVERYDAY
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import Flag
from robusthash.models.external.perceptual_hashes import NAMES
from robusthash.models.external.wrapper import normalisation_doubt
from robusthash.models.hasher import frozen
from robusthash.robustness.checks.base import CHECKS, above, flag, order
from robusthash.robustness.checks.gradient_checks import gradient
from robusthash.robustness.checks.model_checks import passive_checks

_LOOKED_AT = 16  # photographs

_LOOKS_FOR = {
    "F1": "Asked again, it gives another code: share of the photographs.",
    "F2": "The weights show an attack no way, because the gradient is exactly 0: share of the photographs.",
    "F3": "Answers or gradients that are no numbers: share of the photographs.",
    "F15": "It adapts itself to each picture while it looks at it (1 is yes).",
    "F17": "Many pictures share a code, so that luck decides which comes first.",
    "F19": "Parts that still run as in training, where answers depend on luck or company.",
    "F20": "The largest number that reaches its first layer; too large where pictures are normalised twice.",
}

_CUT = (
    "something inside cuts the gradient (rounding, detach, no_grad, bits in place of numbers), so attacks that follow "
    "the weights saw nothing: hand over the numbers before that step, and audit again"
)


def looks_for(id: str) -> str:
    """What a check looks for, in plain words."""
    return _LOOKS_FOR.get(id, CHECKS[id].title)


def warning_lights(target: Target, context: EvaluationContext, eps: float) -> tuple[Flag, ...]:
    """F1, F15, F17, F19 and F20, and where torch computes the model F2 and F3 too; none of an endpoint."""
    if target.endpoint is not None:
        return ()
    lights = list(passive_checks(context, threat_on("image", eps)))
    return order(lights + _gradient_lights(context.some(_LOOKED_AT)) if target.by_torch else lights)


def _gradient_lights(context: EvaluationContext) -> list[Flag]:
    """F2 and F3 by one backward pass, away from each photograph's own code."""
    zero, broken = [], []

    def clarity(inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
        logits = context.victim(inputs)["image"].logits
        return logits.abs().mean(1), logits

    with frozen(context.victim):
        for block in range(context.blocks):
            value, logits, slopes, _ = gradient(clarity, context.batch(block).inputs)
            rows = slopes["image"].flatten(1)
            zero.append((rows == 0).all(1))
            broken.append(
                ~(torch.isfinite(rows).all(1) & torch.isfinite(value) & torch.isfinite(logits).all(1))
            )
    flat = above("F2", torch.cat(zero).double().mean().item())
    flat = flag("F2", flat.value, flat.level, remedy=_CUT)
    return [flat, above("F3", torch.cat(broken).double().mean().item())]


def doubts(target: Target, context: EvaluationContext, photos: Photos) -> list[str]:
    """Sentences on what looks wrong with the model itself."""
    said = []
    signs = context.database.signs()
    same = int((signs == signs[:1]).all(0).sum())
    if same > context.victim.bits / 4:
        said.append(
            f"{same} of {context.victim.bits} bits are the same for every photograph, so they tell nothing apart."
        )
    if target.foreign and target.endpoint is None and target.name not in NAMES:
        few = photos.asking(_LOOKED_AT)
        changed = EVERYDAY[2](EVERYDAY[1](few))
        if doubt := normalisation_doubt(context.victim, few, changed):
            said.append(doubt)
    return said
