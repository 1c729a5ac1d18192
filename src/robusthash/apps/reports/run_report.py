"""The report of one run: files of its directory -> report.html. Its tables and charts serve other pages too."""

from __future__ import annotations

import math
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robusthash.apps.experiment.run_directory import Run, RunError
from robusthash.apps.reports.charts import (
    TONES,
    UNIT,
    Axis,
    Chart,
    Dot,
    IntervalChart,
    LineChart,
    Series,
    Tone,
)
from robusthash.apps.reports.pages import (
    ROUNDING,
    Cell,
    CellLike,
    Facts,
    Table,
    Tiles,
    notes,
    number,
    one_line,
    render,
    setting_facts,
    span,
    stored_as,
    with_span,
)
from robusthash.apps.reports.suite_section import suite_data, unreliable_names
from robusthash.core.atomic_files import write_aside
from robusthash.data.base import Split
from robusthash.data.splits import stable_subset
from robusthash.metrics.results import EvalResult, Flag, by_direction
from robusthash.models.drfgd import ImageRegenerator
from robusthash.models.hasher import Hasher, frozen

Results = Mapping[str, EvalResult]
"""The results of one run by name: ``clean``, each attack, ``worst``; over several directions ``I2T clean``..."""

BRANCHES = "branches.npz"


def write_report(run: Run) -> Path:
    """Write ``report.html`` of an evaluated run: one file that opens from disk.

    Raises:
        RunError: the run has not been trained or evaluated.
    """
    quoted = shlex.quote(str(run.path))
    text = run_page(
        run.card(),
        run.evaluated(),
        run.lines(),
        [f"robusthash evaluate {quoted}", f"robusthash report {quoted}"],
        load_branches(run.path),
        list(run.assessed().values()),
        run.checked(),
    )
    with write_aside(run.path / "report.html") as aside:
        aside.write_text(text, encoding="utf-8")
    return run.path / "report.html"


def run_page(
    card: Mapping[str, Any],
    results: Results,
    log: Sequence[Mapping[str, Any]],
    commands: Sequence[str],
    branches: Mapping[str, Tensor] | None = None,
    suites: Sequence[EvalResult] = (),
    checked: Sequence[Flag] = (),
) -> str:
    """The page of one run.

    Args:
        card: the model card.
        log: one line per epoch of training.
        branches: rows of images, see ``load_branches``.
        suites: results of suites of attacks.
        checked: flags that ``check`` raised on the model.
    """
    groups = by_direction(results)
    first = next(iter(groups.values()))
    clean = first["clean"]
    return render(
        "run_report.html.j2",
        title=f"{card['name']}: {card['bits']} bits on {clean.setting.queries.partition(':')[0]}",
        groups=[_group(context, group) for context, group in groups.items()],
        unreliable=unreliable_names(suites, checked),
        suites=sorted(map(suite_data, suites), key=lambda suite: suite["published"]),
        perturbations=perturbation_tables(results) if len(results) > len(groups) else [],
        branches=branches,
        model=model_facts(card),
        training=training_chart(log),
        setting=setting_facts(first.get("worst", clean), results),
        commands=commands,
        software=clean.setting.software,
    )


def _group(context: str, results: Results) -> dict[str, Any]:
    """What the page shows of one direction and relevance."""
    untargeted = {name: result for name, result in results.items() if is_untargeted(name, result)}
    targeted = {name: r for name, r in results.items() if name != "worst" and name not in untargeted}
    charts = [pr_chart(_with_looks(untargeted)), precision_chart(_with_looks(untargeted))]
    if targeted:
        looks = _with_looks(targeted)
        charts += [pr_chart(looks, targets=True), precision_chart(looks, targets=True)]
    if "worst" in results:
        measure = results["clean"].setting.headline
        charts.insert(0, interval_chart({measure: results}, {measure: "b"}, "Values"))
    return {
        "context": context,
        "verdict": verdict(results),
        "tiles": _tiles(results),
        "table": results_table(results),
        "charts": charts,
        "curves": any("PR" in result.curves for result in untargeted.values()),
        "notes": notes(results.values()),
    }


def _tiles(results: Results) -> Tiles:
    clean, worst = results["clean"], results.get("worst")
    measure = clean.setting.headline
    tiles: Tiles = [(f"clean {measure}", number(clean.values[measure]), span(clean, measure))]
    if worst is not None:
        label = f"worst case per query, {len(worst.setting.attacks)} attacks"
        tiles.append((label, number(worst[f"w{measure}"]), span(worst, f"w{measure}")))
        score = number(worst["HRS"]), "0: collapsed or not robust, 1: perfect"
        tiles.append(("harmonic robustness score", *score))
    return [*tiles, ("chance", number(clean.reference["chance"]), "a random order of the database")]


def is_untargeted(name: str, result: EvalResult) -> bool:
    """Clean queries or an untargeted attack: neither a target nor the worst case over several."""
    return name != "worst" and f"t-{result.setting.headline}" not in result.values


def verdict(results: Results) -> str:
    """The run in a sentence or two."""
    clean, worst = results["clean"], results.get("worst")
    measure = clean.setting.headline
    start = f"On {len(clean.per_query[measure])} queries the clean {measure} is {number(clean[measure])}"
    if worst is None:
        return f"{start}. No attack was run, so nothing is said about robustness."
    attacks = ", ".join(worst.setting.attacks)
    fall = f"it falls to {number(worst['w' + measure])} where each query meets the worst of {attacks}"
    return f"{start}; {fall}. Chance is {number(clean.reference['chance'])}."


# ---------------------------------------------------------------------------------------------- tables


def results_table(results: Results) -> Table:
    """Clean, every attack and the worst case: values with intervals, and what each attack spent."""
    measure = results["clean"].setting.headline
    targeted = any(f"t-{measure}" in result.values for result in results.values())
    ending, stored = stored_as(results.values())
    head = ["", measure, *[f"of {stored}"] * bool(stored), "bits flipped", "success rate"]
    head += [f"t-{measure}"] * targeted
    rows: list[list[CellLike]] = []
    for name, result in results.items():
        prefix = "w" if name == "worst" else ""
        flipped = f"{result['flips']:.1f} of {result.setting.bits}" if "flips" in result.values else "–"
        rate = result.values.get("ASR", result.values.get("t-ASR"))
        row: list[CellLike] = [name, with_span(result, prefix + measure)]
        row += [with_span(result, f"{prefix}{measure}{ending}")] * bool(stored)
        row += [flipped, "–" if rate is None else f"{rate:.0%}"]
        row += [with_span(result, f"t-{measure}")] * targeted
        cost = result.cost
        rows.append([*row, f"{cost.forward:,} + {cost.backward:,}" if cost.forward else "–"])
    rows.append(["chance", number(results["clean"].reference["chance"]), *["–"] * (len(head) - 1)])
    caption = (
        f"Below each value its 95 % bootstrap interval over queries. {ROUNDING[ending]}"
        "Success: AP at most half of clean; targeted: t-AP of at least 0.5. Passes: forward + backward "
        "passes of single queries."
    )
    marked = [row for row, name in enumerate(results) if name == "worst"]
    return Table([*head, "passes"], rows, caption, marked)


Column = Callable[[Mapping[str, float]], str]


def _number_of(name: str, digits: int = 3) -> Column:
    return lambda values: number(values[name], digits) if name in values else "–"


_IMAGES: dict[str, Column] = {
    "largest |δ| (of 255)": lambda values: f"{values['linf/max'] * 255:.2f}",
    "L2, mean": _number_of("l2/mean"),
    "MSE, mean": lambda values: f"{values['mse/mean']:.2e}",
    "PSNR of mean MSE (dB)": lambda values: number(-10 * math.log10(max(values["mse/mean"], 1e-12)), 1),
    "SSIM, mean": _number_of("ssim/mean"),
    "pixels changed": lambda values: f"{values['l0/mean']:.0%}" if "l0/mean" in values else "–",
    "row sum": _number_of("legacy_matrix_inf/mean"),
    "spectral": _number_of("legacy_matrix_2/mean"),
}
_TEXTS: dict[str, Column] = {
    "entries changed, mean": _number_of("edits/mean", 1),
    "share of entries": lambda values: f"{values['changed/mean']:.1%}",
    "L1, mean": _number_of("l1/mean", 2),
    "largest |δ|": _number_of("largest/max"),
}
_OF_IMAGES = (
    "Perturbations of the query images; pixel norms of x′ − x with x in [0, 1]. Row sum and spectral are matrix "
    "norms, means over channels: what published tables print as L∞ and L2."
)
_OF_TEXTS = (
    "Perturbations of the query texts as vectors over the vocabulary. A fraction of a word corresponds to no real "
    "text; edits of whole words do."
)


def perturbation_tables(results: Results) -> list[Table]:
    """How large and how visible the perturbations of each attack are: of images, of texts, or both."""
    tables = []
    for key, columns, caption in (("mse/mean", _IMAGES, _OF_IMAGES), ("changed/mean", _TEXTS, _OF_TEXTS)):
        measured = {name: r.perceptibility for name, r in results.items() if key in r.perceptibility}
        rows = [[name, *(column(values) for column in columns.values())] for name, values in measured.items()]
        if rows:
            tables.append(Table(["", *columns], rows, caption))
    return tables


def model_facts(card: Mapping[str, Any]) -> Facts:
    """The model card."""
    hasher = card["hasher"]
    return [
        ("model", Cell(f"{card['name']}/{card['id']}", element="code")),
        ("bits", card["bits"]),
        ("encoders", ", ".join(f"{m}: {one_line(hasher.get(m))}" for m in card["modalities"])),
        ("head", one_line(hasher.get("head"))),
        ("image size", " × ".join(str(side) for side in card["image_size"]) + " px"),
        ("declared defense", card["declared"]),
        ("objective", one_line(card["objective"])),
        ("training", f"{card['epochs']} epochs, {card['seconds']:.0f} s"),
    ]


# ---------------------------------------------------------------------------------------------- charts


def interval_chart(models: Mapping[str, Results], tones: Mapping[str, Tone], names: str = "") -> Chart:
    """Headline value with interval, clean, under each untargeted attack and in the worst case.

    Args:
        models: results of one or more runs, by what the legend calls them.
        names: of the runs in the description, those of the legend by default.
    """
    first = next(iter(models.values()))
    measure = first["clean"].setting.headline
    rows = []
    for name, result in first.items():
        key = f"w{measure}" if name == "worst" else measure
        if name == "worst" or is_untargeted(name, result):
            dots = [Dot(m, found[name][key], *found[name].interval[key]) for m, found in models.items()]
            rows.append(("worst case" if name == "worst" else name, dots))
    described = "; ".join(f"{name}: {', '.join(number(dot.value) for dot in dots)}" for name, dots in rows)
    return IntervalChart(
        title=f"{measure}, clean and attacked",
        description=f"{names or ', '.join(models)}. {described}.",
        rows=rows,
        tones=tones,
        x=Axis(f"{measure} with 95 % interval", UNIT),
        reference=("chance", first["clean"].reference["chance"]),
    )


Looks = Mapping[str, tuple[EvalResult, Tone, bool]]
"""Results by name, each with its tone and whether it is dashed."""


def _with_looks(results: Results) -> Looks:
    return {name: (result, TONES[i % 6], i >= 6) for i, (name, result) in enumerate(results.items())}


def pr_chart(results: Looks, caption: str = "", targets: bool = False) -> Chart | None:
    """Precision over recall by rank, of the target labels where ``targets``; None without such a curve."""
    series = _curve_series(results, "t-PR" if targets else "PR", "recall")
    if not series:
        return None
    described = [f"{line.name}: precision {line.y[len(line.y) // 2]:.2f} at half recall" for line in series]
    return LineChart(
        title=f"Precision and recall{' of the target labels' * targets}",
        description="; ".join(described),
        series=series,
        x=Axis("recall", UNIT),
        y=Axis("precision", UNIT),
        caption=caption,
    )


def precision_chart(results: Looks, targets: bool = False) -> Chart | None:
    """Precision of the first N, of the target labels where ``targets``; None without such a curve."""
    series = _curve_series(results, "t-P@N" if targets else "P@N", "n")
    if not series or max(len(line.x) for line in series) < 2:
        return None
    longest = max(series, key=lambda line: len(line.x))
    return LineChart(
        title=f"Precision of the first N{' of the target labels' * targets}",
        description="; ".join(f"{line.name}: {line.y[0]:.2f} at {line.x[0]:.0f}" for line in series),
        series=series,
        x=Axis("N", _ticks(0, longest.x[-1])),
        y=Axis("precision", UNIT),
    )


def _curve_series(results: Looks, name: str, axis: str) -> list[Series]:
    series = []
    for label, (result, tone, dashed) in results.items():
        if name in result.curves:
            curve = result.curves[name]
            series.append(Series(label, curve[axis].tolist(), curve["precision"].tolist(), tone, dashed))
    return series


def training_chart(log: Sequence[Mapping[str, Any]]) -> LineChart | None:
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
    return LineChart(
        title="Loss terms by epoch",
        description="; ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in series),
        series=series,
        x=Axis("epoch", _ticks(epochs[0], epochs[-1], whole=True)),
        y=Axis("weighted loss term", _ticks(min(0.0, *values), max(values))),
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About six round ticks that cover low to high."""
    room = max(high - low, 1e-9)
    rough = room / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough - 1e-12)
    if whole:  # epochs: start at the first one, whatever the step
        step = max(1.0, round(step))
        return [low + step * i for i in range(math.ceil((high - low) / step - 1e-9) + 1)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------------------------------------- branches


def save_branches(folder: Path, victim: Hasher, queries: Split) -> None:
    """Write ``branches.npz``: query images, what a purifier regenerates of them, and a heat map of each branch.

    Five images are chosen by content. A hasher without such a purifier leaves no file. Maps are (n, H, W) in
    [0, 1], the mean |activation| over channels between its least and its largest value in the image.
    """
    if "image" not in victim.purifiers or not isinstance(victim.purifiers["image"], ImageRegenerator):
        return
    purifier = victim.purifiers["image"]
    images = queries.batch(stable_subset(queries, 5)).inputs["image"].to(victim.device)
    with frozen(victim), torch.no_grad():
        robust, fragile = (_heat(view, images.shape[-2:]) for view in purifier.views(images))
        samples = purifier.regenerate(images).sample
    arrays = {"images": images, "samples": samples, "robust": robust, "fragile": fragile}
    with write_aside(folder / BRANCHES) as aside:
        np.savez(aside, allow_pickle=False, **{name: value.cpu().numpy() for name, value in arrays.items()})


def _heat(view: Tensor, size: torch.Size) -> Tensor:
    low, high = view.flatten(1).amin(1)[:, None, None], view.flatten(1).amax(1)[:, None, None]
    scaled = (view - low) / (high - low).clamp_min(1e-12)
    return interpolate(scaled[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def load_branches(folder: Path) -> dict[str, Tensor] | None:
    """The heat maps of a run as rows of (n, 3, H, W) images, or None where it has none.

    Raises:
        RunError: a file that cannot be read.
    """
    path = folder / BRANCHES
    if not path.is_file():
        return None
    names = ("images", "samples", "robust", "fragile")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, samples, robust, fragile = (torch.from_numpy(arrays[name]) for name in names)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({error}); evaluate the run again") from None
    heat = {"robust branch": _overlaid(images, robust), "fragile branch": _overlaid(images, fragile)}
    return {"query": images, "regenerated": samples, **heat}


def _overlaid(images: Tensor, heat: Tensor) -> Tensor:
    """(n, 3, H, W) images in grey, dimmed, with the heat on them from dark over orange to yellow."""
    grey = images.mean(1, keepdim=True)
    colour = torch.stack([heat, 0.8 * heat.square(), 0.1 * heat], 1)
    return (0.35 * grey + 0.65 * colour).clamp(0, 1)
