"""The demo's page: what was searched, what the attack changed, what hardening kept, and every number behind
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robusthash.apps.reports import html
from robusthash.apps.reports.charts import UNIT, Axis, Series, Tone, line_chart
from robusthash.apps.reports.html import Child, Markup, tag
from robusthash.apps.reports.run_report import (
    Results,
    is_untargeted,
    map_chart,
    model_facts,
    notes,
    number,
    perceptibility_table,
    pr_chart,
    results_table,
    setting_facts,
    versions_line,
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
    """One result of a search, ready to be shown."""

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
    """The whole page. ``summary`` is that of ``demo.summarise``."""
    return html.page(
        "A photo search that works, is broken, and is hardened",
        [tag("p", _verdict(summary)), tag("p", _HONESTY, class_="note")],
        _tiles(summary),
        html.section(
            "One query, four searches",
            tag("p", example.rule),
            _shots(example),
            tag("div", [_search(search) for search in example.searches], class_="searches"),
            _hits_note(),
            slug="example",
        ),
        html.section(
            "How much, on average",
            tag(
                "div",
                _comparison(summary, results),
                tag("div", _dots(results), _checks(summary)),
                class_="pair",
            ),
            tag("div", _eps_chart(summary, curves), _pr(results), class_="pair"),
            notes(result for found in results.values() for result in found.values()),
            slug="numbers",
        ),
        html.section(
            "Every attack",
            [
                [tag("h3", TITLES[model]), results_table(found), perceptibility_table(found)]
                for model, found in results.items()
            ],
            slug="attacks",
        ),
        html.section("Time taken", _times(summary), slug="time"),
        html.section("Commands", html.commands(summary["commands"]), slug="commands"),
        html.section(
            "Data, models, setting",
            _data(summary),
            tag("div", [_model(summary, model) for model in results], class_="pair"),
            tag("h3", "Setting of the evaluation"),
            setting_facts(results["saat"]["worst"], results["saat"]),
            slug="setting",
        ),
        foot=f"{versions_line(results['saat']['clean'])}; seed {summary['seeds']['training']}; "
        f"torch threads: {summary['threads']}",
    )


def _verdict(summary: Mapping[str, Any]) -> list[Child]:
    before, after = summary["undefended"], summary["saat"]
    attacks = len(summary["attacks"]) - sum("t-map" in before[name] for name in summary["attacks"])
    return [
        f"The undefended hasher finds copies of a photograph with a MAP of {number(before['clean']['map'])}. Changes "
        f"of at most {_budget(summary)} in each pixel bring it down to ",
        tag("b", number(before["worst"]["map"]), class_="undefended"),
        f" in the worst case over {attacks} attacks. After hardening by SAAT the same attacks leave ",
        tag("b", number(after["worst"]["map"]), class_="saat"),
        f", and clean queries reach {number(after['clean']['map'])}. A random order would give "
        f"{number(summary['chance'])}.",
    ]


def _budget(summary: Mapping[str, Any]) -> str:
    found = {settings.get("eps", 8 / 255) for settings in summary["attacks"].values()}
    return " or ".join(f"{eps * 255:g}/255" for eps in sorted(found))


_HONESTY = (
    "Read with care: one training seed, one small encoder, twenty photographs, and attacks of few steps. A longer "
    "attack finds more. The numbers show the method at work; they are no benchmark."
)


def _tiles(summary: Mapping[str, Any]) -> Markup:
    made = []
    for model, title in TITLES.items():
        found = summary[model]
        remark = f"clean → worst case, {_span(found['worst'])}; of 8-bit images {number(found['worst']['map-8bit'])}"
        text = f"{number(found['clean']['map'])} → {number(found['worst']['map'])}"
        made.append((f"MAP, {title}", text, remark))
    checks = summary["checks"]
    made.append(
        ("worst case", f"{checks['saat worst / undefended worst']:.1f} ×", "hardened to undefended MAP")
    )
    change = checks["saat clean / undefended clean"] - 1
    made.append(("clean queries", f"{change:+.1%}".replace("-", "−"), "hardened against undefended MAP"))
    return html.tiles(made)


def _span(numbers: Mapping[str, Any]) -> str:
    return "95 % interval {:.3f} to {:.3f}".format(*numbers["map-interval"])


# ---------------------------------------------------------------------------------------------- the example


def _shots(example: Example) -> Markup:
    """The query, and for each model the attacked query and the perturbation made visible."""
    gain = 0.5 / example.eps
    shots = [(example.searches[0].image, "the query", f"{example.name}; as the models see it")]
    for search in example.searches:
        if search.attacked:
            delta = search.image - example.searches[0].image
            title = TITLES[search.model]
            shots.append((search.image, f"attacked: {title}", f"by {example.attack}, as sent to the search"))
            shots.append((0.5 + gain * delta, f"its change × {gain:.0f}", _norms(search)))
    figures = [
        tag("figure", html.picture(image, f"{name}, {text}"), tag("figcaption", tag("b", name), text))
        for image, name, text in shots
    ]
    return tag("div", figures, class_="shots")


def _norms(search: Search) -> str:
    found = search.measures
    parts = [
        f"L∞ {found['linf'] * 255:.1f}/255",
        f"L2 {found['l2']:.2f}",
        f"PSNR {number(found['psnr'], 1)} dB",
    ]
    return ", ".join([*parts, f"SSIM {found['ssim']:.3f}"]) + "; grey is no change"


def _search(search: Search) -> Markup:
    state = "attacked" if search.attacked else "clean"
    right = sum(hit.relevant for hit in search.hits)
    what = tag(
        "div",
        html.picture(search.image, f"{state} query sent to the {TITLES[search.model]} model"),
        tag(
            "div",
            tag("b", TITLES[search.model], class_=search.model),
            tag("span", f"{state} query"),
            tag("span", f"AP {number(search.ap)}, {right} of {len(search.hits)} right"),
        ),
        class_="what",
    )
    return tag("div", what, tag("ol", [_hit(hit) for hit in search.hits], class_="hits"), class_="search")


def _hit(hit: Any) -> Markup:
    word = "relevant" if hit.relevant else "not relevant"
    return tag(
        "li",
        html.picture(hit.picture, f"{hit.name}, {word}, distance {hit.distance}"),
        tag("span", "✓ " if hit.relevant else "✗ ", class_="mark", aria_hidden="true"),
        f"d = {hit.distance}",
        class_="yes" if hit.relevant else "no",
    )


def _hits_note() -> Markup:
    return tag(
        "p",
        "The eight nearest items of each model's index, nearest first, by (distance, id); d is the Hamming distance of "
        "the codes. A full frame and ✓ mark other windows of the same photograph, a dashed frame and ✗ all else. "
        "Results are drawn larger than the models see them. Each model is attacked with full knowledge of it.",
        class_="note",
    )


# ---------------------------------------------------------------------------------------------- the numbers


def _comparison(summary: Mapping[str, Any], results: Mapping[str, Results]) -> Markup:
    """Clean, attacked and worst MAP of both models, side by side."""
    names = list(summary["saat"])
    rows: list[list[Child]] = []
    for name in names:
        for key, label in (("map", "MAP"), ("t-map", "t-MAP")):
            if key not in summary["saat"][name]:
                continue
            found = [summary[model][name] for model in results]
            text = "worst case per query" if name == "worst" else name
            if "t-map" in summary["saat"][name]:
                text += f": {label}"
            cells: list[Child] = []
            for numbers in found:
                low, high = numbers[f"{key}-interval"]
                cells.append([number(numbers[key]), tag("span", f"{low:.3f} to {high:.3f}", class_="span")])
            ratio = found[1][key] / found[0][key] if found[0][key] else float("inf")
            rows.append([text, *cells, f"{ratio:.2f}"])
    rows.append(["chance", *[number(summary["chance"])] * len(results), "–"])
    caption = (
        f"MAP over the whole database with 95 % bootstrap intervals over {summary['queries']} queries; untargeted and "
        "worst: higher is more robust; t-MAP is what a targeted attacker gains: lower is more robust. The worst case "
        "takes, for each query, the lowest AP over clean and untargeted attacks. Every item has one label here, so "
        "CgAT's center code is the mainstay code, and the two attacks differ in their random start alone. Ratio: "
        "hardened to undefended."
    )
    return html.table(
        ["", *(TITLES[model] for model in results), "ratio"],
        rows,
        caption,
        [names.index("worst") + _extra(summary)],
    )


def _extra(summary: Mapping[str, Any]) -> int:
    """Rows that targeted attacks add before the worst case."""
    return sum("t-map" in numbers for numbers in summary["saat"].values())


def _dots(results: Mapping[str, Results]) -> Markup:
    return map_chart(
        {TITLES[model]: found for model, found in results.items()},
        {TITLES[model]: TONES[model] for model in results},
    )


def _eps_chart(summary: Mapping[str, Any], curves: Mapping[str, Curve]) -> Markup:
    series, described = [], []
    for model, curve in curves.items():
        low, high = zip(*curve.interval, strict=True)
        series.append(
            Series(TITLES[model], curve.eps, curve.mean, TONES[model], dots=True, low=low, high=high)
        )
        described.append(f"{TITLES[model]}: " + ", ".join(number(value, 2) for value in curve.mean))
    curve = next(iter(curves.values()))
    return line_chart(
        "MAP against eps",
        "; ".join(described) + f" at {', '.join(str(eps) for eps in curve.eps)} of 255.",
        series,
        Axis("eps (of 255)", curve.eps),
        Axis("MAP", UNIT),
        ("chance", summary["chance"]),
        f"{curve.attack} on the first {curve.ap.shape[1]} queries, bands: 95 % intervals. Each query keeps the lowest "
        "AP found at this or a smaller budget, which this one allows as well; so the curves never rise.",
    )


def _pr(results: Mapping[str, Results]) -> Markup | None:
    lines = {}
    for model, found in results.items():
        attacks = {
            name: result for name, result in found.items() if is_untargeted(name, result) and name != "clean"
        }
        strongest = min(attacks, key=lambda name: attacks[name][attacks[name].setting.headline])
        lines[f"{TITLES[model]}, clean"] = (found["clean"], TONES[model], False)
        lines[f"{TITLES[model]}, {strongest}"] = (attacks[strongest], TONES[model], True)
    return pr_chart(
        lines,
        "By rank, ties in expectation, averaged over queries; attacked by the attack of the lowest MAP of each model.",
    )


def _checks(summary: Mapping[str, Any]) -> Markup:
    """What the demo set out to show, and whether it does."""
    checks = summary["checks"]
    wanted = [
        ("undefended: worst / clean MAP", checks["undefended worst / clean"], "below 0.5", lambda v: v < 0.5),
        (
            "worst MAP: hardened / undefended",
            checks["saat worst / undefended worst"],
            "at least 1.5",
            lambda v: v >= 1.5,
        ),
        (
            "clean MAP: hardened / undefended",
            checks["saat clean / undefended clean"],
            "at least 0.85",
            lambda v: v >= 0.85,
        ),
    ]
    rows = [
        [name, f"{value:.2f}", goal, "✓ yes" if holds(value) else "✗ no"]
        for name, value, goal, holds in wanted
    ]
    return html.table(["", "measured", "wanted", "holds"], rows, "What the demo is meant to show")


# ---------------------------------------------------------------------------------------------- the
# circumstances


def _times(summary: Mapping[str, Any]) -> Markup:
    seconds = {name: value for name, value in summary["seconds"].items() if name != "this call"}
    rows = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    rows.append(["these together", f"{sum(seconds.values()):.0f}"])
    rows.append(["the call that wrote this report", f"{summary['seconds']['this call']:.0f}"])
    caption = (
        f"Seconds on the clock; torch threads: {summary['threads']}. A call that goes on skips what is done."
    )
    return html.table(["", "s"], rows, caption, [len(rows) - 2])


def _data(summary: Mapping[str, Any]) -> Markup:
    data = summary["data"]
    sizes = ", ".join(f"{count} {name}" for name, count in data["sizes"].items())
    prints = ", ".join(f"{name} {value}" for name, value in data["fingerprints"].items())
    return html.facts(
        [
            ("data", f"{data['name']}: {sizes}; {data['labels']} labels"),
            ("note", data["note"]),
            ("fingerprints", tag("code", prints)),
            ("training items in the database", data["train_in_database"]),
            ("the example", f"query {summary['example']['query']}, {summary['example']['photograph']}"),
        ]
    )


def _model(summary: Mapping[str, Any], model: str) -> Markup:
    return tag("div", tag("h3", TITLES[model]), model_facts(summary["models"][model]))
