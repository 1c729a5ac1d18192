"""The verbs of evidence, registry and leaderboard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robusthash.apps.commands.terminal import AsJson, RunPath, console, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult

app = typer.Typer(
    help="Attacked queries that others can check: write them, verify them.", no_args_is_help=True
)


@app.command("export")
def evidence_export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="New folder of the bundle.")],
    attack: Annotated[str, typer.Option(help="Attack, as YAML or by name.")] = "guided-apgd",
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and write them as an evidence bundle."""
    from robusthash.apps.experiment import evidence_run as evidence
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.run_directory import load_run

    with progress_bars() as progress:
        result = evidence.export_evidence(load_run(run), value_of(attack), out, progress)
    _show(result, f"evidence of {run}", as_json, {"out": str(out)})
    if not as_json:
        sys.stdout.write(f"{out}\n")


@app.command("verify")
def evidence_verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    run: Annotated[Path, typer.Option(help="The run that it was made for.")],
    keep: Annotated[
        bool, typer.Option(help="Note an accepted bundle in the run, for the leaderboard.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Check a bundle against a run (bounds, queries, weights) and score it again. No attack code is run."""
    from robusthash.apps.experiment import evidence_run as evidence
    from robusthash.apps.experiment.run_directory import load_run

    with progress_bars() as progress:
        result = evidence.verify_evidence(load_run(run), bundle, keep, progress)
    _show(result, f"{bundle} is accepted", as_json, {"bundle": result.name})


@app.command("entry")
def evidence_entry(
    run: RunPath,
    recipe: Annotated[str, typer.Option(help="Recipe file that makes the run, as the entry will name it.")],
    out: Annotated[Path, typer.Option(help="Folder of registry entries.")] = Path("registry"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override that the run was made with.")
    ] = None,
    result: Annotated[
        str | None,
        typer.Option(help='Claim a suite: "img-linf-8 standard"; by default the attacks of the recipe.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a registry entry of an evaluated run: its card and its numbers as a claim."""
    from robusthash.apps.experiment.evidence_run import entry_of
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.core.atomic_files import write_aside
    from robusthash.robustness.evidence.records import entry_text

    entry = entry_of(load_run(run), recipe, sets or (), result)
    path = out / f"{entry.id}.yaml"
    with write_aside(path) as aside:
        aside.write_text(entry_text(entry), encoding="utf-8")
    if as_json:
        print_json({"entry": str(path), **entry.model_dump(mode="json")})
        return
    sys.stdout.write(f"{path}\n")


def verify(
    entry: Annotated[Path, typer.Argument(help="Registry entry (YAML).")],
    run: Annotated[Path, typer.Option(help="A run of the entry's recipe and seed.")],
    as_json: AsJson = False,
) -> None:
    """Evaluate a registry entry again, from scratch; fails outside of its tolerance."""
    from dataclasses import asdict

    from robusthash.apps.experiment.evidence_run import verify_entry
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.metrics.measure_key import MeasureKey
    from robusthash.robustness.evidence.records import load_entry

    card = load_entry(entry)
    with progress_bars() as progress:
        verified = verify_entry(card, load_run(run), progress=progress)
    if as_json:
        print_json({"entry": card.id, **asdict(verified)})
    else:
        claimed = card.claimed
        rows = [
            [f"clean {claimed.measure}", claimed.clean, verified.clean],
            [MeasureKey.parse(claimed.measure).name("worst"), claimed.worst, verified.worst],
        ]
        title = f"{card.id}: {claimed.threat}, {claimed.queries} queries, tolerance {claimed.tolerance:g}"
        print_table(title, ["", "claimed", "measured"], rows)
    verified.check()


def leaderboard(
    paths: Annotated[
        list[Path], typer.Argument(help="Evaluated run directories; runs of one recipe are its seeds.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the page here (.html).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown tables here.")] = None,
    data: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON here.")] = None,
) -> None:
    """Ranked tables of runs by setting, with intervals, flags and best-known values: one page, Markdown,
    JSON.

    Without an option, Markdown goes to stdout.
    """
    from robusthash.apps.experiment.leaderboard import as_markdown, as_plain, make_boards
    from robusthash.apps.reports.leaderboard_page import leaderboard_page
    from robusthash.core.atomic_files import json_text, write_aside

    boards = make_boards(paths)
    if not any((out, markdown, data)):
        sys.stdout.write(as_markdown(boards))
        return
    files = {out: leaderboard_page, markdown: as_markdown, data: lambda boards: json_text(as_plain(boards))}
    for path, write in files.items():
        if path is not None:
            text = write(boards)
            with write_aside(path) as aside:
                aside.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path}\n")


def _show(result: EvalResult, title: str, as_json: bool, more: dict[str, str]) -> None:
    if as_json:
        facts = {"threat": result.setting.threat, "attacks": result.setting.attacks, "notes": result.notes}
        print_json({**more, **facts, "values": result.values, "reference": result.reference})
        return
    key = result.setting.key
    names = [str(key), key.name(storage="8bit"), key.name(storage="rounded")]
    rows = [
        [n, result[n], "{:.4f} .. {:.4f}".format(*result.interval[n])] for n in names if n in result.values
    ]
    rows.append(["clean", result.reference["clean"], ""])
    print_table(f"{title}: {result.setting.threat}", ["measure", "value", "95 % interval"], rows)
    for note in result.notes:
        console.print(note)
