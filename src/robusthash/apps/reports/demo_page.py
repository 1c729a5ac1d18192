"""The demo's page: photographs searched, attacked, and searched again by a hardened model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robusthash.apps.reports.charts import UNIT, Chart, ChartAxis, LineChart, Series, Tone
from robusthash.apps.reports.pages import notes, number, render
from robusthash.apps.reports.run_report import Results, group_data, interval_chart, is_untargeted, pr_chart
from robusthash.metrics.statistics import bootstrap_interval

TITLES = {"undefended": "undefended", "saat": "hardened (SAAT)"}
TONES: dict[str, Tone] = {"undefended": "a", "saat": "b"}


@dataclass(frozen=True)
class BudgetCurve:
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
class DemoSearch:
    """One query image sent to the index of one model."""

    model: str
    attacked: bool
    image: Tensor  # (3, H, W) float, as the model sees it
    ap: float
    measures: dict[str, float]  # of the perturbation; empty for the clean image
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class DemoExample:
    """The query of the pictures and why it was chosen."""

    query: int
    name: str
    rule: str
    attack: str
    eps: float
    searches: tuple[DemoSearch, ...]  # clean and attacked, for each model


def demo_page(
    summary: Mapping[str, Any],
    results: Mapping[str, Results],
    curves: Mapping[str, BudgetCurve],
    example: DemoExample,
) -> str:
    """The whole page. ``summary`` is that of ``demo_run.summarise``."""
    before, attacks = summary["undefended"], summary["attacks"]
    return render(
        "demo.html.j2",
        title="A photo search that works, is broken, and is hardened",
        titles=TITLES,
        summary=summary,
        budgets=sorted({settings.get("eps", 8 / 255) for settings in attacks.values()}),
        untargeted=len(attacks) - sum("t-map" in before[name] for name in attacks),
        example=example,
        groups={model: group_data(named) for model, named in results.items()},
        intervals=interval_chart(
            {TITLES[model]: named for model, named in results.items()},
            {TITLES[model]: TONES[model] for model in results},
        ),
        curve=curves["undefended"],
        eps_chart=_eps_chart(summary, curves),
        pr_chart=_pr_chart(results),
        notes=notes(
            {f"{TITLES[m]}, {name}": result for m, named in results.items() for name, result in named.items()}
        ),
    )


def _eps_chart(summary: Mapping[str, Any], curves: Mapping[str, BudgetCurve]) -> Chart:
    series, described = [], []
    for model, curve in curves.items():
        low, high = zip(*curve.interval, strict=True)
        title = TITLES[model]
        series.append(Series(title, curve.eps, curve.mean, TONES[model], dots=True, low=low, high=high))
        described.append(f"{title}: " + ", ".join(number(value, 2) for value in curve.mean))
    eps = curves["undefended"].eps
    return LineChart(
        title="MAP against eps",
        description="; ".join(described) + f" at {', '.join(map(str, eps))} of 255.",
        series=series,
        x=ChartAxis("eps (of 255)", eps),
        y=ChartAxis("MAP", UNIT),
        reference=("chance", summary["chance"]),
    )


def _pr_chart(results: Mapping[str, Results]) -> Chart | None:
    curves = {}
    for model, named in results.items():
        attacks = {n: r for n, r in named.items() if is_untargeted(n, r) and n != "clean"}
        strongest = min(attacks, key=lambda name: attacks[name][attacks[name].setting.headline])
        curves[f"{TITLES[model]}, clean"] = (named["clean"], TONES[model], False)
        curves[f"{TITLES[model]}, {strongest}"] = (attacks[strongest], TONES[model], True)
    return pr_chart(curves)
