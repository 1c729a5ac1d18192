from pathlib import Path

from robusthash.apps.commands.options import AsJson, Recipe, RunsFolder, Sets
from robusthash.apps.commands.terminal import print_json, print_lines, print_table, progress_bars


def train(
    recipe: Recipe, sets: Sets = None, runs: RunsFolder = Path("runs"), as_json: AsJson = False
) -> None:
    """Train the model of a recipe, or go on from its last checkpoint."""
    from robusthash.apps.experiment import training_stages
    from robusthash.apps.experiment.config import load_config

    with progress_bars() as progress:
        run = training_stages.train(load_config(recipe, sets or ()), runs, progress, recipe.parent)
    card = run.card()
    if as_json:
        print_json({"run": str(run.path), **card})
        return
    last = [(name, value) for name, value in card["last"].items() if isinstance(value, float)]
    title = f"{card['name']}: {card['bits']} bits, {card['epochs']} epochs"
    print_table(title, ["last epoch", "value"], last)
    print_lines([run.path])
