from collections.abc import Mapping
from typing import Annotated, Any

from typer import Option

from robusthash.apps.commands.options import AsJson, RunPath
from robusthash.apps.commands.terminal import note, print_json, print_table, warn


def compare(
    first: RunPath,
    second: RunPath,
    result: Annotated[
        str, Option(help="clean, an attack, worst, or a suite: 'img-linf-8 standard'.")
    ] = "worst",
    as_json: AsJson = False,
) -> None:
    """Paired differences of two runs (first minus second); refused where more than the model differs."""
    from dataclasses import asdict

    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.reports.pages import red_flag_warning
    from robusthash.core.registry import nearest
    from robusthash.metrics.comparison import compare as compare_results
    from robusthash.metrics.result_words import budget_words, empty_note, p_text

    stored = [load_run(run).results() for run in (first, second)]
    for run, results in zip((first, second), stored, strict=True):
        if result not in results:
            raise ValueError(f"{run} has no result {result!r}{nearest(result, results)}")
    sides = [results[result] for results in stored]
    try:
        differences = compare_results(*sides)
    except ValueError as error:
        raise ValueError(f"{result}: {error}{_others(*stored)}") from None
    if unreliable := [str(run) for run, side in zip((first, second), sides, strict=True) if side.unreliable]:
        warn("UNRELIABLE", red_flag_warning(unreliable))
    if as_json:
        print_json({name: asdict(difference) for name, difference in differences.items()})
        return
    rows = [
        [name, d.mean, "{:+.4f} .. {:+.4f}".format(*d.interval), p_text(d.p_holm), d.queries]
        for name, d in differences.items()
    ]
    columns = ["measure", "difference", "95 % interval", "p (Holm)", "queries"]
    print_table(f"{result}: {first} minus {second}", columns, rows)
    if (setting := sides[0].setting).attacks:
        note(
            f"threat: {setting.threat}; attacks: {', '.join(setting.attacks)}; {budget_words(setting.budget)}"
        )
    for run, side in zip((first, second), sides, strict=True):
        if text := empty_note(side):
            note(f"{run}: {text}")


def _others(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Options that name the results which two runs have in common and which compare; "" where none does."""
    same = [
        name
        for name, one in first.items()
        if name in second and not one.setting.differs(second[name].setting)
    ]
    names = " or ".join(f"--result '{name}'" if " " in name else f"--result {name}" for name in same)
    return f"; these two have comparable results: {names}" if names else ""
