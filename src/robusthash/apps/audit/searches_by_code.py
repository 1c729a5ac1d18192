"""Rows of an audit of a search whose codes, or vectors, are seen."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.apps.audit.hostile_attacks import hostile_attacks
from robusthash.apps.audit.measured_rows import (
    AttackResult,
    AuditExample,
    AuditPlan,
    AuditRow,
    Change,
    Columns,
    CopySearch,
    MeasuredAudit,
    worst_of,
)
from robusthash.apps.audit.photo_collection import STORED_QUALITY
from robusthash.apps.audit.warnings import model_flags, model_warnings
from robusthash.data.transforms import EVERYDAY, jpeg
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.copy_detection import COPIES, calibrated_radius, copies_data, false_matches
from robusthash.evaluation.runner import BlockRunner
from robusthash.models.encoding import encode_searched, encode_signs
from robusthash.models.hasher import Hasher

_BATCH = 32  # images encoded together: foreign models may be large
_BLOCK = 10  # photographs attacked together

_MISSED = "made to be missed, the worst of these for each photograph"
_HIDDEN: Columns = ("hide, worst case", _MISSED, "hardly", "hide-worst")
_TAKEN: Columns = ("imitate, best case", "made to look like another photograph", "hardly", "imitate-worst")

_SAVED = 95  # JPEG quality of what an attacker uploads
_AGAIN = f"the same files, saved again as JPEG {_SAVED}"
_HIDDEN_SAVED: Columns = (f"hide, then JPEG {_SAVED}", _AGAIN, "hardly", "hide-saved")
_TAKEN_SAVED: Columns = (f"imitate, then JPEG {_SAVED}", _AGAIN, "hardly", "imitate-saved")


def measure_codes(plan: AuditPlan, checks: bool = True) -> MeasuredAudit:
    """Measure a search unchanged, under everyday changes and noise, and attacked.

    Args:
        checks: look at the model itself too, and warn.

    Raises:
        ValueError: a target that shows no codes; a budget too small, or a radius out of range.
    """
    target, photos, tier, hasher = plan.target, plan.photos, plan.options.tier, plan.target.hasher
    if hasher is None:
        raise ValueError(f"{target.name} answers ids alone; audit it by them")
    images = plan.images
    if target.endpoint is not None:
        attacked = min(tier.attacked, len(images)) * (tier.questions + 3)
        target.endpoint.check_budget(len(photos) + len(images) * (len(EVERYDAY) + 2) + attacked)
    context = code_context(plan, hasher)
    copies = photos.are_copies(len(images))
    radius, remarks = _radius(plan, context, copies)
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
    return MeasuredAudit(
        (*rows, *attack_rows),
        (search.everyday_example(worst.words, *changed[worst.name]), *attack_examples),
        remarks,
        tuple(model_warnings(target, context, photos)) if checks else (),
        radius,
        false_matches(context, radius, copies),
        model_flags(target, context, plan.options.eps, tier.checked, plan.progress) if checks else (),
    )


def _radius(plan: AuditPlan, context: EvaluationContext, copies: Tensor) -> tuple[float, tuple[str, ...]]:
    """The bits that may differ (the distance of vectors), and a sentence where nobody says how many."""
    bits, distance = context.victim.bits, context.victim.distance
    remarks: tuple[str, ...] = ()
    radius = plan.target.radius if plan.options.radius is None else plan.options.radius
    if radius is None:
        radius = calibrated_radius(context, copies)
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


def code_context(plan: AuditPlan, hasher: Hasher) -> EvaluationContext:
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


def _attack(plan: AuditPlan, search: CopySearch) -> tuple[list[AuditRow], list[AuditExample]]:
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
