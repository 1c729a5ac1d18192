"""The report of one run: files of its directory -> report.html. Its charts serve other pages too."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_files import command_of, reading
from robusthash.apps.experiment.table_text import WORDS, copy_table
from robusthash.apps.reports.charts import (
    TONES,
    UNIT,
    Chart,
    ChartAxis,
    Dot,
    IntervalChart,
    LineChart,
    Series,
    Tone,
)
from robusthash.apps.reports.example_searches import load_examples
from robusthash.apps.reports.pages import WORST_CASE, notes, number, remark, render, stored_as
from robusthash.core.atomic_files import write_arrays, write_text
from robusthash.core.limited_files import read_npz
from robusthash.data.base import Split
from robusthash.data.splits import stable_subset
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult, Flag, by_direction
from robusthash.models.drfgd import ImageRegenerator
from robusthash.models.hasher import Hasher, frozen
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.specs.published_suite import LEGACY, published

Results = Mapping[str, EvalResult]
"""Results of a run by name: ``clean``, each attack, ``worst``; over several directions ``I2T clean``, ..."""

BRANCHES = "branches.npz"

_ORIGIN = {"parent": "started from the run", "resumed_from": "goes on from the run"}
_GROUPS = ("white-box", "adaptive", "refined", "transfer", "black-box", "noise")


def write_report(run: Run) -> Path:
    """Write ``report.html`` of an evaluated run: one file that opens from disk.

    Raises:
        RunError: the run has not been trained or evaluated.
    """
    page = run_page(run, list(run.assessed().values()), run.checked())
    write_text(run.path / "report.html", page)
    return run.path / "report.html"


def run_page(run: Run, suites: Sequence[EvalResult] = (), checked: Sequence[Flag] = ()) -> str:
    """The page of one run.

    Args:
        suites: results of suites of attacks.
        checked: flags that ``check`` raised on the model.
    """
    card, results, quoted = run.card(), run.evaluated(), shlex.quote(str(run.path))
    folder = _folder(run.config.data)
    groups = by_direction(results)
    clean = next(iter(groups.values()))["clean"]
    return render(
        "run_report.html.j2",
        title=f"{card['name']}: {card['bits']} bits on {folder or clean.setting.queries.partition(':')[0]}",
        results=results,
        groups=[{**group_data(group), "context": context} for context, group in groups.items()],
        unreliable=unreliable_names(suites, checked),
        suites=sorted(map(suite_data, suites), key=lambda suite: suite["published"]),
        branches=load_branches(run.path),
        examples=load_examples(run.path),
        origin={_ORIGIN.get(name, name): path for name, path in run.origin.items()},
        card=card,
        training=training_chart(run.lines()),
        commands=[command_of(run.path), f"robusthash evaluate {quoted}", f"robusthash report {quoted}"],
    )


def _folder(data: Mapping[str, Any] | str) -> str:
    """The name of the user's own folder of images, where the data are that."""
    if isinstance(data, str) or data["name"] not in ("copies", "folder"):
        return ""
    return Path(data.get("root") or "").name


def group_data(results: Results) -> dict[str, Any]:
    """Results of one direction and relevance as the template ``results`` takes them."""
    untargeted = {name: result for name, result in results.items() if is_untargeted(name, result)}
    targeted = {name: r for name, r in results.items() if name != "worst" and name not in untargeted}
    measure = results["clean"].setting.headline
    charts = [pr_chart(_with_tones(untargeted)), precision_chart(_with_tones(untargeted))]
    if targeted:
        tones = _with_tones(targeted)
        charts += [pr_chart(tones, targets=True), precision_chart(tones, targets=True)]
    if "worst" in results:
        charts.insert(0, interval_chart({measure: results}, {measure: "b"}, "Values"))
    ending, stored = stored_as(results.values())
    return {
        "results": results,
        "measure": measure,
        "ending": ending,
        "stored": stored,
        "targeted": bool(targeted),
        "charts": charts,
        "copies": copy_table(results),
        "changes": WORDS,
        "notes": notes(results),
    }


def is_untargeted(name: str, result: EvalResult) -> bool:
    """Clean queries or an untargeted attack: neither a target nor the worst case over several."""
    return name != "worst" and result.setting.key.name("targeted") not in result.values


# ---------------------------------------------------------------------------------------------- suites


def unreliable_names(results: Sequence[EvalResult], checked: Sequence[Flag]) -> list[str]:
    """The results against which a red flag stands; a red flag of the model stands against every number.

    Args:
        checked: flags that ``check`` raised on the model.
    """
    red = [flag.id for flag in checked if flag.level == "red"]
    names = [f"every number of this model ({', '.join(red)})"] * bool(red)
    return names + [result.name for result in results if result.unreliable]


def suite_data(result: EvalResult) -> dict[str, Any]:
    """A result as the template ``suite_section`` takes it."""
    key, measure = result.setting.key, result.setting.headline
    is_published = published(result.setting.tier)
    untargeted = {name: attack for name, attack in result.attacks.items() if measure in attack}
    groups: dict[str, dict[str, Mapping[str, float]]] = {group: {} for group in _GROUPS}
    for name, attack in sorted(untargeted.items(), key=lambda item: item[1][measure]):
        groups["white-box" if is_published else _group(name, attack, result)][name] = attack
    ending, stored = stored_as([result])
    return {
        "result": result,
        "measure": measure,
        "worst_case": WORST_CASE,
        "published": is_published,
        "remark": remark(result.flags, True),
        "ending": ending,
        "stored": stored,
        "count": len(untargeted),
        "groups": {group: attacks for group, attacks in groups.items() if attacks},
        "legacy": LEGACY if any(LEGACY in attack for attack in untargeted.values()) else None,
        "targeted": {name: each for name, each in result.attacks.items() if key.name("targeted") in each},
        "curve": _curve(result),
        "raised": _flags(result, "red") + _flags(result, "amber"),
        "passed": _flags(result, "pass"),
    }


def _group(name: str, attack: Mapping[str, float], result: EvalResult) -> str:
    """The knowledge of an attack; the setting lists all attacks but the adaptive ones."""
    if name not in result.setting.attacks:
        return "adaptive"
    for group in ("refined", "transfer"):
        if name.startswith(f"{group} "):
            return group
    if attack.get("oracle", 0) > 0:
        return "noise" if name.endswith("noise") or name == "random edits" else "black-box"
    return "white-box"


def _flags(result: EvalResult, level: str) -> list[dict[str, Any]]:
    """Flags of a level, with the titles of their checks."""
    return [
        {
            **asdict(flag),
            "title": CHECKS[flag.id].title if flag.id in CHECKS else "",
            "value": f"{flag.value:.3g}" if math.isfinite(flag.value) else "–",
        }
        for flag in result.flags
        if flag.level == level
    ]


def _curve(result: EvalResult) -> Chart | None:
    """The worst case over budgets, where it was run."""
    key = result.setting.key
    low = key.name("worst")
    curve = result.curves.get(key.name("worst", option="eps"))
    if curve is None:
        return None
    budgets, values = curve["eps"].tolist(), curve[low].tolist()
    lows, highs = zip(*(result.interval[key.name("worst", eps=eps)] for eps in budgets), strict=True)
    of_images = result.setting.threat.startswith("img-linf")
    x = [eps * 255 for eps in budgets] if of_images else budgets
    mark = " (UNRELIABLE)" if result.unreliable else ""
    return LineChart(
        title=f"{low} over eps",
        description=f"{low} falls from {number(values[0])} to {number(values[-1])}",
        series=[Series(f"{low}{mark}", x, values, "b", result.unreliable, True, lows, highs)],
        x=ChartAxis("eps, in 1/255" if of_images else "eps", [max(x) * step / 4 for step in range(5)]),
        y=ChartAxis(low, UNIT),
        reference=("chance", result.reference["chance"]),
    )


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
        key = result.setting.key.name("worst" if name == "worst" else "")
        if name == "worst" or is_untargeted(name, result):
            dots = [Dot(m, named[name][key], *named[name].interval[key]) for m, named in models.items()]
            rows.append(("worst case" if name == "worst" else name, dots))
    described = "; ".join(f"{name}: {', '.join(number(dot.value) for dot in dots)}" for name, dots in rows)
    return IntervalChart(
        title=f"{measure}, clean and attacked",
        description=f"{names or ', '.join(models)}. {described}.",
        rows=rows,
        tones=tones,
        x=ChartAxis(f"{measure} with 95 % interval", UNIT),
        reference=("chance", first["clean"].reference["chance"]),
    )


ToneTable = Mapping[str, tuple[EvalResult, Tone, bool]]
"""Results by name, each with its tone and whether it is dashed."""


def _with_tones(results: Results) -> ToneTable:
    return {name: (result, TONES[i % 6], i >= 6) for i, (name, result) in enumerate(results.items())}


def pr_chart(results: ToneTable, targets: bool = False) -> Chart | None:
    """Precision over recall by rank, of the target labels where ``targets``; None without such a curve."""
    series = _curve_series(results, MeasureKey("PR").name("targeted" if targets else ""), "recall")
    if not series:
        return None
    described = [f"{line.name}: precision {line.y[len(line.y) // 2]:.2f} at half recall" for line in series]
    return LineChart(
        title=f"Precision and recall{' of the target labels' * targets}",
        description="; ".join(described),
        series=series,
        x=ChartAxis("recall", UNIT),
        y=ChartAxis("precision", UNIT),
    )


def precision_chart(results: ToneTable, targets: bool = False) -> Chart | None:
    """Precision of the first N, of the target labels where ``targets``; None without such a curve."""
    series = _curve_series(results, MeasureKey("P@N").name("targeted" if targets else ""), "n")
    if not series or max(len(line.x) for line in series) < 2:
        return None
    longest = max(series, key=lambda line: len(line.x))
    return LineChart(
        title=f"Precision of the first N{' of the target labels' * targets}",
        description="; ".join(f"{line.name}: {line.y[0]:.2f} at {line.x[0]:.0f}" for line in series),
        series=series,
        x=ChartAxis("N", _ticks(0, longest.x[-1])),
        y=ChartAxis("precision", UNIT),
    )


def _curve_series(results: ToneTable, name: str, axis: str) -> list[Series]:
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
        x=ChartAxis("epoch", _ticks(epochs[0], epochs[-1], whole=True)),
        y=ChartAxis("weighted loss term", _ticks(min(0.0, *values), max(values))),
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


def save_branches(folder: Path, victim: Hasher, queries: Split) -> None:
    """Write ``branches.npz``: query images, what a purifier makes of them, and heat maps of its branches.

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
    write_arrays(folder / BRANCHES, **{name: value.cpu().numpy() for name, value in arrays.items()})


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
    with reading(path, "evaluate the run again"):
        arrays = read_npz(path, names)
        images, samples, robust, fragile = (torch.from_numpy(arrays[name]) for name in names)
    heat = {"robust branch": _overlaid(images, robust), "fragile branch": _overlaid(images, fragile)}
    return {"query": images, "regenerated": samples, **heat}


def _overlaid(images: Tensor, heat: Tensor) -> Tensor:
    """(n, 3, H, W) images in grey, dimmed, with the heat on them from dark over orange to yellow."""
    grey = images.mean(1, keepdim=True)
    colour = torch.stack([heat, 0.8 * heat.square(), 0.1 * heat], 1)
    return (0.35 * grey + 0.65 * colour).clamp(0, 1)
