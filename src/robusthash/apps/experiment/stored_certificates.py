"""Certificates that a run holds, and their numbers as tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_files import RunError, reading
from robusthash.core.limited_files import read_json
from robusthash.metrics.results import Setting

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
