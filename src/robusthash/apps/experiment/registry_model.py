"""Models of the registry: the runs with their weights, and the commands that train them."""

from __future__ import annotations

import shlex
from pathlib import Path

from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.core.registry import nearest
from robusthash.robustness.evidence.records import ModelSource, load_entry

REGISTRY, RUNS = Path("registry"), Path("runs")


def name_of_recipe(source: ModelSource) -> str:
    """The name of the runs that a recipe makes; of one that is not here, the name of its file."""
    path = Path(source.recipe)
    return load_config(path, source.set).name if path.is_file() else path.stem


def training_command(source: ModelSource) -> str:
    """The command that makes the model of an entry again."""
    overrides = [word for each in (f"runtime.seed={source.seed}", *source.set) for word in ("--set", each)]
    return shlex.join(["robusthash", "train", source.recipe, *overrides])


def run_of_entry(name: str) -> Run:
    """The run with the weights of a registry entry.

    Args:
        name: id of an entry in ``registry/``, or the path of its file; its run is looked for in ``runs/``.

    Raises:
        RunError: no such entry, or no run with its weights; the message says how to make it.
    """
    path = Path(name) if name.endswith(".yaml") else REGISTRY / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in REGISTRY.glob("*.yaml"))
        hint = nearest(name, known) if known else f"; there is no {REGISTRY}/ here to look a name up in"
        raise RunError(f"{name!r} is neither a run, an exported model nor a registry entry{hint}")
    entry = load_entry(path)
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
