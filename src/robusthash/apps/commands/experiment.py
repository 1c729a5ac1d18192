"""The verbs of an experiment: demo, run, train, encode, evaluate, attack and report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robusthash.apps.commands.show_results import plain, show_results, show_table
from robusthash.apps.commands.terminal import AsJson, RunPath, console, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.experiment.config import Config

Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override by path, e.g. training.epochs=2. Repeatable.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]


def _config(recipe: Path, sets: list[str] | None) -> Config:
    from robusthash.apps.experiment.config import load_config

    return load_config(recipe, sets or ())


def demo(
    out: Annotated[Path, typer.Option(help="Where the report and all else is written.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of training and attacks.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on real photographs: a search that works, broken, hardened, measured. A few minutes."""
    from robusthash.apps.experiment.demo_run import run_demo, summary_rows

    with progress_bars() as progress:
        summary = run_demo(out, progress, seed=seed)
    if as_json:
        print_json(summary)
        return
    print_table("MAP on photos, attacks at 8/255", *summary_rows(summary))
    console.print(f"report: {out / 'report.html'}")


def run_command(
    recipe: Recipe, sets: Sets = None, runs: Runs = Path("runs"), as_json: AsJson = False
) -> None:
    """Train, evaluate and report one recipe; goes on where it was stopped, and skips what is done."""
    from robusthash.apps.experiment.stages import run_all

    with progress_bars() as progress:
        run = run_all(_config(recipe, sets), runs, progress, recipe.parent)
    show_results(run.path, as_json)


def train(recipe: Recipe, sets: Sets = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Train the model of a recipe, or go on from its last checkpoint."""
    from robusthash.apps.experiment import stages

    with progress_bars() as progress:
        run = stages.train(_config(recipe, sets), runs, progress, recipe.parent)
    card = run.card()
    if as_json:
        print_json({"run": str(run.path), **card})
        return
    last = {name: value for name, value in card["last"].items() if isinstance(value, float)}
    print_table(
        f"{card['name']}: {card['bits']} bits, {card['epochs']} epochs",
        ["last epoch", "value"],
        list(map(list, last.items())),
    )
    sys.stdout.write(f"{run.path}\n")


def encode(run: RunPath, as_json: AsJson = False) -> None:
    """Write the packed codes of every split of a run."""
    from robusthash.apps.experiment import stages
    from robusthash.apps.experiment.run_directory import load_run

    with progress_bars() as progress:
        written = stages.encode(load_run(run), progress)
    if as_json:
        print_json({name: str(path) for name, path in written.items()})
        return
    for path in written.values():
        sys.stdout.write(f"{path}\n")


def evaluate(
    run: RunPath,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Attack as YAML instead of the recipe's, e.g. '{name: hag, steps: 50}'."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained run clean, under each attack, and in the worst case per query."""
    from robusthash.apps.experiment import stages
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.run_directory import load_run

    chosen = [value_of(text) for text in attack or ()] or None
    with progress_bars() as progress:
        stages.evaluate(load_run(run), progress, chosen)
    show_results(run, as_json)


def attack_command(
    run: RunPath,
    name: Annotated[
        str, typer.Argument(help="Attack, as YAML or by name: mainstay, '{name: hag, eps: 4/255}'.")
    ],
    out: Annotated[
        Path, typer.Option(help="Write the attacked queries here (.npz: inputs float32, codes, labels).")
    ],
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and keep the attacked inputs."""
    from robusthash.apps.experiment import stages
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.run_directory import load_run

    with progress_bars() as progress:
        result = stages.attack_to_file(load_run(run), value_of(name), out, progress)
    if as_json:
        print_json({"out": str(out), **plain(result)})
        return
    show_table({result.setting.attacks[0]: result})
    sys.stdout.write(f"{out}\n")


def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write report.html of an evaluated run."""
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.run_report import write_report

    path = write_report(load_run(run))
    if as_json:
        print_json({"report": str(path)})
        return
    sys.stdout.write(f"{path}\n")
