from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device
from robusthash.apps.commands.terminal import one_row, print_json, print_lines, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.robustness.evidence.records import CopyEntry


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
