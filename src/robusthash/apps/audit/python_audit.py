"""The audit in Python: of a net in memory, or of anything that ``robusthash audit`` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.targets import AuditOptions, tier_named
from robusthash.apps.experiment.search_model import SearchModel
from robusthash.core.runtime import Progress, silent
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
    effort = tier_named(tier)
    effort = replace(effort, queries=queries or effort.queries, attacked=attacked or effort.attacked)
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
