"""Evaluated results as the verbs show them: headline tables on stderr, plain data for ``--json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robusthash.apps.commands.terminal import print_json, print_table

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult


def result_of(run: Path, name: str) -> EvalResult:
    """One result of a run, of its evaluation or of a suite.

    Raises:
        ValueError: no such result; the nearest name is offered.
    """
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.core.registry import nearest

    results = load_run(run).results()
    if name not in results:
        raise ValueError(f"{run} has no result {name!r}{nearest(name, results)}")
    return results[name]


def plain(result: EvalResult) -> dict[str, Any]:
    """A result as plain data, without its arrays."""
    from dataclasses import asdict

    numbers = {
        name: getattr(result, name) for name in ("values", "reference", "representative", "perceptibility")
    }
    rest = {
        "interval": result.interval,
        "empty": result.empty,
        "notes": result.notes,
        "attacks": result.attacks,
    }
    return {"setting": asdict(result.setting), "cost": asdict(result.cost), **numbers, **rest}


def show_results(run: Path, as_json: bool) -> None:
    """All results of the evaluation of a run, and its path on stdout."""
    from robusthash.apps.experiment.run_directory import load_run

    results = load_run(run).evaluated()
    if as_json:
        print_json({"run": str(run), "results": {name: plain(result) for name, result in results.items()}})
        return
    show_table(results)
    sys.stdout.write(f"{run}\n")


def show_table(results: Mapping[str, EvalResult]) -> None:
    """The headline of each result beside clean and chance."""
    from robusthash.metrics.results import headline_of

    rows: list[list[Any]] = []
    for name, result in results.items():
        headline = headline_of(result)
        low, high = result.interval.get(headline, (float("nan"),) * 2)
        reference = result.reference.get("clean")
        rows.append(
            [
                name,
                headline,
                result.values[headline],
                f"{low:.4f} .. {high:.4f}",
                "" if reference is None else f"{reference:.4f}",
                f"{result.reference.get('chance', float('nan')):.4f}",
            ]
        )
    chosen = next(iter(results.values())).setting.chosen
    title = "results" if chosen in ("", "all") else f"results, queries: {chosen}"
    print_table(title, ["queries", "measure", "value", "95 % interval", "clean", "chance"], rows)
