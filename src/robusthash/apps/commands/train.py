from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robusthash.apps.commands.options import AsJson, Device, Recipe, ResumeFrom, RunsFolder, Sets
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.experiment.config import Config


def train(
    recipe: Recipe,
    sets: Sets = None,
    runs: RunsFolder = Path("runs"),
    resume_from: ResumeFrom = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train the model of a recipe, or go on from its last checkpoint."""
    from robusthash.apps.experiment import training_stages
    from robusthash.apps.experiment.config import load_config
    from robusthash.core.processes import follows

    config = load_config(recipe, sets or ())
    note_continuation(config, resume_from)
    with progress_bars() as progress:
        run = training_stages.train(config, runs, progress, recipe.parent, resume_from)
    if follows():
        return
    card = run.card()
    if as_json:
        print_json({"run": str(run.path), **card})
        return
    last = [(name, value) for name, value in card["last"].items() if isinstance(value, float)]
    title = f"{card['name']}: {card['bits']} bits, {card['epochs']} epochs"
    print_table(title, ["last epoch", "value"], last)
    print_lines([run.path])


def note_continuation(config: Config, resume_from: Path | None) -> None:
    """Say so where a model that goes on from a shorter run is not that of a training from the start."""
    from robusthash.apps.experiment.training_stages import depends_on_total

    if resume_from is not None and (reasons := depends_on_total(config)):
        depends = f"{' and '.join(reasons)} depends on the number of epochs in all"
        note(
            f"{depends}: going on from {resume_from} is another model than training from the start, "
            "with an id of its own"
        )
