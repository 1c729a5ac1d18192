from typing import Annotated, Any

from typer import Option

from robusthash.apps.commands.options import AnyQueries, AsJson, Device, Direction, Markdown, RunPaths
from robusthash.apps.commands.terminal import (
    print_json,
    print_lines,
    print_result_rows,
    progress_bars,
)


def detect(
    runs: RunPaths,
    attack: Annotated[
        list[str] | None,
        Option(help="Attack, as YAML or by name; by default those of the recipe. Repeatable."),
    ] = None,
    false_alarms: Annotated[float, Option(help="Share of clean queries that may be caught.")] = 0.05,
    weight: Annotated[
        list[float] | None,
        Option(help="Weight of the detector in the loss of who knows it; 0.01, 0.1, 1. Repeatable."),
    ] = None,
    queries: AnyQueries = None,
    direction: Direction = None,
    markdown: Markdown = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show what a detector of adversarial queries catches, by attackers who do not know it and who do.

    Of kept copies the stored results are shown. Share and mean AP are over the queries; in `passing` a query
    that is caught counts as it was before the attack.
    """
    from robusthash.apps.experiment.config import value_of
    from robusthash.apps.experiment.detect_run import detection
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.robustness.detection import WEIGHTS

    settings = None if attack is None else [value_of(each) for each in attack]
    results: dict[str, dict[str, Any]] = {}
    files = []
    with progress_bars() as progress:
        for path in runs:
            result, file = detection(
                load_run(path), settings, false_alarms, weight or WEIGHTS, queries, direction, progress
            )
            results[str(path)] = result
            files.append(file)
    if as_json:
        print_json(results)
        return
    heads = ["model", "clean", "false alarms", "attack", "attacker", "AP", "caught", "passing", "unnoticed"]
    rows = [row for result in results.values() for row in _rows(result)]
    print_result_rows("Detector of adversarial queries", heads, rows, results.values(), markdown)
    if not markdown:
        print_lines(files)


def _rows(result: dict[str, Any]) -> list[list[Any]]:
    shared = [result["recipe"], result["clean"], f"{result['measured']:.3f} (of {result['false_alarms']:g})"]
    numbers = ("value", "caught", "passing", "unnoticed")
    return [
        [*shared, each["attack"], each["attacker"], *(each[number] for number in numbers)]
        for each in result["attacks"]
    ]
