"""Models of the registry: the runs or folders with their weights, and the commands that train them."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.core.registry import nearest
from robusthash.core.runtime import packaged
from robusthash.models.saved_hasher import HUB
from robusthash.robustness.evidence.records import CopyEntry, ModelSource, RegistryEntry, load_any_entry

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
