"""The report of one run: files of its directory -> report.html. The pieces serve the demo's page as well."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.reports import html
from robusthash.apps.reports.branch_maps import branches_section
from robusthash.apps.reports.charts import TONES, UNIT, Axis, Dot, Series, Tone, dot_chart, line_chart
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.apps.reports.suite_section import doubt_line, suite_sections
from robusthash.apps.reports.wording import (
    ROUNDING,
    notes,
    number,
    setting_facts,
    short,
    span,
    stored_as,
    with_span,
)
from robusthash.core.atomic_files import write_aside
from robusthash.metrics.measure_key import MeasureKey, Role
from robusthash.metrics.results import EvalResult, Flag, by_direction

if TYPE_CHECKING:
    from pathlib import Path

Results = Mapping[str, EvalResult]
"""The results of one run by name: ``clean``, each attack, ``worst``; over several directions ``I2T clean``,
..."""


def write_report(run: Run) -> Path:
    """Write ``report.html`` of an evaluated run: one file that opens from disk.

    Raises:
        RunError: the run has not been trained or evaluated.
    """
    path = run.path / "report.html"
    text = run_page(
        run.card(),
        run.evaluated(),
        run.lines(),
        commands_of(run),
        branches_section(run.path),
        list(run.assessed().values()),
        run.checked(),
    )
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def commands_of(run: Run) -> list[str]:
    """What to type to evaluate the run again and to write this report again."""
    path = shlex.quote(str(run.path))
    return [f"robusthash evaluate {path}", f"robusthash report {path}"]


def run_page(
    card: Mapping[str, Any],
    results: Results,
    log: Sequence[Mapping[str, Any]],
    commands: Sequence[str],
    branches: Child = None,
    suites: Sequence[EvalResult] = (),
    checked: Sequence[Flag] = (),
) -> str:
    """The page of one run.

    Args:
        card: the model card.
        log: one line per epoch of training.
        branches: a section on what a purifier looks at.
        suites: what suites of attacks found.
        checked: what ``check`` said of the model.
    """
    groups = by_direction(results)
    first = next(iter(groups.values()))
    clean, several = first["clean"], len(groups) > 1
    lead = [
        tag("p", f"{context}: " if several else None, verdict(group)) for context, group in groups.items()
    ]
    return html.page(
        f"{card['name']}: {card['bits']} bits on {clean.setting.data.name}",
        [*lead, doubt_line(suites, checked)],
        None if several else html.tiles(tiles_of(first)),
        *(
            results_section(f"Results, {context}" if several else "Results", g, several)
            for context, g in groups.items()
        ),
        *suite_sections(suites),
        html.section("What was changed", perceptibility_table(results))
        if len(results) > len(groups)
        else None,
        branches,
        html.section("Training", tag("div", model_facts(card), training_chart(log), class_="pair")),
        html.section("Setting", setting_facts(first.get("worst", clean), results)),
        html.section("Commands", html.commands(commands)),
        foot=versions_line(clean),
        style=html.read_asset("suite.css") if suites else "",
    )


def results_section(title: str, results: Results, with_tiles: bool) -> Markup:
    """Table and charts of one direction and relevance; its tiles where the page has several."""
    untargeted = {name: result for name, result in results.items() if is_untargeted(name, result)}
    targeted = {
        name: result for name, result in results.items() if name != "worst" and name not in untargeted
    }
    charts: list[Markup | None] = [pr_chart(_toned(untargeted)), precision_chart(_toned(untargeted))]
    if targeted:
        charts += [pr_chart(_toned(targeted), targets=True), precision_chart(_toned(targeted), targets=True)]
    if "worst" in results:
        charts.insert(0, map_chart({"": results}, {"": "b"}))
    tiles = html.tiles(tiles_of(results)) if with_tiles else None
    figures = tag("div", *charts, class_="pair")
    return html.section(title, tiles, results_table(results), figures, notes(results.values()))


def tiles_of(results: Results) -> list[tuple[str, str, Child]]:
    """The few numbers of one direction and relevance."""
    clean, worst = results["clean"], results.get("worst")
    measure = clean.setting.headline
    tiles: list[tuple[str, str, Child]] = [
        (f"clean {measure}", number(clean.values[measure]), span(clean, measure))
    ]
    if worst is not None:
        low = clean.setting.key.name("worst")
        tiles.append(
            (
                f"worst case per query, {len(worst.setting.attacks)} attacks",
                number(worst[low]),
                span(worst, low),
            )
        )
        tiles.append(
            ("harmonic robustness score", number(worst["HRS"]), "0: collapsed or not robust, 1: perfect")
        )
    return [*tiles, ("chance", number(clean.reference["chance"]), "a random order of the database")]


# ---------------------------------------------------------------------------------------------- numbers as
# text


def is_untargeted(name: str, result: EvalResult) -> bool:
    """Clean queries or an untargeted attack: neither a target nor the worst case over several."""
    return name != "worst" and result.setting.key.name("targeted") not in result.values


def verdict(results: Results) -> str:
    """The run in a sentence or two."""
    clean, worst = results["clean"], results.get("worst")
    measure = clean.setting.headline
    start = f"On {len(clean.per_query[measure])} queries the clean {measure} is {number(clean[measure])}"
    if worst is None:
        return f"{start}. No attack was run, so nothing is said about robustness."
    attacks = ", ".join(worst.setting.attacks)
    fall = f"it falls to {number(worst[worst.setting.key.name('worst')])} where each query meets the worst of {attacks}"
    return f"{start}; {fall}. Chance is {number(clean.reference['chance'])}."


# ---------------------------------------------------------------------------------------------- tables


def results_table(results: Results) -> Markup:
    """Clean, every attack and the worst case: values with intervals, and what each attack spent."""
    key = results["clean"].setting.key
    measure, target = str(key), key.name("targeted")
    targeted = any(target in result.values for result in results.values())
    storage, stored = stored_as(results.values())
    head = [
        "",
        measure,
        *[f"of {stored}"] * bool(stored),
        "bits flipped",
        "success rate",
        *[target] * targeted,
    ]
    rows: list[list[Child]] = []
    for name, result in results.items():
        role: Role = "worst" if name == "worst" else ""
        flipped = f"{result['flips']:.1f} of {result.setting.bits}" if "flips" in result.values else "–"
        rate = result.values.get("ASR", result.values.get("t-ASR"))
        row: list[Child] = [name, with_span(result, key.name(role))]
        row += [with_span(result, key.name(role, storage=storage))] * bool(stored)
        row += [flipped, "–" if rate is None else f"{rate:.0%}"]
        rows.append([*row, *([with_span(result, target)] * targeted), passes(result)])
    reference = results["clean"].reference
    rows.append(["chance", number(reference["chance"]), *["–"] * (len(head) - 1)])
    caption = (
        f"Below each value its 95 % bootstrap interval over queries. {ROUNDING[storage]}"
        "Success: AP at most half of clean; targeted: t-AP of at least 0.5. Passes: forward + backward "
        "passes of single queries."
    )
    marked = [row for row, name in enumerate(results) if name == "worst"]
    return html.table([*head, "passes"], rows, caption, marked)


def passes(result: EvalResult) -> str:
    """Forward and backward passes of an attack."""
    return f"{result.cost.forward:,} + {result.cost.backward:,}" if result.cost.forward else "–"


def perceptibility_table(results: Results) -> list[Markup]:
    """How large and how visible the perturbations of each attack are: a table of images, of texts, or
    both."""
    images: dict[str, Callable[[Mapping[str, float]], str]] = {
        "largest |δ| (of 255)": lambda found: f"{found['linf/max'] * 255:.2f}",
        "L2, mean": lambda found: number(found["l2/mean"]),
        "MSE, mean": lambda found: f"{found['mse/mean']:.2e}",
        "PSNR of mean MSE (dB)": lambda found: number(-10 * math.log10(max(found["mse/mean"], 1e-12)), 1),
        "SSIM, mean": lambda found: number(found["ssim/mean"]) if "ssim/mean" in found else "–",
        "pixels changed": lambda found: f"{found['l0/mean']:.0%}" if "l0/mean" in found else "–",
        "row sum": lambda found: (
            number(found["legacy_matrix_inf/mean"]) if "legacy_matrix_inf/mean" in found else "–"
        ),
        "spectral": lambda found: (
            number(found["legacy_matrix_2/mean"]) if "legacy_matrix_2/mean" in found else "–"
        ),
    }
    of_images = (
        "Perturbations of the query images; pixel norms of x′ − x with x in [0, 1]. Row sum and spectral are matrix "
        "norms, means over channels: what published tables print as L∞ and L2."
    )
    texts: dict[str, Callable[[Mapping[str, float]], str]] = {
        "entries changed, mean": lambda found: number(found["edits/mean"], 1),
        "share of entries": lambda found: f"{found['changed/mean']:.1%}",
        "L1, mean": lambda found: number(found["l1/mean"], 2),
        "largest |δ|": lambda found: number(found["largest/max"]),
    }
    of_texts = (
        "Perturbations of the query texts as vectors over the vocabulary. A fraction of a word corresponds to no real "
        "text; edits of whole words do."
    )
    tables = []
    for key, columns, caption in (
        ("mse/mean", images, of_images),
        ("changed/mean", texts, of_texts),
    ):
        kept = {
            name: result.perceptibility for name, result in results.items() if key in result.perceptibility
        }
        rows = [[name, *(write(found) for write in columns.values())] for name, found in kept.items()]
        if rows:
            tables.append(html.table(["", *columns], rows, caption))
    return tables


def model_facts(card: Mapping[str, Any]) -> Markup:
    """The model card."""
    spec = card["hasher"]
    return html.facts(
        [
            ("model", tag("code", f"{card['name']}/{card['id']}")),
            ("bits", card["bits"]),
            ("encoders", ", ".join(f"{m}: {short(spec.get(m))}" for m in card["modalities"])),
            ("head", short(spec.get("head"))),
            ("image size", " × ".join(str(side) for side in card["image_size"]) + " px"),
            ("declared defense", card["declared"]),
            ("objective", short(card["objective"])),
            ("training", f"{card['epochs']} epochs, {card['seconds']:.0f} s"),
        ]
    )


def versions_line(result: EvalResult) -> str:
    """The software that the numbers depend on."""
    return ", ".join(f"{name} {version}" for name, version in result.setting.software.items())


# ---------------------------------------------------------------------------------------------- charts


def map_chart(models: Mapping[str, Results], tones: Mapping[str, Tone], caption: str = "") -> Markup:
    """Headline value with interval, clean, under each untargeted attack and in the worst case, of one or more
    runs."""
    first = next(iter(models.values()))
    measure = first["clean"].setting.headline
    names = [name for name, result in first.items() if name == "worst" or is_untargeted(name, result)]
    rows = []
    for name in names:
        key = first["clean"].setting.key.name("worst" if name == "worst" else "")
        dots = [
            Dot(tones[model], results[name][key], *results[name].interval[key])
            for model, results in models.items()
        ]
        rows.append(("worst case" if name == "worst" else name, dots))
    described = "; ".join(f"{name}: {', '.join(number(dot.value) for dot in dots)}" for name, dots in rows)
    return dot_chart(
        f"{measure}, clean and attacked",
        f"{', '.join(filter(None, models)) or 'Values'}. {described}.",
        rows,
        [(model or measure, tone, False) for model, tone in tones.items()],
        Axis(f"{measure} with 95 % interval", UNIT),
        ("chance", first["clean"].reference["chance"]),
        caption,
    )


Toned = Mapping[str, tuple[EvalResult, Tone, bool]]
"""Results by name, each with its tone and whether it is dashed."""


def _toned(results: Results) -> Toned:
    return {name: (result, TONES[i % 6], i >= 6) for i, (name, result) in enumerate(results.items())}


def pr_chart(lines: Toned, caption: str = "", targets: bool = False) -> Markup | None:
    """Precision over recall by rank; results without the curve are left out.

    Args:
        targets: of the target labels.
    """
    series = _curve_series(lines, MeasureKey("PR").name("targeted" if targets else ""), "recall")
    if not series:
        return None if targets else tag("p", "These results hold no precision-recall curve.", class_="note")
    described = "; ".join(
        f"{line.name}: precision {line.y[len(line.y) // 2]:.2f} at half recall" for line in series
    )
    title = f"Precision and recall{' of the target labels' * targets}"
    return line_chart(
        title, described, series, Axis("recall", UNIT), Axis("precision", UNIT), caption=caption
    )


def precision_chart(lines: Toned, targets: bool = False) -> Markup | None:
    """Precision of the first N; results without the curve are left out, and without any nothing is drawn.

    Args:
        targets: of the target labels.
    """
    series = _curve_series(lines, MeasureKey("P@N").name("targeted" if targets else ""), "n")
    if not series or max(len(line.x) for line in series) < 2:
        return None
    longest = max(series, key=lambda line: len(line.x))
    described = "; ".join(f"{line.name}: {line.y[0]:.2f} at {line.x[0]:.0f}" for line in series)
    title = f"Precision of the first N{' of the target labels' * targets}"
    return line_chart(title, described, series, Axis("N", _ticks(0, longest.x[-1])), Axis("precision", UNIT))


def _curve_series(lines: Toned, curve: str, axis: str) -> list[Series]:
    return [
        Series(
            name,
            result.curves[curve][axis].tolist(),
            result.curves[curve]["precision"].tolist(),
            tone,
            dashed,
        )
        for name, (result, tone, dashed) in lines.items()
        if curve in result.curves
    ]


def training_chart(log: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Loss terms by epoch; with a single epoch there is no line to draw."""
    if len(log) < 2:
        return None
    terms = [name for name in log[-1] if name not in ("epoch", "lr", "seconds", "figures")]
    epochs = [line["epoch"] + 1 for line in log]
    series = [
        Series(name, epochs, [line[name] for line in log], TONES[i % 6], dots=True)
        for i, name in enumerate(terms)
    ]
    values = [value for line in series for value in line.y]
    return line_chart(
        "Loss terms by epoch",
        "; ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in series),
        series,
        Axis("epoch", _ticks(epochs[0], epochs[-1], whole=True)),
        Axis("weighted loss term", _ticks(min(0.0, *values), max(values))),
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About six round ticks that cover low to high."""
    room = max(high - low, 1e-9)
    rough = room / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough - 1e-12)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if whole:  # epochs: start at the first one, whatever the step
        return [low + step * i for i in range(math.ceil((high - low) / step - 1e-9) + 1)]
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]
