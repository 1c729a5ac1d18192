"""Runs by the paths of a command line: those of folders, and names that tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from robusthash.apps.experiment.run_directory import Run, RunError, load_run


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories: those given, and those right below any other folder given, by name.

    Raises:
        RunError: a folder that neither is a run directory nor holds one.
    """
    runs: list[Path] = []
    for path in paths:
        is_run = (path / "config.yaml").is_file()
        below = [path] if is_run else sorted(config.parent for config in path.glob("*/config.yaml"))
        if not below:
            deeper = next(path.glob("*/*/config.yaml"), None)
            hint = "" if deeper is None else f"; give the folders in it that do, such as {deeper.parents[1]}"
            raise RunError(f"{path} is not a run directory and holds none: it has no config.yaml{hint}")
        runs += below
    return runs


def runs_with(has: Callable[[Run], bool], paths: Sequence[Path]) -> tuple[list[Run], list[Run]]:
    """Runs of ``find_runs``: first those that are given themselves or ``has`` holds of, then the others.

    So a folder may hold runs that wait for their results, and a run that is given itself is not left out.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    selected = [run for run in runs if run.path in paths or has(run)]
    return selected, [run for run in runs if run not in selected]


def labelled(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs by the names of figures and tables: their recipe, with the run's id where a recipe comes twice.

    Raises:
        ValueError: no run, or one run twice.
    """
    runs = [load_run(path) for path in paths]
    if not runs:
        raise ValueError("name at least one run directory")
    names = [run.config.name for run in runs]
    ids = [run.path.resolve().name for run in runs]
    labels = [n if names.count(n) == 1 else f"{n}/{i}" for n, i in zip(names, ids, strict=True)]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the run {repeated[0]} is named twice")
    return dict(zip(labels, runs, strict=True))
