"""The verbs of ``evidence``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from robusthash.apps.commands.options import AsJson, Device, Eps, Norm, RunPath, Sets, Threat
from robusthash.apps.commands.terminal import (
    interval_text,
    note,
    print_json,
    print_lines,
    print_table,
    progress_bars,
    reply,
)

if TYPE_CHECKING:
    from robusthash.metrics.results import EvalResult

app = Typer(help="Attacked queries that others can check: write them, verify them.", no_args_is_help=True)


@app.command("export")
def export(
    run: RunPath,
    out: Annotated[Path, Option(help="New folder of the bundle.")],
    attack: Annotated[str, Option(help="Attack, as YAML or by name.")] = "guided-apgd",
    threat: Threat = None,
    eps: Eps = None,
    norm: Norm = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Attack the queries of a run and write them as an evidence bundle."""
    from robusthash.apps.experiment.evidence_run import export_evidence
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import attack_under

    settings = attack_under(attack, threat, eps, norm)
    with progress_bars() as progress:
        result = export_evidence(load_run(run), settings, out, progress)
    _print_result(result, f"evidence of {run}", as_json, {"out": str(out)})
    if not as_json:
        print_lines([out])


@app.command("verify")
def verify(
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
    from robusthash.core.atomic_files import write_aside

    path = out / f"{name}.yaml"
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
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
