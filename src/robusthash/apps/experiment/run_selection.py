"""Runs and saved models by what a command names: paths, folders of runs, registry entries."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.apps.experiment.run_files import CONFIG, without_config
from robusthash.core.registry import nearest
from robusthash.core.runtime import packaged
from robusthash.models.saved_hasher import HUB
from robusthash.robustness.evidence.records import CopyEntry, ModelSource, RegistryEntry, load_any_entry


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Run directories, and a line for each folder that holds results and has lost its config.

    They are those given, and of any other folder given those right below it, else those of the folders of
    recipes in it, by name.

    Raises:
        RunError: a folder that neither is a run directory nor holds one.
    """
    runs: list[Path] = []
    lost: list[str] = []
    for path in paths:
        if (path / CONFIG).is_file():
            runs.append(path)
            continue
        if fault := without_config(path):
            raise RunError(fault)
        for depth in ("*", "*/*"):
            folders = sorted(path.glob(depth))
            below = [folder for folder in folders if (folder / CONFIG).is_file()]
            faults = [fault for folder in folders if (fault := without_config(folder))]
            if below or faults:
                break
        else:
            raise RunError(f"{path} is not a run directory and holds none: it has no {CONFIG}")
        runs += below
        lost += faults
    return runs, lost


def runs_with(has: Callable[[Run], bool], paths: Sequence[Path]) -> tuple[list[Run], list[Run], list[str]]:
    """Runs of ``find_runs``: those that are given themselves or ``has`` holds of, the others, and damage.

    A folder may hold runs that wait for their results, and damaged ones: of these there is a line each. A run
    that is given itself is not left out.

    Raises:
        RunError: as of ``find_runs``, or a run that is given itself and cannot be opened.
    """
    selected, waiting = list[Run](), list[Run]()
    found, damaged = find_runs(paths)
    for path in found:
        if path in paths:
            selected.append(load_run(path))
            continue
        try:
            run = load_run(path)
            if wanted := has(run):
                _read_results(run)
        except (OSError, ValueError, KeyError) as error:
            damaged.append(str(error))
            continue
        (selected if wanted else waiting).append(run)
    return selected, waiting, damaged


def _read_results(run: Run) -> None:
    """Read the card and the results of a run. Raises RunError for one that is damaged."""
    run.card()
    run.checked()
    run.assessed()
    if run.was_evaluated:
        run.evaluated()


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


REGISTRY, RUNS = Path("registry"), Path("runs")


def name_of_recipe(source: ModelSource) -> str:
    """The name of the runs that a recipe makes; of one that is not here, the name of its file."""
    path = Path(source.recipe)
    return load_config(path, source.set).name if path.is_file() else path.stem


def training_command(source: ModelSource) -> str:
    """The command that makes the model of an entry again."""
    overrides = [word for each in (f"runtime.seed={source.seed}", *source.set) for word in ("--set", each)]
    return shlex.join(["robusthash", "train", source.recipe, *overrides])


def entry_named(name: str) -> RegistryEntry | CopyEntry:
    """A registry entry by its id in ``registry/``, or the path of its file; RunError where there is none."""
    path = Path(name) if name.endswith(".yaml") else REGISTRY / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in REGISTRY.glob("*.yaml"))
        hint = nearest(name, known) if known else f"; there is no {REGISTRY}/ here to look a name up in"
        raise RunError(f"{name!r} is neither a run, an exported model nor a registry entry{hint}")
    return load_any_entry(path)


def folder_of_entry(entry: CopyEntry) -> Path:
    """The folder of a hash for copies; RunError where it is not there, or holds other weights."""
    folder = packaged(entry.model)
    file = folder / HUB.weights
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"
    if found != entry.weights:
        raise RunError(f"{file} holds the weights {found}, and the entry {entry.id} is of {entry.weights}")
    return folder


def run_of_entry(entry: RegistryEntry) -> Run:
    """The run in ``runs/`` with the weights of a registry entry.

    Raises:
        RunError: no run with its weights; the message says how to make it.
    """
    source, close, recipe_name = entry.source, "", name_of_recipe(entry.source)
    for card in sorted(RUNS.glob("*/*/model.json")):
        run = load_run(card.parent)
        if source.digest and run.card().get("digest") == source.digest:
            return run
        if run.config.name == recipe_name and run.config.runtime.seed == source.seed:
            if not source.digest:
                return run
            close = f" ({run.path} is of this recipe and seed with other weights, {run.card().get('digest')})"
    raise RunError(
        f"the weights {source.digest} of the entry {entry.id} are in no run of {RUNS}/{close}; train it, "
        f"'{training_command(source)}', and load that run"
    )
