from pathlib import Path

from robusthash.apps.commands.options import AsJson, Device, Recipe, ResumeFrom, RunsFolder, Sets
from robusthash.apps.commands.terminal import progress_bars


def run(
    recipe: Recipe,
    sets: Sets = None,
    runs: RunsFolder = Path("runs"),
    resume_from: ResumeFrom = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and report one recipe; goes on where it was stopped, and skips what is done."""
    from robusthash.apps.commands.evaluate_command import print_evaluation
    from robusthash.apps.commands.train import note_continuation
    from robusthash.apps.experiment.config import load_config
    from robusthash.apps.experiment.training_stages import run_all
    from robusthash.core.processes import follows

    config = load_config(recipe, sets or ())
    note_continuation(config, resume_from)
    with progress_bars() as progress:
        finished = run_all(config, runs, progress, recipe.parent, resume_from)
    if not follows():
        print_evaluation(finished.path, as_json)
