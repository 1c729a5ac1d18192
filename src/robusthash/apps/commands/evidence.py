"""The verbs of ``evidence``, and ``verify`` for registry entries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from robusthash.apps.commands.options import AsJson, BudgetOptions, Device, RunPath, Sets, with_option_groups
from robusthash.apps.commands.terminal import (
    interval_text,
    note,
    one_row,
    print_json,
    print_lines,
    print_table,
    progress_bars,
    reply,
)

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult
    from robusthash.robustness.evidence.records import CopyEntry


app = Typer(help="Attacked queries that others can check: write them, verify them.", no_args_is_help=True)


@app.command("export")
@with_option_groups
def export(
    run: RunPath,
    out: Annotated[Path, Option(help="New folder of the bundle.")],
    attack: Annotated[str, Option(help="Attack, as YAML or by name.")] = "guided-apgd",
    budget: BudgetOptions = BudgetOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and write them as an evidence bundle."""
    from robusthash.apps.experiment.evidence_run import export_evidence
    from robusthash.apps.experiment.run_directory import load_run

    settings = budget.attack(attack)
    with progress_bars() as progress:
        result = export_evidence(load_run(run), settings, out, progress)
    _print_result(result, f"evidence of {run}", as_json, {"out": str(out)})
    if not as_json:
        print_lines([out])


@app.command("verify")
def verify_bundle(
    bundle: Annotated[Path, Argument(help="Folder of the bundle.")],
    run: Annotated[Path, Option(help="The run that it was made for.")],
    keep: Annotated[bool, Option(help="Note an accepted bundle in the run, for the leaderboard.")] = True,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle against a run: bounds, queries, weights, and its score. No attack code is run."""
    from robusthash.apps.experiment.evidence_run import verify_evidence
    from robusthash.apps.experiment.run_directory import load_run

    with progress_bars() as progress:
        result = verify_evidence(load_run(run), bundle, keep, progress)
    _print_result(result, f"{bundle} is accepted", as_json, {"bundle": result.name})


@app.command("entry")
def entry(
    run: RunPath,
    recipe: Annotated[str, Option(help="Recipe file that makes the run, as the entry will name it.")],
    out: Annotated[Path, Option(help="Folder of registry entries.")] = Path("registry"),
    sets: Sets = None,
    result: Annotated[
        str | None, Option(help="Claim a suite ('img-linf-8 standard'), not the recipe's attacks.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write a registry entry of an evaluated run: its card and its numbers as a claim."""
    from robusthash.apps.experiment.evidence_run import entry_of
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.robustness.evidence.records import entry_text

    card = entry_of(load_run(run), recipe, sets or (), result)
    _write_entry(out, card.id, entry_text(card), card.model_dump(mode="json"), as_json)


@app.command("copy-entry")
def copy_entry(
    measured: Annotated[Path, Argument(help="Measurements, as scripts/measure_copy_hash.py writes them.")],
    model: Annotated[
        str, Option(help="The hash for copies: the packaged one, or a saved folder.")
    ] = "copy-hash",
    out: Annotated[Path, Option(help="Folder of registry entries.")] = Path("registry"),
    as_json: AsJson = False,
) -> None:
    """Write the registry entry of a hash for copies: digests, hashes, proofs, and what was measured."""
    from robusthash.apps.image_hash.copy_entry import copy_entry_of
    from robusthash.robustness.evidence.records import copy_entry_text

    card = copy_entry_of(measured, model)
    _write_entry(out, card.id, copy_entry_text(card), card.model_dump(mode="json"), as_json)


def _write_entry(out: Path, name: str, text: str, fields: dict[str, Any], as_json: bool) -> None:
    from robusthash.core.atomic_files import write_text

    path = out / f"{name}.yaml"
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    reply(as_json, {"entry": str(path), **fields}, [path])


def _print_result(result: EvalResult, title: str, as_json: bool, more: dict[str, str]) -> None:
    if as_json:
        setting, parts = result.setting, ("notes", "values", "reference")
        facts = {"threat": setting.threat, "attacks": setting.attacks}
        print_json({**more, **facts, **{name: getattr(result, name) for name in parts}})
        return
    key = result.setting.key
    stored = (str(key), key.name(storage="8bit"), key.name(storage="rounded"))
    names = [name for name in stored if name in result.values]
    rows = [[name, result[name], interval_text(result, name)] for name in names]
    rows.append(["clean", result.reference["clean"], ""])
    print_table(f"{title}: {result.setting.threat}", ["measure", "value", "95 % interval"], rows)
    for text in result.notes:
        note(text)


def verify(
    entry: Annotated[Path, Argument(help="Registry entry (YAML).")],
    run: Annotated[
        Path | None,
        Option(
            help="A run of the entry's recipe and seed; of a hash for copies, another folder of its weights."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        Option(
            help="Of a hash for copies: folder with ucmerced.tar and .jsonl, to make its weights again, and "
            "coco_mini.tar and cifar10.npz, to measure its radii and recall."
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a registry entry again, from scratch; fails outside of its tolerance.

    An entry of a hash for copies needs no run: a line a check, of its weights, radii, hashes and proofs.
    """
    from dataclasses import asdict

    from robusthash.apps.experiment.evidence_run import verify_entry
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.metrics.measure_key import MeasureKey
    from robusthash.robustness.evidence.records import CopyEntry, load_any_entry

    card = load_any_entry(entry)
    if isinstance(card, CopyEntry):
        _verify_copies(card, run, data, as_json)
        return
    if run is None or data is not None:
        fault = "give --run RUN" if run is None else "--data is for those of hashes for copies"
        raise ValueError(f"{entry} is the entry of a trained model: {fault}")
    with progress_bars() as progress:
        verified = verify_entry(card, load_run(run), progress=progress)
    if as_json:
        print_json({"entry": card.id, **asdict(verified)})
    else:
        claimed, measure = card.claimed, card.claimed.measure
        rows = [
            [f"clean {measure}", claimed.clean, verified.clean],
            [MeasureKey.parse(measure).name("worst"), claimed.worst, verified.worst],
        ]
        title = f"{card.id}: {claimed.threat}, {claimed.queries} queries, tolerance {claimed.tolerance:g}"
        print_table(title, ["", "claimed", "measured"], rows)
    verified.check()


def _verify_copies(card: CopyEntry, folder: Path | None, data: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from robusthash.apps.image_hash.copy_entry import verify_copy_entry

    with progress_bars() as progress:
        verified = verify_copy_entry(card, folder, data, progress)
    if as_json:
        print_json({"entry": card.id, **asdict(verified)})
    else:
        print_lines(
            f"{each.status:11}  {one_row(each.name)}: {one_row(each.found)}" for each in verified.checks
        )
    verified.check()
