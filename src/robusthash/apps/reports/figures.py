"""Runs and sweeps -> figures for papers: what each has measured is drawn, what it has not is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robusthash.analysis.band_attribution import BandAttribution
from robusthash.apps.experiment.attribution_run import ATTRIBUTION, load_attributions
from robusthash.apps.experiment.epoch_curves import log_curves, values_of
from robusthash.apps.experiment.parameter_sweep import SweepRow
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_selection import labelled
from robusthash.apps.experiment.tables import Row, context_of, headline_of, make_rows, seeds_by_row
from robusthash.apps.reports.plots import (
    Line,
    Measured,
    band_plot,
    bar_plot,
    line_plot,
    matrix_plot,
    require_matplotlib,
    save,
    scatter_plot,
)
from robusthash.metrics.results import EvalResult, by_direction

Drawn = list[Path]


def draw_runs(paths: Sequence[Path], out: Path) -> tuple[Drawn, list[str]]:
    """Every figure that the results, logs and attributions of these runs allow, as PDF and PNG in ``out``.

    Runs of one recipe are its seeds and are averaged. Written are, for each direction or relevance,
    ``attacks`` (bars), ``targeted`` (bars of t-MAP), ``scatter``, and curves: ``pr`` (precision and recall),
    ``pr-attacked`` and ``pr-targeted``, of the target labels, and likewise ``pn`` (precision of the first N);
    ``eps`` where a suite drew curves over budgets; ``bands`` where every run was attributed; and ``loss``
    with the training loss.

    Returns:
        The files, and a note for every recipe that the scatter leaves out.

    Raises:
        RunError: a run that has not been evaluated.
        ValueError: runs that no table may hold together.
    """
    require_matplotlib()
    rows = make_rows(paths)
    by_name = seeds_by_row(paths)
    results = {name: [run.evaluated() for run in runs] for name, runs in by_name.items()}
    out.mkdir(parents=True, exist_ok=True)
    drawn: Drawn = []
    notes = [
        f"{row.name} is not in the scatter: its seeds were not all evaluated under the same attacks"
        for row in rows
        if not all(f"{context} worst".strip() in row.cells for context in row.chance)
    ]
    for context in rows[0].chance:
        drawn += _tables(rows, results, context, out)
        drawn += _curves(results, context, out)
    drawn += _budgets(by_name, out)
    drawn += _bands_of_runs(paths, out)
    return drawn + _losses(by_name, out), notes


def _ending(context: str) -> str:
    return f"-{context.replace(' ', '-')}" if context else ""


Results = Mapping[str, Sequence[Mapping[str, EvalResult]]]
"""Results by recipe, seed and name."""


def _tables(rows: Sequence[Row], results: Results, context: str, out: Path) -> Drawn:
    """Bars of every attack, and clean against worst."""
    untargeted: dict[str, dict[str, Measured]] = {}
    targeted: dict[str, dict[str, Measured]] = {}
    points: dict[str, tuple[Measured, Measured]] = {}
    measures: dict[str, str] = {}
    for row in rows:
        own = {name: cell for name, cell in row.cells.items() if context_of(name, row.chance) == context}
        for name, cell in own.items():
            short = name.removeprefix(context).strip()
            measure = headline_of(results[row.name][0][name])
            measures[short] = measure
            group = targeted if measure.startswith("t-") else untargeted
            group.setdefault(short, {})[row.name] = (cell.value, cell.interval)
        ends = [f"{context} {name}".strip() for name in ("clean", "worst")]
        if all(name in own for name in ends):
            clean, worst = (own[name] for name in ends)
            points[row.name] = (clean.value, clean.interval), (worst.value, worst.interval)
    chance = rows[0].chance[context]
    untargeted = _worst_last(untargeted)
    drawn = save(bar_plot(untargeted, measures["clean"], chance), out / f"attacks{_ending(context)}")
    if targeted:
        first = measures[next(iter(targeted))]
        drawn += save(bar_plot(targeted, f"{first} (higher is worse)"), out / f"targeted{_ending(context)}")
    if points:
        figure = scatter_plot(
            points, f"{measures['clean']}, clean", f"{measures['worst']}, worst case", chance
        )
        drawn += save(figure, out / f"scatter{_ending(context)}")
    return drawn


def _worst_last(groups: dict[str, dict[str, Measured]]) -> dict[str, dict[str, Measured]]:
    return dict(sorted(groups.items(), key=lambda item: (item[0] == "worst", item[0] != "clean")))


_CURVES = {"pr": ("PR", "recall", "recall"), "pn": ("P@N", "n", "N")}
"""By stem of the file: curve of a result, its axis across, and what that is called."""


def _curves(results: Results, context: str, out: Path) -> Drawn:
    """Precision over recall and over N: clean, under the attack that is strongest on each model, and of
    target labels.

    The strongest is the one of lowest MAP, of targeted ones that of highest t-MAP; bands span the seeds.
    """
    shown: dict[str, dict[str, list[EvalResult]]] = {"": {}, "-attacked": {}, "-targeted": {}}
    for name, seeds in results.items():
        groups = [by_direction(found)[context] for found in seeds]
        shown[""][name] = [group["clean"] for group in groups]
        shown["-attacked"][name] = _strongest(groups, "ASR", min)
        shown["-targeted"][name] = _strongest(groups, "t-ASR", max)
    drawn: Drawn = []
    for stem, (curve, axis, label) in _CURVES.items():
        for ending, models in shown.items():
            wanted = f"t-{curve}" if ending == "-targeted" else curve
            lines = [
                line
                for name, seeds in models.items()
                for line in _curve_over_seeds(name, seeds, wanted, axis)
            ]
            if lines:
                height = "precision of the target labels" if ending == "-targeted" else "precision"
                drawn += save(
                    line_plot(lines, label, height, unit=True), out / f"{stem}{ending}{_ending(context)}"
                )
    return drawn


def _strongest(
    groups: Sequence[Mapping[str, EvalResult]], mark: str, best: Callable[..., EvalResult]
) -> list[EvalResult]:
    """Of each seed the attack of lowest or highest headline, among those whose values hold ``mark``; none if
    one has no such attack."""
    found = [
        best(attacks, key=lambda result: result[headline_of(result)])
        for group in groups
        if (attacks := [r for n, r in group.items() if n not in ("clean", "worst") and mark in r.values])
    ]
    return found if len(found) == len(groups) else []


def _curve_over_seeds(name: str, seeds: Sequence[EvalResult], curve: str, axis: str) -> list[Line]:
    """One curve, where the protocol keeps it: mean over seeds, and their span where there are several."""
    if not seeds or not all(curve in result.curves for result in seeds):
        return []
    return [
        _spanned(name, seeds[0].curves[curve][axis], [result.curves[curve]["precision"] for result in seeds])
    ]


def _spanned(name: str, x: Tensor, seeds: Sequence[Tensor]) -> Line:
    values = torch.stack([seed.to(torch.float64) for seed in seeds])
    band = (values.amin(0).tolist(), values.amax(0).tolist()) if len(seeds) > 1 else ((), ())
    return Line(name, x.tolist(), values.mean(0).tolist(), *band)


def _budgets(by_name: Mapping[str, Sequence[Run]], out: Path) -> Drawn:
    """Curves over budgets of assessed runs: each with an ``eps`` axis, in units of 1/255; bands span the
    seeds."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Tensor]]]] = {}
    for name, runs in by_name.items():
        for run in runs:
            for result in run.assessed().values():
                for curve in (axes for axes in result.curves.values() if "eps" in axes):
                    for measure in (axis for axis in curve if axis != "eps"):
                        found.setdefault((result.name, measure), {}).setdefault(name, []).append(curve)
    drawn: Drawn = []
    for (named, measure), models in found.items():
        lines = [
            _spanned(n, seeds[0]["eps"] * 255, [seed[measure] for seed in seeds])
            for n, seeds in models.items()
        ]
        stem = f"eps-{named}-{measure}".replace(" ", "-").replace("/", "-").replace("@", "-at-")
        drawn += save(line_plot(lines, "eps (1/255)", measure, unit=True), out / stem)
    return drawn


def _bands_of_runs(paths: Sequence[Path], out: Path) -> Drawn:
    files = [path / ATTRIBUTION for path in paths]
    if not all(path.is_file() for path in files):
        return []
    labels = list(labelled(paths))
    maps = {
        label: next(iter(load_attributions(path).values())) for label, path in zip(labels, files, strict=True)
    }
    return draw_bands(maps, out)


def draw_bands(found: Mapping[str, BandAttribution], out: Path) -> Drawn:
    """``bands``: heat maps side by side; ``bands-share``: how much of the worth the lowest frequencies make.

    Raises:
        ValueError: attributions of different worths.
    """
    worths = sorted({one.worth for one in found.values()})
    if len(worths) > 1:
        raise ValueError(
            f"attributions of different worths, {worths}, cannot share a figure; attribute them alike"
        )
    measure = {"tau": "share in Kendall's tau-b", "ap": "share in AP"}[worths[0]]
    drawn = save(
        band_plot({name: (one.mean, one.mean_error) for name, one in found.items()}, measure), out / "bands"
    )
    lines = []
    for name, one in found.items():
        values, errors = one.by_order()
        # the share of all that lies at or below an order; its error is that of the images
        lines.append(
            Line(
                name,
                list(range(len(values))),
                values.tolist(),
                (values - 2 * errors).tolist(),
                (values + 2 * errors).tolist(),
            )
        )
    figure = line_plot(
        lines, "u + v of the highest band counted", "share of all attribution", unit=True, whiskers=True
    )
    return drawn + save(figure, out / "bands-share")


def _losses(by_name: Mapping[str, Sequence[Run]], out: Path) -> Drawn:
    lines = []
    for name, runs in by_name.items():
        curves = [log_curves(run)["loss"] for run in runs]
        shortest = min(len(epochs) for epochs, _ in curves)
        values = [torch.tensor(loss[:shortest]) for _, loss in curves]
        lines.append(_spanned(name, torch.tensor(curves[0][0][:shortest]), values))
    return save(line_plot(lines, "epoch", "training loss (own units of each)"), out / "loss")


def draw_log(label: str, run: Run, out: Path) -> Drawn:
    """``convergence-LABEL``: every loss term of a run by epoch; ``seconds-LABEL``: the time of each."""
    curves = log_curves(run)
    seconds = curves.pop("seconds")
    terms = {name: curve for name, curve in curves.items() if not name.startswith("gate/")}
    stem = label.replace("/", "-")
    lines = [Line(name, epochs, values) for name, (epochs, values) in terms.items()]
    positive = all(value > 0 for _, values in terms.values() for value in values)
    drawn = save(line_plot(lines, "epoch", "loss term", log=positive), out / f"convergence-{stem}")
    return drawn + save(
        line_plot([Line(label, *seconds)], "epoch", "seconds", unit=True), out / f"seconds-{stem}"
    )


def draw_robust(found: Mapping[str, Mapping[str, Mapping[int, EvalResult]]], out: Path) -> Drawn:
    """``robust-curves``: clean and attacked MAP by epoch of each run, with intervals over queries."""
    lines, measure = [], ""
    for label, results in found.items():
        for name, by_epoch in results.items():
            measure, (epochs, values), (low, high) = values_of(by_epoch)
            lines.append(Line(f"{label}: {name}", epochs, values, low, high))
    return save(line_plot(lines, "epoch", measure, unit=True), out / "robust-curves")


def draw_sweep(rows: Sequence[SweepRow], measure: str, out: Path) -> Drawn:
    """``sweep``: results over the values of the first axis; a line for every result and setting of the other
    axes."""
    done = [row for row in rows if row.cells]
    if not done:
        return []
    first, *others = done[0].values
    ticks = list(dict.fromkeys(row.values[first] for row in done))
    numeric = all(_is_number(value) for value in ticks)
    groups: dict[str, list[SweepRow]] = {}
    for row in done:
        setting = ", ".join(f"{path.rpartition('.')[2]} {row.values[path]}" for path in others)
        groups.setdefault(setting, []).append(row)
    lines = []
    for setting, members in groups.items():
        for name in members[0].cells:
            kept = [row for row in members if name in row.cells]
            x = [
                float(row.values[first]) if numeric else float(ticks.index(row.values[first])) for row in kept
            ]
            order = sorted(range(len(x)), key=x.__getitem__)
            cells = [kept[place].cells[name] for place in order]
            lines.append(
                Line(
                    f"{name}, {setting}" if setting else name,
                    [x[place] for place in order],
                    [cell.value for cell in cells],
                    [cell.interval[0] for cell in cells],
                    [cell.interval[1] for cell in cells],
                )
            )
    return save(line_plot(lines, first, measure, ticks=() if numeric else ticks, unit=True), out / "sweep")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def draw_transfer_file(path: Path, out: Path) -> Drawn:
    """``transfer``: what attacks made on each surrogate (down) leave of each victim (across).

    Args:
        path: JSON of ``robusthash transfer --json``: ``surrogates`` and ``victims``, names; ``attacked``, a
            row for each surrogate, null where not measured; and ``measure``.

    Raises:
        ValueError: another content.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    wanted = ("surrogates", "victims", "attacked", "measure")
    if not isinstance(found, dict) or not all(key in found for key in wanted):
        raise ValueError(f"{path} is no transfer matrix: it needs {', '.join(wanted)}")
    values = [[float("nan") if value is None else value for value in row] for row in found["attacked"]]
    figure = matrix_plot(
        found["surrogates"], found["victims"], values, "victim", "surrogate", found["measure"]
    )
    return save(figure, out / "transfer")
