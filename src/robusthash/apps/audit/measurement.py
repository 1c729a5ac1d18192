"""The audit: a search is measured on photographs as they are, under everyday changes, noise and attacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.apps.audit.audit_page import audit_page, category_sentence
from robusthash.apps.audit.measured_rows import (
    AttackResult,
    AuditExample,
    AuditRow,
    Change,
    Columns,
    CopySearch,
    category_columns,
    difference,
    worst_of,
)
from robusthash.apps.audit.photo_collection import (
    STORED_QUALITY,
    Categories,
    Photos,
    read_categories,
    read_photos,
)
from robusthash.apps.audit.targets import AuditOptions, Target, hostile_attacks, open_target, size_of
from robusthash.apps.audit.verdict import idle_attacks, verdict
from robusthash.apps.audit.warnings import model_flags, model_warnings
from robusthash.apps.experiment.run_directory import write_json
from robusthash.apps.image_hash.copy_hash import RADIUS
from robusthash.attacks.oracle import ids_lost
from robusthash.attacks.query_search import Square, search_by_queries
from robusthash.attacks.threat_model import threat_on
from robusthash.core.atomic_files import write_aside
from robusthash.core.packaged_weights import packaged
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.core.types import Batch, Inputs
from robusthash.data.transforms import EVERYDAY, jpeg, noise
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.copy_detection import COPIES, calibrated_radius, copies_data, false_matches
from robusthash.evaluation.runner import BlockRunner
from robusthash.metrics.results import Flag, software_versions
from robusthash.models.encoding import encode_searched, encode_signs
from robusthash.models.external.http_endpoint import Endpoint
from robusthash.models.hasher import Hasher

_BATCH = 32  # images encoded together: foreign models may be large
_BLOCK = 10  # photographs attacked together
_TRIED = 8  # photographs on which a model is tried first

_MISSED = "made to be missed, the worst of these for each photograph"
_HIDDEN: Columns = ("hide, worst case", _MISSED, "hardly", "hide-worst")
_TAKEN: Columns = ("imitate, best case", "made to look like another photograph", "hardly", "imitate-worst")

_BY_SIZE = ("resize", "blur")  # changes whose effect goes with the size of what is changed

_SAVED = 95  # JPEG quality of what an attacker uploads
_AGAIN = f"the same files, saved again as JPEG {_SAVED}"
_HIDDEN_SAVED: Columns = (f"hide, then JPEG {_SAVED}", _AGAIN, "hardly", "hide-saved")
_TAKEN_SAVED: Columns = (f"imitate, then JPEG {_SAVED}", _AGAIN, "hardly", "imitate-saved")

Lists = list[tuple[str, ...]]
"""Ids that an endpoint answers, nearest first, by photograph."""


def run_audit(
    target: str | nn.Module,
    out: Path,
    photos: Path | None = None,
    options: AuditOptions = AuditOptions(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Audit a search and write ``report.html`` and ``audit.json`` to ``out``.

    Args:
        target: see ``open_target``; or ``copy-hash``, the packaged hash for copies.
        photos: a folder of photographs; the twenty of this package by default.

    Returns:
        The content of ``audit.json``.

    Raises:
        ValueError: a broken model (``Broken``), unusable photographs, a budget too small; labels without two
            subfolders of two photographs, or at an endpoint whose ids are no files of them.
        FileNotFoundError, ImportError: the target, the folder or an extra is missing.
    """
    started = time.perf_counter()
    if target == "copy-hash":
        radius = RADIUS[256] if options.radius is None else options.radius
        target, options = str(packaged(target)), replace(options, radius=radius)
    size = size_of(target, options.size)
    collection = read_photos(photos, size, options.limit, options.seed, options.max_pixels)
    categories = read_categories(collection) if options.labels else None
    answers_file = out / "answers.jsonl"
    few = collection.first(_TRIED)
    opened = open_target(target, few, options.bits, options.limits, options.reading, answers_file)
    if opened.endpoint is not None:
        opened.endpoint.progress = progress
    out.mkdir(parents=True, exist_ok=True)
    plan = _Plan(opened, collection, categories, options, progress)
    measured = _Measured(_audit_ids(plan)) if opened.hasher is None else _audit_codes(plan, opened.hasher)
    summary = {
        "target": opened.name,
        "title": opened.title,
        "said": [*opened.remarks, *measured.remarks],
        "doubts": list(measured.warnings),
        "gradients": opened.gradients,
        "black box": opened.black_box,
        "bits": None if opened.hasher is None else opened.hasher.bits,
        "distance": None if opened.hasher is None else opened.hasher.distance,
        "radius": measured.radius,
        "matches by": "radius" if plan.by_radius else "rank",
        "false matches": measured.false_matches,
        "size": size,
        "eps": options.eps,
        "tier": asdict(options.tier),
        "seed": options.seed,
        "photographs": collection.facts(),
        "kinds": categories and {**categories.facts(), "said": category_sentence(measured.rows)},
        "rows": [asdict(row) for row in measured.rows],
        "got nowhere": idle_attacks(measured.rows),
        "flags": [asdict(flag) for flag in measured.flags],
        "questions": opened.endpoint.requests_sent if opened.endpoint else None,
        "software": software_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    summary["verdict"] = asdict(verdict(summary, measured.rows, measured.flags))
    page = audit_page(summary, measured.rows, measured.examples, measured.flags)
    with write_aside(out / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    write_json(out / "audit.json", summary)
    if opened.endpoint is not None:
        opened.endpoint.forget()  # another audit asks again: the search may have changed
    return summary


@dataclass(frozen=True)
class _Plan:
    """An opened target, and the photographs and options to measure it with."""

    target: Target
    photos: Photos
    categories: Categories | None
    options: AuditOptions
    progress: Progress

    @property
    def images(self) -> Tensor:
        """(Q, 3, S, S) float: the photographs that are searched for."""
        return self.photos.first(self.options.tier.queries)

    @property
    def by_radius(self) -> bool:
        """Pictures within a radius that somebody has set count as the same."""
        return self.target.radius is not None or self.options.radius is not None

    def changes(self) -> list[tuple[Columns, Callable[[Tensor], Tensor]]]:
        """Everyday changes and noise: the first columns of the row of each, and the change."""
        eps, draws = self.options.eps, Draws(self.options.seed, ("audit",))

        def noisy(images: Tensor) -> Tensor:
            return noise(images, torch.arange(len(images)), eps, draws)

        words = f"random noise of {eps * 255:g} of 255 brightness levels"
        everyday: list[tuple[Columns, Callable[[Tensor], Tensor]]]
        size = f" (at the model's size, {self.images.shape[-1]} px)"  # quickstart changes larger ones
        everyday = [
            ((each.name, each.words + size * (each.name in _BY_SIZE), each.visible, "everyday"), each)
            for each in EVERYDAY
        ]
        return [*everyday, (("noise", words, "slight grain", "noise"), noisy)]


@dataclass(frozen=True)
class _Measured:
    rows: tuple[AuditRow, ...]
    examples: tuple[AuditExample, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    radius: float | None = None
    false_matches: float | None = None
    flags: tuple[Flag, ...] = ()


# ------------------------------------------------------------------------------------- searches by code


def _audit_codes(plan: _Plan, hasher: Hasher) -> _Measured:
    target, photos, tier = plan.target, plan.photos, plan.options.tier
    images = plan.images
    if target.endpoint is not None:
        attacked = min(tier.attacked, len(images)) * (tier.questions + 3)
        target.endpoint.check_budget(len(photos) + len(images) * (len(EVERYDAY) + 2) + attacked)
    context = _context(plan, hasher)
    radius, remarks = _radius(plan, context)
    search = CopySearch(context, photos, radius, None if plan.categories is None else plan.categories.stored)
    unchanged = search.find(context.query.rows().float())
    rows = [search.row(("unchanged", "nothing", "no", "same"), unchanged, images)]
    changed: dict[str, tuple[Tensor, Tensor]] = {}  # (signs, images) of each change
    for number, (columns, change) in enumerate(plan.changes()):
        pixels = change(images)
        changed[columns[0]] = (_signs(hasher, pixels), pixels)
        rows.append(search.row(columns, search.find(changed[columns[0]][0]), pixels))
        plan.progress(min(number + 1, len(EVERYDAY)), len(EVERYDAY), "everyday changes")
    everyday = [row for row in rows if row.kind == "everyday"]
    worst = min(everyday, key=lambda row: (row.first, row.map, -(row.bits or 0)))
    attack_rows, attack_examples = _attack(plan, search)
    return _Measured(
        (*rows, *attack_rows),
        (search.everyday_example(worst.words, *changed[worst.name]), *attack_examples),
        remarks,
        tuple(model_warnings(target, context, photos)),
        radius,
        false_matches(context, radius),
        model_flags(target, context, plan.options.eps, tier.checked, plan.progress),
    )


def _radius(plan: _Plan, context: EvaluationContext) -> tuple[float, tuple[str, ...]]:
    """The bits that may differ (the distance of vectors), and a sentence where nobody says how many."""
    bits, distance = context.victim.bits, context.victim.distance
    remarks: tuple[str, ...] = ()
    radius = plan.target.radius if plan.options.radius is None else plan.options.radius
    if radius is None:
        radius = calibrated_radius(context)
        how, largest = "many bits may differ between", "number"
        if distance != "hamming":
            how, largest = f"large the {distance} distance may be of", "distance"
        remarks = (
            f"Nobody has said how {how} two pictures that count as the same, so the largest {largest} was "
            f"taken at which at most 1 % of the pairs of different photographs do: {radius:g}.",
        )
    if distance != "hamming":
        if radius < 0:
            raise ValueError(f"the radius is a {distance} distance of at least 0, got {radius:g}")
        return radius, remarks
    if not 0 <= radius < bits or radius != int(radius):
        raise ValueError(f"the radius must lie in 0..{bits - 1} for {bits} bits, got {radius:g}")
    return int(radius), remarks


def _context(plan: _Plan, hasher: Hasher) -> EvaluationContext:
    """Made by hand rather than by ``make_context``, whose batches of 256 are large for a foreign model."""
    photos = plan.photos
    note = f"stored copies are JPEG files of quality {STORED_QUALITY}"
    data = copies_data(photos.pixels[: plan.options.tier.queries], photos.stored, note)
    both = ("image", "image")
    database = encode_searched(
        hasher.for_database(),
        data.database,
        batch_size=_BATCH,
        modality="image",
        progress=lambda done, total: plan.progress(done, total, "encoding the stored copies"),
    )["image"]
    query = encode_searched(hasher, data.query, batch_size=_BATCH, modality="image")["image"]
    seed = plan.options.seed
    return EvaluationContext(hasher, data, COPIES, both, data.query, query, database, seed, _BLOCK)


def _signs(hasher: Hasher, images: Tensor) -> Tensor:
    """(Q, K) codes of images."""
    return encode_signs(hasher, "image", images, _BATCH)


def _attack(plan: _Plan, search: CopySearch) -> tuple[list[AuditRow], list[AuditExample]]:
    """Run every attack on the first photographs: a row for each, and for the worst of those of one aim."""
    tier, eps = plan.options.tier, plan.options.eps
    few = search.first(min(tier.attacked, len(search.context.queries)))
    by_radius = plan.by_radius
    victim = search.context.victim
    counted = (victim.bits, int(search.radius)) if by_radius and victim.distance == "hamming" else None
    specs = hostile_attacks(plan.target, tier, eps, counted)
    runs = [(spec, restart) for spec in specs for restart in range(spec.restarts)]
    results: dict[bool, list[AttackResult]] = {False: [], True: []}
    runner = BlockRunner(few.context)
    for number, (spec, restart) in enumerate(runs):

        def progress(block: int, blocks: int, _: str, before: int = number) -> None:
            plan.progress(before * blocks + block, len(runs) * blocks, "attacks")

        attacked = runner.queries(spec, restart, progress)
        results[spec.targeted].append(few.score(spec, restart, attacked))
    rows: list[AuditRow] = []
    examples: list[AuditExample] = []
    who = {"white-box": "has the model", "black-box": f"may only ask it, {tier.questions} times"}
    for targeted, of_aim in results.items():
        if not of_aim:
            continue
        kind: Change = "imitate" if targeted else "hide"
        aim = "pass for another" if targeted else "be missed"
        if targeted:
            before = few.find(few.context.query.rows().float(), few.context.targets[:, 0])
            rows.append(few.row(("before the attack", "nothing", "no", kind), before, few.images))
        for each in of_aim:
            words = f"made to {aim} by someone who {who[each.spec.kind]}"
            rows.append(few.row((each.name, words, "hardly", kind), each.answers, each.images))
        worst, winner = worst_of([each.answers for each in of_aim], targeted, by_radius)
        images = torch.stack([each.images for each in of_aim])[winner, torch.arange(len(winner))]
        rows.append(few.row(_TAKEN if targeted else _HIDDEN, worst, images))
        saved = jpeg(images, _SAVED)
        labels = few.context.targets[:, 0] if targeted else None
        answers = few.find(_signs(few.context.victim, saved), labels)
        rows.append(few.row(_TAKEN_SAVED if targeted else _HIDDEN_SAVED, answers, saved))
        examples.append(few.attacked_example(worst, images, targeted, eps))
    return rows, examples


# ------------------------------------------------------------------------------------- searches by ids


def _audit_ids(plan: _Plan) -> tuple[AuditRow, ...]:
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


def _searched(plan: _Plan, endpoint: Endpoint, images: Tensor) -> Tensor:
    """(n, 3, H, W) images within ``eps`` for which the endpoint lost most of what it first found."""
    questions = plan.options.tier.questions
    numbers: dict[str, int] = {}
    first: list[Tensor] = []
    asked = itertools.count(1)

    def ask(inputs: Inputs) -> Tensor:
        answers = _ask(endpoint, inputs["image"])
        width = first[0].shape[1] if first else max(1, *(len(ids) for ids in answers))
        ids = _numbered(answers, numbers, width)
        first.extend([ids][len(first) :])
        plan.progress(next(asked), questions, "searching by questions")
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
