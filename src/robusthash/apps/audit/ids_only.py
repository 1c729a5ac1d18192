"""The audit of a search that answers ids alone: what it finds for the unchanged photograph is what it should
find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robusthash.apps.audit.categories import Kinds
from robusthash.apps.audit.measured_rows import Done, Row, difference, kind_columns
from robusthash.apps.audit.photo_collection import Photos
from robusthash.apps.audit.targets import Target, Tier
from robusthash.apps.experiment.stages import Progress
from robusthash.attacks.oracle import ids_lost
from robusthash.attacks.query_search import Square, ask_around
from robusthash.attacks.threat_model import threat_on
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Inputs
from robusthash.data.transforms import EVERYDAY, noise
from robusthash.evaluation.copy_detection import KindFound
from robusthash.models.external.http_endpoint import Endpoint

Lists = list[tuple[str, ...]]


def ranked_rows(
    target: Target, photos: Photos, kinds: Kinds | None, tier: Tier, eps: float, seed: int, progress: Progress
) -> tuple[Row, ...]:
    """Ask about the photographs unchanged, under everyday changes and noise, and search by questions to be
    missed.

    Right is the id that came first for the unchanged photograph. 1 / rank is 0 where that id is not in the
    answer, so longer answers can only raise it. The search sees lists alone and tries to empty them of what
    they first held.

    Args:
        kinds: where they are known; the ids must then be paths below the folder.

    Raises:
        ValueError: the budget is too small, or the ids tell no kinds; nothing has been asked then but two
            questions about one photograph, unless a later photograph is the first to bring an unknown id.
    """
    endpoint = target.endpoint
    if endpoint is None:
        raise ValueError(f"{target.name} answers codes; audit it by them")
    images = photos.asking(tier.queries)
    few = images[: tier.attacked]
    endpoint.check_budget(len(images) * (len(EVERYDAY) + 2) + len(few) * (tier.questions + 1))
    level = f"{eps * 255:g} of 255 brightness levels"
    plan: list[tuple[str, str, str, Done, Callable[[Tensor], Tensor]]] = [
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
    if kinds is not None:
        for asked in (images[:1], images):  # refused by the first answer already, where that will do
            kinds.require_known(_ask(endpoint, asked), endpoint.url)
    unchanged = _ask(endpoint, images)
    right = [ids[0] for ids in unchanged]
    width = max(map(len, unchanged)) - 1  # ids that count for kinds, the own one left out
    rows: list[Row] = []

    def kind_found(answers: Lists) -> KindFound | None:
        return None if kinds is None else kinds.found_in(answers, photos.names[: len(answers)], width)

    for number, (name, words, visible, kind, change) in enumerate(plan):
        changed = change(images)
        answers = _ask(endpoint, changed)
        rows.append(_row(name, words, visible, kind, answers, right, kind_found(answers), (images, changed)))
        progress(number + 1, len(plan), "asking the endpoint")
    searched = _searched(endpoint, few, tier.questions, eps, Draws(seed, ("audit", "square")), progress)
    words = f"made to be missed by someone who may only ask it, {tier.questions} times"
    answers = _ask(endpoint, searched)
    square = _row("square", words, "hardly", "hide", answers, right, kind_found(answers), (few, searched))
    worst = replace(square, name="hide, worst case", words="made to be missed", kind="hide-worst")
    return (*rows, square, worst)


_EVERYDAY: Done = "everyday"


def _row(
    name: str,
    words: str,
    visible: str,
    kind: Done,
    answers: Lists,
    right: Sequence[str],
    of_kind: KindFound | None,
    images: tuple[Tensor, Tensor],
) -> Row:
    """What came back for the first photographs, against what came first for each unchanged."""
    pairs = list(zip(answers, right, strict=False))
    ap = [1 / (1 + ids.index(wanted)) if wanted in ids else 0.0 for ids, wanted in pairs]
    first = sum(ids[0] == wanted for ids, wanted in pairs) / len(pairs)
    largest, psnr = difference(*images)
    measured = {"largest": largest, "psnr": psnr, "per_photo": tuple(ap), **kind_columns(of_kind)}
    return Row(name, words, visible, kind, len(ap), sum(ap) / len(ap), first, **measured)


def _searched(
    endpoint: Endpoint, images: Tensor, questions: int, eps: float, draws: Draws, progress: Progress
) -> Tensor:
    """(n, 3, H, W) images within ``eps`` for which the endpoint lost most of what it first found."""
    numbers: dict[str, int] = {}
    first: list[Tensor] = []
    asked = itertools.count(1)

    def ask(inputs: Inputs) -> Tensor:
        answers = _ask(endpoint, inputs["image"])
        width = first[0].shape[1] if first else max(len(ids) for ids in answers)
        found = _numbered(answers, numbers, width)
        first.extend([found][len(first) :])
        progress(next(asked), questions, "searching by questions")
        return ids_lost(first[0], found).to(images)

    batch = Batch({"image": images}, None, torch.arange(len(images)))
    threat = threat_on("image", eps, knowledge="B1")
    return ask_around(Square(), ask, batch, threat, draws, questions).inputs["image"]


def _numbered(answers: Lists, numbers: dict[str, int], width: int) -> Tensor:
    """(B, width) the ids as numbers, the same for the same id, cut to ``width``; -1 where a list is
    shorter."""
    rows = [[numbers.setdefault(name, len(numbers)) for name in ids[:width]] for ids in answers]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _ask(endpoint: Endpoint, images: Tensor) -> Lists:
    answers = [answer.ids for answer in endpoint.answers(images)]
    if not all(answers):
        raise ValueError(f"{endpoint.url} answered a code, and ids before")
    return answers
