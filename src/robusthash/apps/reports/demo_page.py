"""The demo's page: photographs searched, attacked and searched again by a hardened model, with every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robusthash.apps.reports.charts import UNIT, Axis, Chart, LineChart, Series, Tone
from robusthash.apps.reports.pages import (
    Cell,
    CellLike,
    Facts,
    Table,
    Tiles,
    notes,
    number,
    render,
    setting_facts,
    span_text,
)
from robusthash.apps.reports.run_report import (
    Results,
    interval_chart,
    is_untargeted,
    model_facts,
    perturbation_tables,
    pr_chart,
    results_table,
)
from robusthash.metrics.statistics import bootstrap_interval

TITLES = {"undefended": "undefended", "saat": "hardened (SAAT)"}
TONES: dict[str, Tone] = {"undefended": "a", "saat": "b"}


@dataclass(frozen=True)
class Curve:
    """AP of some queries at each budget, under one attack and every smaller budget."""

    attack: str
    eps: tuple[int, ...]  # of 255
    ap: Tensor  # (E, Q) float64
    seconds: float

    @property
    def mean(self) -> list[float]:
        return self.ap.mean(1).tolist()

    @property
    def interval(self) -> list[tuple[float, float]]:
        """95 % bootstrap interval of each mean."""
        return [bootstrap_interval(row) for row in self.ap]


@dataclass(frozen=True)
class Hit:
    """One result of a search, ready to be drawn."""

    picture: Tensor  # (3, h, w) uint8
    name: str
    distance: int
    relevant: bool


@dataclass(frozen=True)
class Search:
    """One query image sent to the index of one model."""

    model: str
    attacked: bool
    image: Tensor  # (3, H, W) float, as the model sees it
    ap: float
    measures: dict[str, float]  # of the perturbation; empty for the clean image
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class Example:
    """The query of the pictures and why it was chosen."""

    query: int
    name: str
    rule: str
    attack: str
    eps: float
    searches: tuple[Search, ...]  # clean and attacked, for each model


def demo_page(
    summary: Mapping[str, Any], results: Mapping[str, Results], curves: Mapping[str, Curve], example: Example
) -> str:
    """The whole page. ``summary`` is that of ``demo_run.summarise``."""
    before, attacks = summary["undefended"], summary["attacks"]
    budgets = sorted({settings.get("eps", 8 / 255) for settings in attacks.values()})
    charts = interval_chart({TITLES[model]: found for model, found in results.items()},
                            {TITLES[model]: TONES[model] for model in results})  # fmt: skip
    return render(
        "demo.html.j2",
        title="A photo search that works, is broken, and is hardened",
        titles=TITLES,
        summary=summary,
        budget=" or ".join(f"{eps * 255:g}/255" for eps in budgets),
        untargeted=len(attacks) - sum("t-map" in before[name] for name in attacks),
        tiles=_tiles(summary),
        example=example,
        pictures=_pictures(example),
        comparison=_comparison(summary, results),
        intervals=charts,
        goals=_goals(summary["checks"]),
        eps_chart=_eps_chart(summary, curves),
        pr_chart=_pr_chart(results),
        notes=notes(result for found in results.values() for result in found.values()),
        tables={
            TITLES[m]: [results_table(found), *perturbation_tables(found)] for m, found in results.items()
        },
        times=_times(summary["seconds"], summary["threads"]),
        data=_data_facts(summary),
        models={TITLES[model]: model_facts(summary["models"][model]) for model in results},
        setting=setting_facts(results["saat"]["worst"], results["saat"]),
        software=results["saat"]["clean"].setting.software,
    )


def _tiles(summary: Mapping[str, Any]) -> Tiles:
    tiles: Tiles = []
    for model, title in TITLES.items():
        clean, worst = summary[model]["clean"], summary[model]["worst"]
        ends = f"95 % interval {span_text(worst['map-interval'])}"
        remark = f"clean → worst case, {ends}; of 8-bit images {number(worst['map-8bit'])}"
        tiles.append((f"MAP, {title}", f"{number(clean['map'])} → {number(worst['map'])}", remark))
    checks = summary["checks"]
    gain = f"{checks['saat worst / undefended worst']:.1f} ×"
    change = f"{checks['saat clean / undefended clean'] - 1:+.1%}".replace("-", "−")
    tiles.append(("worst case", gain, "hardened to undefended MAP"))
    return [*tiles, ("clean queries", change, "hardened against undefended MAP")]


def _pictures(example: Example) -> list[tuple[Tensor, str, str]]:
    """The query, and for each model the attacked query and the perturbation made visible, with captions."""
    gain, query = 0.5 / example.eps, example.searches[0].image
    pictures = [(query, "the query", f"{example.name}; as the models see it")]
    for search in (search for search in example.searches if search.attacked):
        name = f"attacked: {TITLES[search.model]}"
        pictures.append((search.image, name, f"by {example.attack}, as sent to the search"))
        size = search.measures
        norms = f"L∞ {size['linf'] * 255:.1f}/255, L2 {size['l2']:.2f}, PSNR {number(size['psnr'], 1)} dB"
        caption = f"{norms}, SSIM {size['ssim']:.3f}; grey is no change"
        pictures.append((0.5 + gain * (search.image - query), f"its change × {gain:.0f}", caption))
    return pictures


# ---------------------------------------------------------------------------------------------- numbers


def _comparison(summary: Mapping[str, Any], results: Mapping[str, Results]) -> Table:
    """Clean, attacked and worst MAP of both models, side by side."""
    rows: list[Sequence[CellLike]] = []
    marked = []
    for name, hardened in summary["saat"].items():
        for key, label in (("map", "MAP"), ("t-map", "t-MAP")):
            if key not in hardened:
                continue
            values = [summary[model][name] for model in results]
            text = "worst case per query" if name == "worst" else name
            cells = [Cell(number(each[key]), span_text(each[f"{key}-interval"])) for each in values]
            ratio = values[1][key] / values[0][key] if values[0][key] else float("inf")
            marked += [len(rows)] * (name == "worst")
            rows.append([f"{text}: {label}" if "t-map" in hardened else text, *cells, f"{ratio:.2f}"])
    rows.append(["chance", *[number(summary["chance"])] * len(results), "–"])
    caption = (
        f"MAP over the whole database with 95 % bootstrap intervals over {summary['queries']} queries; untargeted and "
        "worst: higher is more robust; t-MAP is what a targeted attacker gains: lower is more robust. The worst case "
        "takes, for each query, the lowest AP over clean and untargeted attacks. Every item has one label here, so "
        "CgAT's center code is the mainstay code, and the two attacks differ in their random start alone. Ratio: "
        "hardened to undefended."
    )
    return Table(["", *(TITLES[model] for model in results), "ratio"], rows, caption, marked)


def _eps_chart(summary: Mapping[str, Any], curves: Mapping[str, Curve]) -> Chart:
    series, described = [], []
    for model, curve in curves.items():
        low, high = zip(*curve.interval, strict=True)
        title = TITLES[model]
        series.append(Series(title, curve.eps, curve.mean, TONES[model], dots=True, low=low, high=high))
        described.append(f"{title}: " + ", ".join(number(value, 2) for value in curve.mean))
    curve = next(iter(curves.values()))
    return LineChart(
        title="MAP against eps",
        description="; ".join(described) + f" at {', '.join(map(str, curve.eps))} of 255.",
        series=series,
        x=Axis("eps (of 255)", curve.eps),
        y=Axis("MAP", UNIT),
        reference=("chance", summary["chance"]),
        caption=(
            f"{curve.attack} on the first {curve.ap.shape[1]} queries, bands: 95 % intervals. Each query keeps the "
            "lowest AP found at this or a smaller budget, which this one allows as well; so the curves never rise."
        ),
    )


def _pr_chart(results: Mapping[str, Results]) -> Chart | None:
    curves = {}
    for model, found in results.items():
        attacks = {n: r for n, r in found.items() if is_untargeted(n, r) and n != "clean"}
        strongest = min(attacks, key=lambda name: attacks[name][attacks[name].setting.headline])
        curves[f"{TITLES[model]}, clean"] = (found["clean"], TONES[model], False)
        curves[f"{TITLES[model]}, {strongest}"] = (attacks[strongest], TONES[model], True)
    return pr_chart(
        curves,
        "By rank, ties in expectation, averaged over queries; attacked by the attack of the lowest MAP of each model.",
    )


def _goals(checks: Mapping[str, float]) -> Table:
    """Ratios that the demo is meant to show, and whether it does."""
    before = checks["undefended worst / clean"]
    worst, clean = checks["saat worst / undefended worst"], checks["saat clean / undefended clean"]
    goals = [
        ("undefended: worst / clean MAP", before, "below 0.5", before < 0.5),
        ("worst MAP: hardened / undefended", worst, "at least 1.5", worst >= 1.5),
        ("clean MAP: hardened / undefended", clean, "at least 0.85", clean >= 0.85),
    ]
    rows = [[name, f"{value:.2f}", goal, "✓ yes" if holds else "✗ no"] for name, value, goal, holds in goals]
    return Table(["", "measured", "wanted", "holds"], rows, "What the demo is meant to show")


# ---------------------------------------------------------------------------------------------- circumstances


def _times(seconds: Mapping[str, float], threads: int) -> Table:
    parts = {name: value for name, value in seconds.items() if name != "this call"}
    rows = [[name, f"{value:.0f}"] for name, value in parts.items()]
    rows.append(["these together", f"{sum(parts.values()):.0f}"])
    rows.append(["the call that wrote this report", f"{seconds['this call']:.0f}"])
    caption = f"Seconds on the clock; torch threads: {threads}. A call that goes on skips what is done."
    return Table(["", "s"], rows, caption, [len(rows) - 2])


def _data_facts(summary: Mapping[str, Any]) -> Facts:
    data, example = summary["data"], summary["example"]
    sizes = ", ".join(f"{count} {name}" for name, count in data["sizes"].items())
    prints = ", ".join(f"{name} {value}" for name, value in data["fingerprints"].items())
    return [
        ("data", f"{data['name']}: {sizes}; {data['labels']} labels"),
        ("note", data["note"]),
        ("fingerprints", Cell(prints, element="code")),
        ("training items in the database", data["train_in_database"]),
        ("the example", f"query {example['query']}, {example['photograph']}"),
    ]
