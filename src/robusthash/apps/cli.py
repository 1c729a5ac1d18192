"""Verbs -> stages. Tables and progress go to stderr, ``--json`` data to stdout; an error is one line, no trace."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robusthash.apps.verbs import audit, blackbox, catalogue, checks, database, evidence, index, study, suite
from robusthash.apps.verbs.terminal import AsJson, console, escape, print_json, print_table, progress_bars
from robusthash.version import __version__

if TYPE_CHECKING:
    from robusthash.apps.config import Config
    from robusthash.evaluation.results import EvalResult

app = typer.Typer(
    help="Train, attack, defend, measure and serve search by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

EXPERIMENTS = "Experiments"

Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
RunPath = Annotated[Path, typer.Argument(help="Run directory, as `train` and `run` print it.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override by path, e.g. training.epochs=2. Repeatable.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]


def main() -> None:
    """Entry point: an error that a user can mend is one line and exit code 1, a usage error 2, Ctrl-C 130."""
    previous = signal.signal(signal.SIGINT, _stopped)
    try:
        app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        console.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, previous)


def _stopped(signum: int, frame: FrameType | None) -> None:
    console.print("stopped; the same command goes on from the last checkpoint")
    sys.exit(130)


def _config(recipe: Path, sets: list[str] | None) -> Config:
    from robusthash.apps.config import load_config

    return load_config(recipe, sets or ())


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        sys.stdout.write(f"robusthash {__version__}\n")
        raise typer.Exit


@app.command(rich_help_panel=EXPERIMENTS)
def demo(
    out: Annotated[Path, typer.Option(help="Where the report and all else is written.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of training and attacks.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The whole story on real photographs: a search that works, broken, hardened, measured. A few minutes."""
    from robusthash.apps.demo import run_demo, summary_rows

    with progress_bars() as shown:
        summary = run_demo(out, shown, seed=seed)
    if as_json:
        print_json(summary)
        return
    print_table("MAP on photos, attacks at 8/255", *summary_rows(summary))
    console.print(f"report: {out / 'report.html'}")


@app.command("run", rich_help_panel=EXPERIMENTS)
def run_command(recipe: Recipe, sets: Sets = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Train, evaluate and report one recipe; goes on where it was stopped, and skips what is done."""
    from robusthash.apps.stages import run_all

    with progress_bars() as shown:
        run = run_all(_config(recipe, sets), runs, shown, recipe.parent)
    _show_results(run.path, as_json)


@app.command(rich_help_panel=EXPERIMENTS)
def train(recipe: Recipe, sets: Sets = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Train the model of a recipe, or go on from its last checkpoint."""
    from robusthash.apps import stages

    with progress_bars() as shown:
        run = stages.train(_config(recipe, sets), runs, shown, recipe.parent)
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


@app.command(rich_help_panel=EXPERIMENTS)
def encode(run: RunPath, as_json: AsJson = False) -> None:
    """Write the packed codes of every split of a run."""
    from robusthash.apps import stages
    from robusthash.apps.runs import load_run

    with progress_bars() as shown:
        written = stages.encode(load_run(run), shown)
    if as_json:
        print_json({name: str(path) for name, path in written.items()})
        return
    for path in written.values():
        sys.stdout.write(f"{path}\n")


@app.command(rich_help_panel=EXPERIMENTS)
def evaluate(
    run: RunPath,
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack as YAML instead of the recipe's, e.g. '{name: hag, steps: 50}'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained run clean, under each attack, and in the worst case per query."""
    import yaml

    from robusthash.apps import stages
    from robusthash.apps.config import numbers
    from robusthash.apps.runs import load_run

    chosen = [numbers(yaml.safe_load(text)) for text in attack or ()] or None
    with progress_bars() as shown:
        stages.evaluate(load_run(run), shown, chosen)
    _show_results(run, as_json)


@app.command("attack", rich_help_panel=EXPERIMENTS)
def attack_command(
    run: RunPath,
    name: Annotated[str, typer.Argument(help="Attack, as YAML or by name: mainstay, '{name: hag, eps: 4/255}'.")],
    out: Annotated[Path, typer.Option(help="Write the attacked queries here (.npz: inputs float32, codes, labels).")],
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and keep the attacked inputs."""
    import yaml

    from robusthash.apps import stages
    from robusthash.apps.config import numbers
    from robusthash.apps.runs import load_run

    with progress_bars() as shown:
        result = stages.attack_to_file(load_run(run), numbers(yaml.safe_load(name)), out, shown)
    if as_json:
        print_json({"out": str(out), **_plain(result)})
        return
    _show_table({result.setting.attacks[0]: result})
    sys.stdout.write(f"{out}\n")


@app.command(rich_help_panel=EXPERIMENTS)
def score(
    query: Annotated[Path, typer.Argument(help="Query codes (.npz).")],
    database: Annotated[Path, typer.Argument(help="Database codes (.npz).")],
    protocol: Annotated[str, typer.Option(help="Protocol by name; see `robusthash list protocol`.")] = "house",
    as_json: AsJson = False,
) -> None:
    """Score codes made by any program: every measure of the protocol, exact under ties.

    Each file holds `codes` (N, K) in -1/+1 or 0/1, or packed uint8 with `bits`; and `labels`, (N,) classes or (N, C)
    multi-hot.
    """
    from robusthash.evaluation.score import read_codes
    from robusthash.evaluation.score import score as score_codes

    result = score_codes(read_codes(query), read_codes(database), protocol)
    if as_json:
        print_json(_plain(result))
        return
    print_table(
        f"{protocol}: {result.setting.queries} against {result.setting.database}",
        ["measure", "value", "95 % interval"],
        [
            [n, v, "{:.4f} .. {:.4f}".format(*result.interval[n]) if n in result.interval else ""]
            for n, v in result.values.items()
        ],
    )
    print_table("reference", ["", "value"], [[n, v] for n, v in result.reference.items()])
    for note in result.notes:
        console.print(note)


@app.command(rich_help_panel=EXPERIMENTS)
def compare(
    first: RunPath,
    second: RunPath,
    result: Annotated[
        str, typer.Option(help="Which result of both runs: clean, an attack's name, or worst.")
    ] = "worst",
    as_json: AsJson = False,
) -> None:
    """Paired differences of two runs (first minus second); refused where more than the model differs."""
    from dataclasses import asdict

    from robusthash.evaluation.results import compare as compare_results

    differences = compare_results(_result(first, result), _result(second, result))
    if as_json:
        print_json({name: asdict(difference) for name, difference in differences.items()})
        return
    print_table(
        f"{result}: {first} minus {second}",
        ["measure", "difference", "95 % interval", "p (Holm)", "queries"],
        [[n, d.mean, "{:+.4f} .. {:+.4f}".format(*d.interval), d.p_holm, d.queries] for n, d in differences.items()],
    )


@app.command(rich_help_panel=EXPERIMENTS)
def table(
    paths: Annotated[list[Path], typer.Argument(help="Run directories; runs of one recipe are its seeds.")],
    column: Annotated[
        list[str] | None, typer.Option(help="Result to show: clean, mainstay, worst. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One Markdown table of several runs, with intervals over seeds and queries."""
    from dataclasses import asdict

    from robusthash.apps.tables import make_rows, markdown

    rows = make_rows(paths)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    sys.stdout.write(markdown(rows, column) + "\n")


@app.command(rich_help_panel=EXPERIMENTS)
def report(run: RunPath, as_json: AsJson = False) -> None:
    """Write report.html of an evaluated run."""
    from robusthash.apps.pages.report import write_report
    from robusthash.apps.runs import load_run

    path = write_report(load_run(run))
    if as_json:
        print_json({"report": str(path)})
        return
    sys.stdout.write(f"{path}\n")


def _results(run: Path) -> dict[str, EvalResult]:
    from robusthash.evaluation.results import load_results

    path = run / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{run} has not been evaluated; run 'robusthash evaluate {run}' first")
    return {result.name: result for result in load_results(path)}


def _result(run: Path, name: str) -> EvalResult:
    from robusthash.core.registry import nearest

    results = _results(run)
    if name not in results:
        raise ValueError(f"{run} has no result {name!r}{nearest(name, results)}")
    return results[name]


def _plain(result: EvalResult) -> dict[str, Any]:
    """A result as plain data, without its arrays."""
    from dataclasses import asdict

    numbers = {name: getattr(result, name) for name in ("values", "reference", "representative", "perceptibility")}
    rest = {"interval": result.interval, "empty": result.empty, "notes": result.notes, "attacks": result.attacks}
    return {"setting": asdict(result.setting), "cost": asdict(result.cost), **numbers, **rest}


def _show_results(run: Path, as_json: bool) -> None:
    results = _results(run)
    if as_json:
        print_json({"run": str(run), "results": {name: _plain(result) for name, result in results.items()}})
        return
    _show_table(results)
    sys.stdout.write(f"{run}\n")


def _show_table(results: Mapping[str, EvalResult]) -> None:
    from robusthash.apps.tables import headline_of

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
    print_table("results", ["queries", "measure", "value", "95 % interval", "clean", "chance"], rows)


for panel, verbs in {
    "Numbers that hold": (
        suite.assess,
        checks.check,
        audit.audit,
        blackbox.transfer,
        database.poison,
        evidence.verify,
        evidence.leaderboard,
    ),
    "Studies": (study.sweep, study.curves, study.figures, study.attribute, study.cost),
}.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(evidence.app, name="evidence", rich_help_panel="Numbers that hold")
app.add_typer(index.app, name="index", rich_help_panel="Search and catalogue")
app.command("list", rich_help_panel="Search and catalogue")(catalogue.everything)
app.add_typer(catalogue.app, name="data", rich_help_panel="Search and catalogue")

if __name__ == "__main__":
    main()
