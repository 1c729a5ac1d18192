"""Table of docs/methods/attacks.md: every registered attack, what it knows and asks, a measured row.

Measured rows are of the first kept run that was attacked so: ``VICTIMS`` in their order, then others by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robusthash.apps.experiment.run_directory import load_run
from robusthash.apps.reports.cell_text import markdown_cell
from robusthash.attacks.base import Attack
from robusthash.core.registry import build, catalogue
from robusthash.metrics.results import EvalResult, headline_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
VICTIMS = ("ucmerced-labels-dpsh", "ucmerced-dcmh", "fashion-dph", "ucmerced-crdat")  # undefended first
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
    """By attack, the clean and attacked value of a kept run, and passes forward and back of a query."""
    found: dict[str, str] = {}
    others = sorted({file.parents[1].name for file in RESULTS.glob("*/*/metrics.json")} - {*VICTIMS})
    for victim in (*VICTIMS, *others):
        for file in sorted((RESULTS / victim).glob("*/metrics.json")):
            results = load_run(file.parent).evaluated()
            for name, result in results.items():
                attack = name.removeprefix("I2T ")
                clean = results.get(f"{name.removesuffix(attack)}clean")
                if clean is not None and " " not in attack and attack not in ("clean", "worst"):
                    found.setdefault(attack, _words(victim, clean, result))
    return found


def _words(victim: str, clean: EvalResult, result: EvalResult) -> str:
    measure, queries = headline_of(result), len(next(iter(result.per_query.values())))
    started = clean.values.get(measure)
    before = "" if started is None else f"{started:.3f} to "
    chance = f"chance {result.reference['chance']:.3f}"
    passes = f"{result.cost.forward / queries:,.0f} + {result.cost.backward / queries:,.0f}"
    return f"{victim}: {measure} {before}{result[measure]:.3f}, {chance} ({passes})"
