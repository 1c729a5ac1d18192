from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device
from robusthash.apps.commands.terminal import print_json, print_table, progress_bars


def verify(
    entry: Annotated[Path, Argument(help="Registry entry (YAML).")],
    run: Annotated[Path, Option(help="A run of the entry's recipe and seed.")],
    device: Device = None,
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
        claimed, measure = card.claimed, card.claimed.measure
        rows = [
            [f"clean {measure}", claimed.clean, verified.clean],
            [MeasureKey.parse(measure).name("worst"), claimed.worst, verified.worst],
        ]
        title = f"{card.id}: {claimed.threat}, {claimed.queries} queries, tolerance {claimed.tolerance:g}"
        print_table(title, ["", "claimed", "measured"], rows)
    verified.check()
