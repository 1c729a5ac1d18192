"""Runs and sweeps -> figures for papers: all that each has measured is drawn, the rest is left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robusthash.analysis.band_attribution import BandAttribution
from robusthash.apps.experiment.attribution_run import ATTRIBUTION, load_attributions
from robusthash.apps.experiment.epoch_curves import log_curves, values_of
from robusthash.apps.experiment.parameter_sweep import SweepRow
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_selection import labelled
from robusthash.apps.experiment.tables import Cell, TableRow, make_rows, seeds_by_row
from robusthash.apps.reports.cell_text import is_number
from robusthash.apps.reports.charts import (
    ChartAxis,
    Dot,
    Interval,
    IntervalChart,
    LineChart,
    ScatterChart,
    ScatterPoint,
    Series,
    paper_figure,
    require_matplotlib,
    save,
)
from robusthash.core.limited_files import read_json
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult, by_direction, headline_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = list[Path]

Results = Mapping[str, Sequence[Mapping[str, EvalResult]]]
"""Results by recipe, seed and name."""

_CURVES = {"pr": ("PR", "recall", "recall"), "pn": ("P@N", "n", "N")}
"""By stem of the file: curve of a result, its axis across, and what that is called."""


def draw_runs(
    paths: Sequence[Path], out: Path, called: Mapping[Path, str] | None = None
) -> tuple[Drawn, list[str]]:
    """Every figure that the results, logs and attributions of these runs allow, as PDF and PNG in ``out``.

    Runs of one recipe are its seeds and are averaged. Written are, for each direction or relevance,
    ``attacks`` (bars), ``targeted`` (bars of t-MAP), ``scatter``, and curves: ``pr`` (precision and recall),
    ``pr-attacked`` and ``pr-targeted``, of the target labels, and likewise ``pn`` (precision of the first N);
    ``eps`` where a suite drew curves over budgets; ``bands`` where every run was attributed; and ``loss``
    with the training loss.

    Args:
        called: what the legends call a run; by default its recipe, with the settings that namesakes
            differ in.

    Returns:
        The files, and a note for every recipe that the scatter leaves out.

    Raises:
        RunError: a run that has not been evaluated.
        ValueError: runs that no table may hold together.
    """
    require_matplotlib()
    rows, by_name = make_rows(paths), seeds_by_row(paths)
    if called:
        names = {name: called.get(runs[0].path, name) for name, runs in by_name.items()}
        rows = [replace(row, name=names[row.name]) for row in rows]
        by_name = {names[name]: runs for name, runs in by_name.items()}
    results = {name: [run.evaluated() for run in runs] for name, runs in by_name.items()}
    out.mkdir(parents=True, exist_ok=True)
    drawn: Drawn = []
    notes = [
        f"{row.name} is not in the scatter: its seeds were not all evaluated under the same attacks"
        for row in rows
        if not all(f"{context} worst".strip() in row.cells for context in row.chance)
    ]
    for context in rows[0].chance:
        ending = f"-{context.replace(' ', '-')}" if context else ""
        drawn += _draw_tables(rows, results, context, out, ending)
        drawn += _draw_curves(results, context, out, ending)
    drawn += _draw_budgets(by_name, out)
    files = [path / ATTRIBUTION for path in paths]
    if all(path.is_file() for path in files):
        maps = [next(iter(load_attributions(path).values())) for path in files]
        drawn += draw_bands(dict(zip(labelled(paths), maps, strict=True)), out)
    return drawn + _draw_losses(by_name, out), notes


def _draw_tables(rows: Sequence[TableRow], results: Results, context: str, out: Path, ending: str) -> Drawn:
    """Bars of every attack, and clean against worst."""
    groups: dict[bool, dict[str, list[Dot]]] = {False: {}, True: {}}  # by targeted, then by name
    points: list[ScatterPoint] = []
    measures: dict[str, str] = {}
    for row in rows:
        cells: dict[str, Cell] = {}
        for column, cell in row.cells.items():
            if row.scored[column] == context:
                result = results[row.name][0][column]
                name, measures[result.attack] = result.attack, headline_of(result)
                cells[name] = cell
                targeted = MeasureKey.parse(measures[name]).role == "targeted"
                dots = groups[targeted].setdefault(name, [])
                dots.append(Dot(row.name, cell.value, *cell.interval))
        if "clean" in cells and "worst" in cells:
            clean, worst = cells["clean"], cells["worst"]
            points.append(ScatterPoint(row.name, clean.value, worst.value, clean.interval, worst.interval))
    chance = ("chance", rows[0].chance[context])
    untargeted = sorted(groups[False].items(), key=lambda item: (item[0] == "worst", item[0] != "clean"))
    bars = IntervalChart(rows=untargeted, x=ChartAxis(measures["clean"]), reference=chance)
    drawn = save(bars, out / f"attacks{ending}")
    if groups[True]:
        y = ChartAxis(f"{measures[next(iter(groups[True]))]} (higher is worse)")
        drawn += save(IntervalChart(rows=list(groups[True].items()), x=y), out / f"targeted{ending}")
    if points:
        x, y = ChartAxis(f"{measures['clean']}, clean"), ChartAxis(f"{measures['worst']}, worst case")
        drawn += save(ScatterChart(points=points, x=x, y=y, reference=chance), out / f"scatter{ending}")
    return drawn


def _draw_curves(results: Results, context: str, out: Path, ending: str) -> Drawn:
    """Precision over recall and N: clean, under the strongest attack on each model, and of target labels.

    The strongest is the one of lowest MAP, of targeted ones that of highest t-MAP; bands span the seeds.
    """
    models: dict[str, dict[str, list[EvalResult]]] = {"": {}, "-attacked": {}, "-targeted": {}}
    for name, seeds in results.items():
        groups = [by_direction(seed)[context] for seed in seeds]
        models[""][name] = [group["clean"] for group in groups]
        models["-attacked"][name] = _strongest(groups, "ASR", min)
        models["-targeted"][name] = _strongest(groups, "t-ASR", max)
    drawn: Drawn = []
    for stem, (curve, axis, label) in _CURVES.items():
        for kind, by_model in models.items():
            targeted = kind == "-targeted"
            key = MeasureKey(curve).name("targeted" if targeted else "")
            series = []
            for name, of_seeds in by_model.items():
                if of_seeds and all(key in result.curves for result in of_seeds):
                    precision = [result.curves[key]["precision"] for result in of_seeds]
                    series.append(_over_seeds(name, of_seeds[0].curves[key][axis], precision))
            if series:
                y = ChartAxis("precision of targets" if targeted else "precision", from_zero=True)
                drawn += save(
                    LineChart(series=series, x=ChartAxis(label), y=y), out / f"{stem}{kind}{ending}"
                )
    return drawn


def _strongest(
    groups: Sequence[Mapping[str, EvalResult]], mark: str, best: Callable[..., EvalResult]
) -> list[EvalResult]:
    """The attack of lowest or highest headline of each seed, among those whose values hold ``mark``; none if
    a seed has no such attack."""
    strongest = [
        best(attacks, key=lambda result: result[headline_of(result)])
        for group in groups
        if (attacks := [r for n, r in group.items() if n not in ("clean", "worst") and mark in r.values])
    ]
    return strongest if len(strongest) == len(groups) else []


def _over_seeds(name: str, x: Tensor, seeds: Sequence[Tensor]) -> Series:
    """The mean over seeds, and their span where there are several."""
    values = torch.stack([seed.to(torch.float64) for seed in seeds])
    low, high = (values.amin(0).tolist(), values.amax(0).tolist()) if len(seeds) > 1 else ([], [])
    return Series(name, x.tolist(), values.mean(0).tolist(), low=low, high=high)


def _draw_budgets(by_name: Mapping[str, Sequence[Run]], out: Path) -> Drawn:
    """Curves over budgets of assessed runs, in units of 1/255; bands span the seeds."""
    curves: dict[tuple[str, str], dict[str, list[dict[str, Tensor]]]] = {}
    for name, runs in by_name.items():
        for result in (result for run in runs for result in run.assessed().values()):
            for curve in (axes for axes in result.curves.values() if "eps" in axes):
                for measure in (axis for axis in curve if axis != "eps"):
                    curves.setdefault((result.name, measure), {}).setdefault(name, []).append(curve)
    drawn: Drawn = []
    for (named, measure), models in curves.items():
        series = [
            _over_seeds(name, seeds[0]["eps"] * 255, [seed[measure] for seed in seeds])
            for name, seeds in models.items()
        ]
        stem = f"eps-{named}-{measure}".replace(" ", "-").replace("/", "-").replace("@", "-at-")
        y = ChartAxis(measure, from_zero=True)
        drawn += save(LineChart(series=series, x=ChartAxis("eps (1/255)"), y=y), out / stem)
    return drawn


def draw_bands(attributions: Mapping[str, BandAttribution], out: Path) -> Drawn:
    """``bands``: heat maps side by side; ``bands-share``: how much of the worth the lowest frequencies make.

    Raises:
        ValueError: attributions of different worths.
    """
    worths = sorted({one.worth for one in attributions.values()})
    if len(worths) > 1:
        raise ValueError(
            f"attributions of different worths, {worths}, cannot share a figure; attribute them alike"
        )
    measure = {"tau": "share in Kendall's tau-b", "ap": "share in AP"}[worths[0]]
    maps = {name: (one.mean, one.mean_error) for name, one in attributions.items()}
    series = []
    for name, one in attributions.items():
        # the share of all that lies at or below an order; its error is that of the images
        values, errors = one.by_order()
        low, high = (values - 2 * errors).tolist(), (values + 2 * errors).tolist()
        series.append(Series(name, list(range(len(values))), values.tolist(), low=low, high=high))
    x, y = (
        ChartAxis("u + v of the highest band counted"),
        ChartAxis("share of all attribution", from_zero=True),
    )
    shares = LineChart(series=series, x=x, y=y, whiskers=True)
    return save(_band_figure(maps, measure), out / "bands") + save(shares, out / "bands-share")


def _band_figure(maps: Mapping[str, tuple[Any, Any]], measure: str) -> Figure:
    """Heat maps of (n, n) band attributions, by model values and standard errors, side by side on one scale;
    u runs down, v across.

    A small circle is where a value is within two standard errors of 0, a minus where it is below that. The
    scale is that of the square root, for the lowest bands outweigh all others.
    """
    with paper_figure(1.0 + 1.65 * len(maps), 2.15) as figure:
        from matplotlib.colors import PowerNorm

        panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
        highest = max(float(np.asarray(values).max()) for values, _ in maps.values())
        for panel, (name, (values, errors)) in zip(panels, maps.items(), strict=True):
            values, errors = np.asarray(values), np.asarray(errors)
            image = panel.imshow(values.clip(min=0), cmap="cividis", norm=PowerNorm(0.5, 0.0, highest))
            for u, v in np.argwhere(values <= 2 * errors):
                mark = "−" if values[u, v] < -2 * errors[u, v] else "∘"
                panel.text(v, u, mark, ha="center", va="center", fontsize=7, color="white")
            panel.set_title(name, fontsize=9)
            panel.set(xlabel="v (across)", xticks=range(values.shape[1]), yticks=range(values.shape[0]))
            panel.tick_params(labelsize=7)
            panel.grid(visible=False)
        panels[0].set_ylabel("u (down)")
        figure.colorbar(image, ax=list(panels), label=measure, shrink=0.9, pad=0.02)
    return figure


def _draw_losses(by_name: Mapping[str, Sequence[Run]], out: Path) -> Drawn:
    series = []
    for name, runs in by_name.items():
        curves = [log_curves(run)["loss"] for run in runs]
        shortest = min(len(epochs) for epochs, _ in curves)
        values = [torch.tensor(loss[:shortest]) for _, loss in curves]
        series.append(_over_seeds(name, torch.tensor(curves[0][0][:shortest]), values))
    y = ChartAxis("training loss, own units")
    return save(LineChart(series=series, x=ChartAxis("epoch"), y=y), out / "loss")


def draw_log(label: str, run: Run, out: Path) -> Drawn:
    """``convergence-LABEL``: every loss term of a run by epoch; ``seconds-LABEL``: the time of each."""
    curves = log_curves(run)
    seconds = [Series(label, *curves.pop("seconds"))]
    terms = [Series(name, *curve) for name, curve in curves.items() if not name.startswith("gate/")]
    positive = all(value > 0 for term in terms for value in term.y)
    stem, epoch = label.replace("/", "-"), ChartAxis("epoch")
    losses = LineChart(series=terms, x=epoch, y=ChartAxis("loss term", log=positive))
    times = LineChart(series=seconds, x=epoch, y=ChartAxis("seconds", from_zero=True))
    return save(losses, out / f"convergence-{stem}") + save(times, out / f"seconds-{stem}")


def draw_robust(runs: Mapping[str, Mapping[str, Mapping[int, EvalResult]]], out: Path) -> Drawn:
    """``robust-curves``: clean and attacked MAP by epoch of each run, with intervals over queries."""
    series, measure = [], ""
    for label, results in runs.items():
        for name, by_epoch in results.items():
            measure, (epochs, values), (low, high) = values_of(by_epoch)
            series.append(Series(f"{label}: {name}", epochs, values, low=low, high=high))
    chart = LineChart(series=series, x=ChartAxis("epoch"), y=ChartAxis(measure, from_zero=True))
    return save(chart, out / "robust-curves")


def draw_sweep(rows: Sequence[SweepRow], measure: str, out: Path, chance: float | None = None) -> Drawn:
    """``sweep``: results over the first axis; a line for each result and setting of the other axes."""
    done = [row for row in rows if row.cells]
    if not done:
        return []
    first, *others = done[0].values
    ticks = list(dict.fromkeys(row.values[first] for row in done))
    numeric = all(map(is_number, ticks)) and _apart([float(tick) for tick in ticks])
    groups: dict[str, list[SweepRow]] = {}
    for row in done:
        setting = ", ".join(f"{path.rpartition('.')[2]} {row.values[path]}" for path in others)
        groups.setdefault(setting, []).append(row)
    series = []
    for setting, members in groups.items():
        for name in members[0].cells:
            points: list[tuple[float, float, Interval]] = []
            for row in (row for row in members if name in row.cells):
                value = row.values[first]
                place = float(value) if numeric else float(ticks.index(value))
                points.append((place, row.cells[name].value, row.cells[name].interval))
            x, y, ends = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            low, high = zip(*ends, strict=True)
            series.append(Series(f"{name}, {setting}" if setting else name, x, y, low=low, high=high))
    across = ChartAxis(first.rpartition(".")[2], names=() if numeric else ticks)
    line = None if chance is None else ("chance", chance)
    chart = LineChart(series=series, x=across, y=ChartAxis(measure, from_zero=True), reference=line)
    return save(chart, out / "sweep")


def _apart(places: Sequence[float]) -> bool:
    """False where points would lie on top of each other on one scale, as 0, 1e-4, 1e-3 and 1e-2 do."""
    ordered = sorted(places)
    gaps = [high - low for low, high in itertools.pairwise(ordered)]
    return not gaps or min(gaps) >= 0.03 * (ordered[-1] - ordered[0])


def draw_transfer_file(path: Path, out: Path) -> Drawn:
    """``transfer``: what attacks made on each surrogate (down) leave of each victim (across).

    Args:
        path: JSON of ``robusthash transfer --json``: ``surrogates`` and ``victims``, names; ``attacked``, a
            row for each surrogate, null where not measured; and ``measure``.

    Raises:
        ValueError: another content.
    """
    matrix = read_json(path)
    keys = ("surrogates", "victims", "attacked", "measure")
    if not isinstance(matrix, dict) or not all(key in matrix for key in keys):
        raise ValueError(f"{path} is no transfer matrix: it needs {', '.join(keys)}")
    rows, columns = matrix["surrogates"], matrix["victims"]
    values = np.array(matrix["attacked"], dtype=float)  # null becomes NaN
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"{path} has {len(rows)} rows and {len(columns)} columns, but {values.shape} values")
    return save(_matrix_figure(rows, columns, values, matrix["measure"]), out / "transfer")


def _matrix_figure(rows: Sequence[str], columns: Sequence[str], values: Any, measure: str) -> Figure:
    """A heat map with its numbers; NaN is left blank."""
    with paper_figure(2.2 + 0.62 * len(columns), 1.7 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            colour = "white" if value < (low + high) / 2 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="victim", ylabel="surrogate")
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=measure, shrink=0.9)
    return figure
