"""Certificates of a run: made by ``robusthash certify``, stored with the votes, and as tables show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment.evaluation_stages import loaded_context
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_files import RunError, reading, write_json
from robusthash.core.atomic_files import write_arrays
from robusthash.core.identity import identity
from robusthash.core.limited_files import read_json, read_npz
from robusthash.core.processes import owned_together
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.context import EvaluationContext
from robusthash.metrics.results import Setting
from robusthash.robustness.certificates.certified_map import Method, certify, checked_budgets


@dataclass(frozen=True)
class TensorFolder:
    """Small tensors as files of a folder, each complete or not there."""

    root: Path

    def __call__(self, name: str, work: Callable[[], Tensor]) -> Tensor:
        path = self.root / f"{name}.npz"
        if path.is_file():
            with reading(path, "delete the file to compute it again"):
                return torch.from_numpy(read_npz(path, ("values",))["values"])
        values = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, values=values.numpy())
        return values


def certify_run(
    run: Run,
    method: Method = "smoothing",
    *,
    queries: int | None = 100,
    direction: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Certify a run, or go on where it was stopped, and add the result to its ``certified.json``.

    Of a kept copy, which has no weights, the stored certificate of the same method and noise is read.

    Args:
        method, queries, options: as of ``certify``.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.

    Returns:
        The certificate as plain data, with the ``recipe`` and the digest of the ``model``.

    Raises:
        InUse: another process certifies the run.
        RunError: a kept copy without it; an earlier ``certified.json`` that cannot be read.
    """
    if run.results_only:
        return _stored(run, method, direction, options)
    checked_budgets(method, **options)  # before data are read and encoded
    with owned_together(run.path, "certification"):
        others = certificates(run)
        context = loaded_context(run, progress, direction, queries)
        folder = TensorFolder(run.path / "certificates" / _identity(run, context, method, options))
        result = certify(context, method, queries=None, kept=folder, progress=progress, **options).plain()
        result["name"] = f"{direction or ''} {result['name']}".strip()
        result |= {"recipe": run.config.name, "model": run.card()["digest"]}
        write_json(run.path / CERTIFIED, {**others, result["name"]: result})
    return result


def _stored(run: Run, method: Method, direction: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    sigma = f" {options.get('sigma', 0.25):g}" if method == "smoothing" else ""
    name, held = f"{direction or ''} {method}{sigma}".strip(), certificates(run)
    if name not in held:
        has = f"it has {', '.join(held)}" if held else "it has none"
        raise RunError(
            f"{run.path} is a kept copy without the certificate {name!r} ({has}); "
            "give the run that it was made of"
        )
    return held[name]


def _identity(run: Run, context: EvaluationContext, method: Method, options: Mapping[str, Any]) -> str:
    """Digest of all that votes and codes depend on, but attack and budget: those name the files."""
    noise = [options.get("sigma", 0.25), options.get("samples", 1000)] if method == "smoothing" else []
    items = [context.queries.fingerprint(), context.data.database.fingerprint(), context.direction]
    return identity([run.card()["digest"], method, noise, items, context.seed])


CERTIFIED = "certified.json"

COLUMN = (
    "Certified to attacked: of the smoothed codes (or by interval bounds), within the budget that is named, "
    "the MAP that no attack goes below and the lowest that one reached; '?' where none was run. That is "
    "another budget and another search than those of the worst case beside it."
)
"""Explains the column of these intervals in a table."""


def certificates(run: Run) -> dict[str, dict[str, Any]]:
    """The certificates of a run by name, ``smoothing 0.25`` or ``intervals``; none without the file.

    Raises:
        RunError: a file that cannot be read, or is of other weights.
    """
    path, again = run.path / CERTIFIED, f"delete it, then: robusthash certify {run.path}"
    if not path.is_file():
        return {}
    with reading(path, again):
        held: dict[str, dict[str, Any]] = read_json(path)
        for each in held.values():
            _ = [(row["radius"], row["certified"], row["attacked"]) for row in each["rows"]]
            _ = each["model"], each["direction"], each["method"], each["norm"]
    if run.trained and any(each["model"] != run.card()["digest"] for each in held.values()):
        raise RunError(f"{path} is of other weights than those of the run; {again}")
    return held


def by_radius(certificate: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Certified and attacked MAP by budget: ``l2 0.25``, ``linf 1/255``."""
    return {
        f"{certificate['norm']} {radius_text(certificate['norm'], row['radius'])}": (
            row["certified"],
            row["attacked"],
        )
        for row in certificate["rows"]
    }


def method_text(certificate: Mapping[str, Any]) -> str:
    """``smoothing 0.25``, or ``intervals``."""
    sigma = certificate["sigma"]
    return f"{certificate['method']} {sigma:g}" if sigma else str(certificate["method"])


def radius_text(norm: str, radius: float) -> str:
    """``0.25``; of L-inf in 255ths: ``1/255``."""
    return f"{radius * 255:.4g}/255" if norm == "linf" else f"{radius:g}"


def interval_text(certified: float, attacked: float | None) -> str:
    """``0.412 to 0.655``: no attack goes below the first, and one of the suite reached the second."""
    return f"{certified:.3f} to {'?' if attacked is None else f'{attacked:.3f}'}"


def certified_intervals(runs: Sequence[Run], setting: Setting) -> dict[str, tuple[float, float | None]]:
    """Certified and attacked MAP by method and budget, means over the runs; what all of them have.

    Such as ``{"smoothing 0.25, l2 0.5": (0.412, 0.655)}``; without an attack the second is None. Certificates
    are by the labels of the data set, and none goes with results by other labels.
    """
    if setting.relevance != "own":
        return {}
    held = [
        {
            f"{method_text(each)}, {budget}": values
            for each in certificates(run).values()
            if each["direction"] == setting.direction
            for budget, values in by_radius(each).items()
        }
        for run in runs
    ]
    shared = [name for name in held[0] if all(name in other for other in held)]
    return {name: _mean([each[name] for each in held]) for name in shared}


def certified_text(intervals: Mapping[str, tuple[float, float | None]]) -> str:
    """Intervals in a line: ``smoothing 0.25, l2 0.5: 0.412 to 0.655; ...``; a dash where there is none."""
    return "; ".join(f"{name}: {interval_text(*values)}" for name, values in intervals.items()) or "-"


def _mean(values: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    low = [certified for certified, _ in values]
    high = [attacked for _, attacked in values if attacked is not None]
    whole = len(high) == len(values)
    return sum(low) / len(low), sum(high) / len(high) if whole else None
