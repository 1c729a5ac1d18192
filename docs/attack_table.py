"""Table of docs/methods/attacks.md: every registered attack, what it knows and asks, a measured row.

Measured rows are of the first kept recipe that was attacked so: ``VICTIMS`` in their order, then by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.tables import cell_of, read_seeds
from robusthash.apps.reports.cell_text import markdown_cell
from robusthash.attacks.base import Attack
from robusthash.core.registry import build, catalogue
from robusthash.metrics.results import EvalResult, headline_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
VICTIMS = (  # undefended first
    "ucmerced-labels-dpsh",
    "ucmerced-dcmh",
    "ucmerced-dcmh-ta-dch-long",
    "ucmerced-dcmh-queries",
    "ucmerced-crdat",
)
_SHORT = re.compile(r"reach ([\d.]+) of the budget ([\d.]+)")
HEADS = ("attack", "paper", "evidence", "knows", "goal", "steps", "asks", "measured (passes a query)")


def show_table() -> None:
    """The table, by cog."""
    import cog  # made again by every run of cog

    measured = measured_rows()
    for line in [HEADS, ["---"] * len(HEADS), *map(row, attacks(), [measured] * len(attacks()))]:
        cog.outl(f"| {' | '.join(map(markdown_cell, line))} |")


def attacks() -> list[Any]:
    """Cards of the attacks of this package, by name."""
    return [card for card in catalogue() if card.kind == "attack"]


def row(card: Any, measured: dict[str, str]) -> list[str]:
    """The cells of an attack with its default options."""
    attack: Attack = build("attack", card.name, objective=build("objective", "csq"))
    steps, asked = getattr(attack.search, "steps", None), getattr(attack.guide, "questions", None)
    goal = "target" if attack.targeted else "away"
    cells = [card.name, card.paper or "ours", card.evidence, attack.threat.knowledge, goal]
    return [*cells, str(steps or ""), f"{asked:,}" if asked else "", measured.get(card.name, "")]


def measured_rows() -> dict[str, str]:
    """By attack, the clean and attacked value of a kept recipe over its seeds, and the passes of a query."""
    found: dict[str, str] = {}
    others = sorted({file.parents[1].name for file in RESULTS.glob("*/*/metrics.json")} - {*VICTIMS})
    for victim in (*VICTIMS, *others):
        runs = [file.parent for file in sorted((RESULTS / victim).glob("*/metrics.json"))]
        first = next(iter(read_seeds(runs).values()), ()) if runs else ()
        for name in first[0].evaluated if first else ():
            attack = name.removeprefix("I2T ").removeprefix("T2I ")
            if " " not in attack and attack not in ("clean", "worst") and attack not in found:
                results = [seed.evaluated[name] for seed in first if name in seed.evaluated]
                before = [seed.clean[results[0].scored_on] for seed in first]
                found[attack] = _words(victim, before, results)
    return found


def _words(victim: str, clean: list[EvalResult], results: list[EvalResult]) -> str:
    """``name (3 seeds): MAP 0.545 to 0.270 (0.245-0.296), chance 0.052 (20 + 20)``."""
    result, measure = results[0], headline_of(results[0])
    started = f"{cell_of(clean, measure).value:.3f} to " if measure in clean[0].per_query else ""
    queries = len(next(iter(result.per_query.values())))
    passes = f"{result.cost.forward / queries:,.0f} + {result.cost.backward / queries:,.0f}"
    seeds = "1 seed" if len(results) == 1 else f"{len(results)} seeds"
    short = next(filter(None, map(_SHORT.search, result.notes)), None)
    seeds += f", steps that reach {float(short[1]):.3f} of eps {short[2]}" if short else ""
    reached = f"{measure} {started}{cell_of(results).text()}, chance {result.reference['chance']:.3f}"
    return f"{victim} ({seeds}): {reached} ({passes})"
