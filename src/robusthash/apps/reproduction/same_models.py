"""Models that lie under another name: the same training, evaluated otherwise, is not trained twice."""

from __future__ import annotations

import shutil
from pathlib import Path

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.model_card import sealed
from robusthash.apps.experiment.run_directory import Run, RunError, accept, load_run, write_json
from robusthash.apps.reproduction.entry_runs import identity_of
from robusthash.core.atomic_files import write_aside
from robusthash.core.limited_files import read_json

_WEIGHTS = ("hasher.safetensors", "objective.safetensors", "database.npz")
_FACTS = ("data.json", "environment.json", "texts.json", "log.jsonl")


def take_over_model(config: Config, runs: Path) -> Run | None:
    """Copy the trained model of a config that lies in ``runs`` under another name, if one does.

    The id of a run holds data, hasher, training, seed and ancestor, not the name: a copy under the id of the
    other is the run that training would make. It has no results.
    """
    for folder in sorted(runs.glob("*/*")):
        target = runs / config.name / folder.name
        if not (folder / "model.json").is_file() or target.exists():
            continue
        try:
            other = load_run(folder)
            if other.results_only or not _same(config, other.config):
                continue
            other.check_weights()
        except (RunError, ValueError):  # a damaged run: training makes another
            continue
        return _copied(other, Run(target, config))
    return None


def _same(config: Config, other: Config) -> bool:
    """True for one model under two names, of the same data in the same place."""
    named = other.model_copy(update={"name": config.name})
    same_seed = config.runtime.seed == other.runtime.seed
    return same_seed and config.data == other.data and identity_of(config) == identity_of(named)


def _copied(other: Run, run: Run) -> Run:
    """The model of ``other`` as a run of its own; the model card comes last, as in training."""
    (run.path / "checkpoint").mkdir(parents=True)
    files = [f"checkpoint/{name}" for name in _WEIGHTS] + list(_FACTS)
    for name in files:
        if (other.path / name).is_file():
            with write_aside(run.path / name) as aside:
                shutil.copyfile(other.path / name, aside)
    accept(run)
    card = {**read_json(other.path / "model.json"), "name": run.config.name}
    write_json(run.path / "model.json", sealed(card))
    return run
