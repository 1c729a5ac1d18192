"""The audit of a search that answers ids alone: what it finds for the unchanged photograph is what it should find."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robusthash.apps.audits.photos import Photos
from robusthash.apps.audits.rows import Kind, Row, difference
from robusthash.apps.audits.target import Target, Tier
from robusthash.apps.stages import Shown
from robusthash.core.runtime import Draws
from robusthash.data.changes import EVERYDAY, noise
from robusthash.models.endpoint import Endpoint


def ranked_rows(target: Target, photos: Photos, tier: Tier, eps: float, seed: int, shown: Shown) -> tuple[Row, ...]:
    """Ask about the photographs unchanged, under everyday changes and under noise.

    Right is the id that came first for the unchanged photograph. 1 / rank is 0 where that id is not in the answer, so
    longer answers can only raise it.

    Raises:
        ValueError: the budget is too small; nothing has been asked then but two questions about one photograph.
    """
    endpoint = target.endpoint
    if endpoint is None:
        raise ValueError(f"{target.name} answers codes; audit it by them")
    images = photos.asking(tier.queries)
    endpoint.check_budget(len(images) * (len(EVERYDAY) + 2))
    level = f"{eps * 255:g} of 255 brightness levels"
    plan: list[tuple[str, str, str, Kind, Callable[[Tensor], Tensor]]] = [
        ("unchanged", "nothing", "no", "same", lambda x: x),
        *((change.name, change.words, change.visible, _EVERYDAY, change) for change in EVERYDAY),
        (
            "noise",
            f"random noise of {level}",
            "slight grain",
            "noise",
            lambda x: noise(x, torch.arange(len(x)), eps, Draws(seed, ("audit",))),
        ),
    ]
    rows: list[Row] = []
    right: list[str] = []
    for number, (name, words, visible, kind, change) in enumerate(plan):
        changed = change(images)
        answers = _ask(endpoint, changed)
        if not right:
            right = [ids[0] for ids in answers]
        ap = [1 / (1 + ids.index(wanted)) if wanted in ids else 0.0 for ids, wanted in zip(answers, right, strict=True)]
        largest, psnr = difference(images, changed)
        first = sum(ids[0] == wanted for ids, wanted in zip(answers, right, strict=True)) / len(ap)
        mean = sum(ap) / len(ap)
        rows.append(
            Row(name, words, visible, kind, len(ap), mean, first, largest=largest, psnr=psnr, per_photo=tuple(ap))
        )
        shown(number + 1, len(plan), "asking the endpoint")
    return tuple(rows)


_EVERYDAY: Kind = "everyday"


def _ask(endpoint: Endpoint, images: Tensor) -> list[tuple[str, ...]]:
    answers = [answer.ids for answer in endpoint.answers(images)]
    if not all(answers):
        raise ValueError(f"{endpoint.url} answered a code, and ids before")
    return answers
