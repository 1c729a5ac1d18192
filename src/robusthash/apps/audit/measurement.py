"""The audit: a search is measured on photographs as they are, under everyday changes, noise and attacks."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from robusthash.apps.audit.audit_page import audit_page, category_sentence
from robusthash.apps.audit.measured_rows import AuditPlan, MeasuredAudit
from robusthash.apps.audit.photo_collection import read_categories, read_photos
from robusthash.apps.audit.replacement import (
    Replacement,
    check_replacement,
    is_copy_hash,
    measure_replacement,
    without_numbers,
)
from robusthash.apps.audit.searches_by_code import measure_codes
from robusthash.apps.audit.searches_by_ids import measure_ids
from robusthash.apps.audit.targets import AuditOptions, open_target, size_of, tier_named
from robusthash.apps.audit.verdict import idle_attacks, verdict
from robusthash.apps.experiment.run_directory import write_json
from robusthash.apps.experiment.search_model import SearchModel
from robusthash.apps.image_hash.copy_hash import NAME, RADIUS
from robusthash.core.atomic_files import write_text
from robusthash.core.runtime import Progress, packaged, silent
from robusthash.metrics.results import software_versions
from robusthash.models.hasher import frozen


def audit(
    target: str | Path | nn.Module | SearchModel,
    photos: str | Path | None = None,
    *,
    out: str | Path = "audit",
    tier: str = "fast",
    queries: int | None = None,
    attacked: int | None = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Audit a search on photographs, and write ``report.html`` and ``audit.json``.

    Args:
        target: a net, as it is (from images in [0, 1] to (B, K)) or as ``wrap`` made it; a model that was
            loaded; or what the command line takes: a run, ``module:name``, a model file, an address,
            ``phash`` and the like. The same net gives the same numbers every way.
        photos: a folder of photographs; the twenty of this package by default.
        out: folder of the page.
        tier: ``smoke`` (seconds) or ``fast`` (minutes).
        queries, attacked: photographs that are searched for, and those of them that are attacked.
        options: other fields of ``AuditOptions``: ``size``, ``bits``, ``eps``, ``radius``, ``seed``, ...

    Returns:
        The content of ``audit.json``; ``rows`` has a row for each change and attack, ``doubts`` the warnings.

    Raises:
        ValueError: an option of no meaning; and see ``run_audit``.
    """
    effort = tier_named(tier, queries, attacked)
    if unknown := sorted(set(options) - set(AuditOptions.__dataclass_fields__)):
        known = ", ".join(AuditOptions.__dataclass_fields__)
        raise ValueError(f"an audit takes no {unknown[0]!r}; its options are {known}")
    if isinstance(target, SearchModel):
        target, options = target.hasher, {"size": target.side, **options}
    folder, audit_options = None if photos is None else Path(photos), AuditOptions(tier=effort, **options)
    if not isinstance(target, nn.Module):
        return run_audit(str(target), Path(out), folder, audit_options, progress)
    with frozen(target):  # its modes and flags are as before afterwards
        return run_audit(target, Path(out), folder, audit_options, progress)


_TRIED = 8  # photographs on which a model is tried first


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
    if is_copy_hash(target):
        target, options = str(packaged(NAME)), _as_replacement(options)
    size = size_of(target, options.size)
    collection = read_photos(photos, size, options.limit, options.seed, options.max_pixels)
    categories = read_categories(collection) if options.labels else None
    answers_file = out / "answers.jsonl"
    few = collection.first(_TRIED)
    opened = open_target(target, few, options.bits, options.limits, options.reading, answers_file)
    compared = check_replacement(opened, options)
    if opened.endpoint is not None:
        opened.endpoint.progress = progress
    out.mkdir(parents=True, exist_ok=True)
    plan = AuditPlan(opened, collection, categories, options, progress)
    measured = MeasuredAudit(measure_ids(plan)) if opened.hasher is None else measure_codes(plan)
    summary = _summary(plan, measured)
    level, alarm = summary["verdict"]["level"], summary["verdict"]["alarm"]
    replacement = None if compared else without_numbers(opened, options, level)
    _write(out, summary, measured, replacement, started)
    if opened.endpoint is not None:
        opened.endpoint.forget()  # another audit asks again: the search may have changed
    if compared:  # the audit is written before, so that a kill from here on takes nothing of it
        _write(out, summary, measured, measure_replacement(plan, measured, alarm), started)
    return summary


def _as_replacement(options: AuditOptions) -> AuditOptions:
    """Options for the packaged hash itself, within its own radius, and with nothing to replace it."""
    if options.replacement:
        raise ValueError(f"{NAME} is the replacement itself; leave --replacement out")
    radius = RADIUS[256] if options.radius is None else options.radius
    return replace(options, radius=radius, replacement=False)


def _write(
    out: Path,
    summary: dict[str, Any],
    measured: MeasuredAudit,
    replacement: Replacement | None,
    started: float,
) -> None:
    """Write the page and the JSON, the replacement noted in ``summary``."""
    summary["replacement"] = None if replacement is None else replacement.plain()
    summary["seconds"] = round(time.perf_counter() - started, 1)
    page = audit_page(summary, measured.rows, measured.examples, measured.flags)
    write_text(out / "report.html", page)
    write_json(out / "audit.json", summary)


def _summary(plan: AuditPlan, measured: MeasuredAudit) -> dict[str, Any]:
    """The content of ``audit.json``, but for the replacement and the time."""
    opened, options, categories = plan.target, plan.options, plan.categories
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
        "size": plan.photos.pixels.shape[-1],
        "eps": options.eps,
        "tier": asdict(options.tier),
        "seed": options.seed,
        "photographs": plan.photos.facts(),
        "kinds": categories and {**categories.facts(), "said": category_sentence(measured.rows)},
        "rows": [asdict(row) for row in measured.rows],
        "got nowhere": idle_attacks(measured.rows),
        "flags": [asdict(flag) for flag in measured.flags],
        "questions": opened.endpoint.requests_sent if opened.endpoint else None,
        "software": software_versions(),
    }
    summary["verdict"] = asdict(verdict(summary, measured.rows, measured.flags))
    return summary
