from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typer import Option

from robusthash.apps.commands.options import (
    AsJson,
    Device,
    Direction,
    Markdown,
    Queries,
    RunPaths,
    with_option_groups,
)
from robusthash.apps.commands.terminal import (
    print_json,
    print_result_rows,
    progress_bars,
)


@dataclass(frozen=True)
class NoiseOptions:
    """Options of the votes of noisy copies."""

    sigma: Annotated[float, Option(help="Noise of the smoothed code, in units of the range 0 to 1.")] = 0.25
    samples: Annotated[int, Option(min=1, help="Noisy copies of each query that vote.")] = 1000
    alpha: Annotated[float, Option(help="Probability that a bound of a query fails.")] = 0.001


@with_option_groups
def certify(
    runs: RunPaths,
    method: Annotated[
        Literal["smoothing", "intervals"],
        Option(
            help="Majority under noise, of any model, in l2; or interval bounds, of small nets, in L-inf."
        ),
    ] = "smoothing",
    noise: NoiseOptions = NoiseOptions(),
    queries: Queries = 100,
    radius: Annotated[
        list[str] | None,
        Option(help="Budget: 0.25, 0.5, 1.0 in l2; 1/255, 2/255 in L-inf by default. Repeatable."),
    ] = None,
    attacks: Annotated[
        Literal["smoke", "fast", "standard", "full", "none"],
        Option(help="Tier whose gradient attacks give the upper end of each interval."),
    ] = "fast",
    direction: Direction = None,
    markdown: Markdown = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prove a lower bound of the MAP under any attack inside a budget, next to what attacks reach.

    Stored in `certified.json` of each run; of kept copies it is shown. A stopped call goes on, and its
    numbers do not depend on where it stopped.
    """
    from robusthash.apps.experiment.certify_run import certify_run
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.apps.experiment.threat_options import size_of

    numbers = {
        **vars(noise),
        "radii": None if radius is None else [size_of(each, "--radius") for each in radius],
        "attacks": None if attacks == "none" else attacks,
    }
    results: dict[str, dict[str, Any]] = {}
    with progress_bars() as progress:
        for path in runs:
            results[str(path)] = certify_run(
                load_run(path), method, queries=queries, direction=direction, progress=progress, **numbers
            )
    if as_json:
        print_json(results)
        return
    rows = [row for result in results.values() for row in _rows(result)]
    print_result_rows("Certified MAP", _HEADS, rows, results.values(), markdown)


_HEADS = ["model", "by", "budget", "bits certified", "certified", "attacked"]


def _rows(result: dict[str, Any]) -> list[list[Any]]:
    """The codes as they are, then each budget."""
    from robusthash.apps.experiment.certify_run import radius_text

    named, bits = [result["recipe"], result["name"]], result["bits"]
    rows = [[*named, "none", f"{bits - result['abstained']:.1f} of {bits}", "", result["clean"]]]
    for row in result["rows"]:
        budget = f"{result['norm']} {radius_text(result['norm'], row['radius'])}"
        attacked = "not run" if row["attacked"] is None else row["attacked"]
        rows.append([*named, budget, f"{row['bits']:.1f} of {bits}", row["certified"], attacked])
    return rows
