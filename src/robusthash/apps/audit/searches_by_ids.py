"""Rows of an audit of an endpoint that answers ids alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.apps.audit.measured_rows import AuditPlan, AuditRow, Columns, category_columns, difference
from robusthash.attacks.oracle import ids_lost
from robusthash.attacks.query_search import Square, search_by_queries
from robusthash.attacks.threat_model import threat_on
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs
from robusthash.data.transforms import EVERYDAY
from robusthash.models.external.http_endpoint import Endpoint

Lists = list[tuple[str, ...]]
"""Ids that an endpoint answers, nearest first, by photograph."""


def measure_ids(plan: AuditPlan) -> tuple[AuditRow, ...]:
    """Measure an endpoint that answers ids alone, unchanged, under everyday changes and noise, and attacked.

    Right is the id that came first for the unchanged photograph; where nothing was found for it, nothing is
    right. 1 / rank is 0 where the right id is not in the answer, so longer answers can only raise it. The
    attack sees lists alone and tries to empty them of what they first held.

    Raises:
        ValueError: the budget is too small, or the ids tell no categories; nothing has been asked then but
            two queries about one photograph, unless a later photograph is the first to bring an unknown id.
    """
    endpoint, categories, tier = plan.target.endpoint, plan.categories, plan.options.tier
    if endpoint is None:
        raise ValueError(f"{plan.target.name} answers codes; audit it by them")
    images = plan.images
    few = images[: tier.attacked]
    endpoint.check_budget(len(images) * (len(EVERYDAY) + 2) + len(few) * (tier.questions + 1))
    if categories is not None:
        for part in (images[:1], images):  # refused by the first answer already, where that will do
            if any(lists := _ask(endpoint, part)):
                categories.require_known(lists, endpoint.url)
    unchanged = _ask(endpoint, images)
    width = max(map(len, unchanged)) - 1  # ids that count for categories, the own one left out

    def row(columns: Columns, before: Tensor, after: Tensor) -> AuditRow:
        answers = _ask(endpoint, after)
        pairs = [(ids, right[:1]) for ids, right in zip(answers, unchanged, strict=False)]
        ap = [1 / (1 + ids.index(right[0])) if right and right[0] in ids else 0.0 for ids, right in pairs]
        first = ap.count(1.0) / len(ap)
        names = plan.photos.names[: len(answers)]
        by_category = None if categories is None else categories.found_in(answers, names, width)
        measured = {"per_photo": tuple(ap), **difference(before, after), **category_columns(by_category)}
        return AuditRow(*columns, len(ap), sum(ap) / len(ap), first, **measured)

    rows = [row(("unchanged", "nothing", "no", "same"), images, images)]
    changes = plan.changes()
    for number, (columns, change) in enumerate(changes):
        rows.append(row(columns, images, change(images)))
        plan.progress(number + 2, len(changes) + 1, "asking the endpoint")
    words = f"made to be missed by someone who may only ask it, {tier.questions} times"
    square = row(("square", words, "hardly", "hide"), few, _searched(plan, endpoint, few))
    worst = replace(square, name="hide, worst case", words="made to be missed", kind="hide-worst")
    return (*rows, square, worst)


def _searched(plan: AuditPlan, endpoint: Endpoint, images: Tensor) -> Tensor:
    """(n, 3, H, W) images within ``eps`` for which the endpoint lost most of what it first found."""
    questions = plan.options.tier.questions
    numbers: dict[str, int] = {}
    first: list[Tensor] = []
    number = itertools.count(1)

    def ask(inputs: Inputs) -> Tensor:
        answers = _ask(endpoint, inputs["image"])
        width = first[0].shape[1] if first else max(1, *(len(ids) for ids in answers))
        ids = _numbered(answers, numbers, width)
        first.extend([ids][len(first) :])
        plan.progress(next(number), questions, "searching by questions")
        return ids_lost(first[0], ids).to(images)

    batch = Batch({"image": images}, None, torch.arange(len(images)))
    threat = threat_on("image", plan.options.eps, knowledge="B1")
    draws = Draws(plan.options.seed, ("audit", "square"))
    return search_by_queries(Square(), ask, batch, threat, draws, questions).inputs["image"]


def _numbered(answers: Lists, numbers: dict[str, int], width: int) -> Tensor:
    """(B, width) the ids as numbers, the same for the same id, cut to ``width`` or filled up with -1."""
    rows = [[numbers.setdefault(name, len(numbers)) for name in ids[:width]] for ids in answers]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _ask(endpoint: Endpoint, images: Tensor) -> Lists:
    """Ids by image, none where the search found nothing."""
    answers = endpoint.answers(images)
    if any(answer.code is not None for answer in answers):
        raise ValueError(f"{endpoint.url} answered a code, and ids before")
    return [answer.ids for answer in answers]
