"""The audit: a search is asked about photographs as they are, under everyday changes, under noise, and under
attack."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.audit.advice import about_kinds
from robusthash.apps.audit.audit_page import audit_page
from robusthash.apps.audit.categories import Kinds, read_kinds
from robusthash.apps.audit.copy_search import Hostile, Scene
from robusthash.apps.audit.ids_only import ranked_rows
from robusthash.apps.audit.measured_rows import Done, Example, Row, worst_of
from robusthash.apps.audit.photo_collection import STORED_QUALITY, Photos, read_photos
from robusthash.apps.audit.targets import (
    EndpointLimits,
    Target,
    Tier,
    hostile_attacks,
    open_target,
    size_of,
    tier_named,
)
from robusthash.apps.audit.warnings import doubts, warning_lights
from robusthash.apps.experiment.run_directory import write_json
from robusthash.apps.experiment.stages import Progress, silent
from robusthash.core.atomic_files import write_aside
from robusthash.core.runtime import Draws
from robusthash.data.transforms import EVERYDAY, noise
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.copy_detection import COPIES, calibrated_radius, copies_data, false_matches
from robusthash.evaluation.runner import BlockRunner
from robusthash.metrics.results import Flag, software_versions
from robusthash.models.encoding import encode_signs, encode_split
from robusthash.models.hasher import Hasher

_AT_ONCE = 32  # images encoded together: foreign models may be large
_BLOCK = 10  # photographs attacked together
_LOOKED_AT = 8  # photographs on which a model is tried first


def run_audit(
    target: str,
    out: Path,
    photos: Path | None = None,
    *,
    labels: bool = False,
    size: int | None = None,
    bits: int | None = None,
    tier: str | Tier = "fast",
    eps: float = 8 / 255,
    radius: int | None = None,
    limit: int = 1000,
    seed: int = 0,
    limits: EndpointLimits | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Audit a search and write ``report.html`` and ``audit.json`` to ``out``.

    Args:
        target: what is audited; see ``open_target``.
        photos: a folder of the user's own photographs; the twenty of this package by default.
        labels: the subfolders of ``photos`` are kinds; each row then says too how well the other photographs
            of the same kind are found. Attacks are aimed as before, at the photograph itself.
        size: pixels a side that the target is shown; see ``size_of``.
        bits: K where known; found out by default.
        tier: ``smoke``, ``fast``, or one of one's own.
        eps: budget of noise and attacks, L-infinity in pixels of [0, 1].
        radius: bits that may differ between two pictures that count as the same; by default the custom of a
            perceptual hash, else the largest at which at most 1 % of the pairs of different photographs do.
        limit: photographs read at most.

    Returns:
        The content of ``audit.json``.

    Raises:
        ValueError: a broken model (``Broken``), unusable photographs, a budget too small, an unknown tier;
            ``labels`` without two subfolders of two photographs, or at an endpoint whose ids are no files of
            them.
        FileNotFoundError, ImportError: the target, the folder or an extra is missing.
    """
    started = time.perf_counter()
    chosen = tier if isinstance(tier, Tier) else tier_named(tier)
    if not 0 < eps <= 0.5:
        raise ValueError(
            f"eps must lie above 0 and be at most 0.5 of the range, got {eps:g}; write 8/255, not 8"
        )
    side = size_of(target, size)
    read = read_photos(photos, side, limit, seed)
    kinds = read_kinds(read) if labels else None
    opened = open_target(target, read.asking(_LOOKED_AT), bits, limits)
    out.mkdir(parents=True, exist_ok=True)
    if opened.hasher is None:
        found = _Measured(ranked_rows(opened, read, kinds, chosen, eps, seed, progress), ())
    else:
        found = _audit_codes(opened, opened.hasher, read, kinds, chosen, eps, radius, seed, progress)
    summary = {
        "target": target,
        "title": opened.title,
        "said": [*opened.said, *found.said],
        "doubts": list(found.doubts),
        "gradients": opened.gradients,
        "bits": None if opened.hasher is None else opened.hasher.bits,
        "radius": found.radius,
        "matches by": "rank" if opened.radius is None and radius is None else "radius",
        "false matches": found.false_matches,
        "size": side,
        "eps": eps,
        "tier": asdict(chosen),
        "seed": seed,
        "photographs": read.facts(),
        "kinds": None if kinds is None else {**kinds.facts(), "said": about_kinds(found.rows)},
        "rows": [asdict(row) for row in found.rows],
        "flags": [asdict(flag) for flag in found.flags],
        "questions": opened.endpoint.asked if opened.endpoint else None,
        "software": software_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    with write_aside(out / "report.html") as aside:
        aside.write_text(audit_page(summary, found.rows, found.examples, found.flags), encoding="utf-8")
    write_json(out / "audit.json", summary)
    return summary


@dataclass(frozen=True)
class _Measured:
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    said: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    radius: int | None = None
    false_matches: float | None = None
    flags: tuple[Flag, ...] = ()


# ---------------------------------------------------------------------------------------------- searches by
# code


def _audit_codes(
    target: Target,
    hasher: Hasher,
    photos: Photos,
    kinds: Kinds | None,
    tier: Tier,
    eps: float,
    radius: int | None,
    seed: int,
    progress: Progress,
) -> _Measured:
    queries = min(tier.queries, len(photos))
    if target.endpoint is not None:
        target.endpoint.check_budget(
            len(photos) + queries * (len(EVERYDAY) + 2) + min(tier.attacked, queries) * (tier.questions + 2)
        )
    context = _context(hasher, photos, queries, seed, progress)
    said = []
    if radius is None:
        radius = target.radius if target.radius is not None else calibrated_radius(context)
        if target.radius is None:
            said.append(
                f"Nobody has said how many bits may differ between two pictures that count as the same, so the largest "
                f"number was taken at which at most 1 % of the pairs of different photographs do: {radius}."
            )
    if not 0 <= radius < hasher.bits:
        raise ValueError(f"the radius must lie in 0..{hasher.bits - 1} for {hasher.bits} bits, got {radius}")
    scene = Scene(context, photos, radius, None if kinds is None else kinds.stored)
    images = photos.asking(queries)
    rows = [scene.row("unchanged", "nothing", "no", "same", context.query.signs().float(), images)]
    candidates: dict[str, tuple[Tensor, Tensor]] = {}  # (signs, images) of each change
    for number, change in enumerate(EVERYDAY):
        changed = torch.cat([change(part) for part in images.split(_AT_ONCE)])
        candidates[change.name] = (_signs(hasher, changed), changed)
        rows.append(
            scene.row(change.name, change.words, change.visible, "everyday", *candidates[change.name])
        )
        progress(number + 1, len(EVERYDAY), "everyday changes")
    noisy = noise(images, torch.arange(queries), eps, Draws(seed, ("audit",)))
    level = f"{eps * 255:g} of 255 brightness levels"
    candidates["noise"] = (_signs(hasher, noisy), noisy)
    rows.append(scene.row("noise", f"random noise of {level}", "slight grain", "noise", *candidates["noise"]))
    worst = min(
        (row for row in rows if row.kind == "everyday"),
        key=lambda row: (row.first, row.map, -(row.bits or 0)),
    )
    examples = [scene.everyday(worst, *candidates[worst.name])]
    attacks = _attack(target, scene, tier, eps, progress)
    return _Measured(
        (*rows, *attacks.rows),
        (*examples, *attacks.examples),
        tuple(said),
        tuple(doubts(target, context, photos)),
        radius,
        false_matches(context, radius),
        warning_lights(target, context, eps),
    )


def _context(
    hasher: Hasher, photos: Photos, queries: int, seed: int, progress: Progress
) -> EvaluationContext:
    """Made by hand rather than by ``make_context``, whose batches of 256 are large for a foreign model."""
    data = copies_data(
        photos.pixels[:queries], photos.stored, f"stored copies are JPEG files of quality {STORED_QUALITY}"
    )
    both = ("image", "image")
    database = encode_split(
        hasher.for_database(),
        data.database,
        batch_size=_AT_ONCE,
        modality="image",
        progress=lambda done, total: progress(done, total, "encoding the stored copies"),
    )["image"]
    query = encode_split(hasher, data.query, batch_size=_AT_ONCE, modality="image")["image"]
    return EvaluationContext(hasher, data, COPIES, both, data.query, query, database, seed, _BLOCK)


def _signs(hasher: Hasher, images: Tensor) -> Tensor:
    """(Q, K) codes of images."""
    return encode_signs(hasher, "image", images, _AT_ONCE)


# ---------------------------------------------------------------------------------------------- hostile
# changes


@dataclass(frozen=True)
class _Attacks:
    rows: tuple[Row, ...] = ()
    examples: tuple[Example, ...] = ()


def _attack(target: Target, scene: Scene, tier: Tier, eps: float, progress: Progress) -> _Attacks:
    """Run every hostile line on the first photographs; one row for each, and one for the worst of each
    kind."""
    few = scene.first(min(tier.attacked, len(scene.context.queries)))
    runs: list[tuple[AttackSpec, int]] = []
    for line in hostile_attacks(target, tier, eps):
        runs += [(line, restart) for restart in range(line.restarts)]
    if not runs:
        return _Attacks()
    found: dict[bool, list[Hostile]] = {False: [], True: []}
    runner = BlockRunner(few.context)
    for number, (line, restart) in enumerate(runs):

        def shown(block: int, blocks: int, _: str, before: int = number) -> None:
            progress(before * blocks + block, len(runs) * blocks, "attacks")

        found[line.targeted].append(few.hostile(line, restart, runner.queries(line, restart, shown)))
    rows: list[Row] = []
    examples: list[Example] = []
    for targeted, hostile in found.items():
        if not hostile:
            continue
        kind: Done = "imitate" if targeted else "hide"
        if targeted:
            before = few.found(few.context.query.signs().float(), few.context.targets[:, 0])
            rows.append(few.hostile_row("before the attack", "nothing", "imitate", before, few.images))
        who = {"white-box": "has the model", "black-box": f"may only ask it, {tier.questions} times"}
        for each in hostile:
            aim = "pass for another" if targeted else "be missed"
            words = f"made to {aim} by someone who {who[each.line.kind]}"
            rows.append(few.hostile_row(each.name, words, kind, each.found, each.images))
        worst, winner = worst_of([each.found for each in hostile], targeted)
        images = torch.stack([each.images for each in hostile])[winner, torch.arange(len(winner))]
        if targeted:
            words = "made to look like another photograph"
            rows.append(few.hostile_row("imitate, best case", words, "imitate-worst", worst, images))
        else:
            words = "made to be missed, the worst of these for each photograph"
            rows.append(few.hostile_row("hide, worst case", words, "hide-worst", worst, images))
        examples.append(few.attacked(worst, images, targeted, eps))
    return _Attacks(tuple(rows), tuple(examples))
