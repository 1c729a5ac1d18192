"""The table of copy detection: which share of the copies finds its image, by the change that made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robusthash.data.copies import CHANGES, HELD_OUT, TRAINED
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult

WORDS = {change.name: change.words for change in CHANGES}
"""What a change does, by its name in the table."""

_ORDER = (*WORDS, TRAINED, HELD_OUT)


def copy_table(results: Mapping[str, EvalResult]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: each change, then copies of all images, of those trained on and of the others.

    The share found first (P@1), with its interval, and among the first ten (R@10); found first under each
    untargeted attack; and the worst case over these, the mean of 1 / rank. No rows where the queries are not
    in groups.

    Args:
        results: of one direction, by attack: ``clean``, each attack, ``worst``.
    """
    clean = results["clean"]
    attacked = {
        name: result
        for name, result in results.items()
        if name not in ("clean", "worst") and result.setting.key.name("targeted") not in result.values
    }
    if not clean.groups or "P@1" not in clean.values:
        return [], []
    columns = ["copies", "queries", "found first", "95 % interval", "in first 10"]
    columns += [f"first under {name}" for name in attacked]
    worst = results.get("worst")
    columns += ["worst 1/rank"] if worst else []
    rows: list[list[Any]] = []
    for name in (*(name for name in _ORDER if name in clean.groups), None):
        scores = [_scores(result, name) for result in (clean, *attacked.values())]
        values, interval = scores[0]
        low, high = interval["P@1"]
        queries = clean.groups[name].queries if name else len(clean.per_query[clean.setting.headline])
        row: list[Any] = [name or "all", queries, values["P@1"], f"{low:.2f}..{high:.2f}"]
        row += [values["R@10"], *(other["P@1"] for other, _ in scores[1:])]
        if worst:
            row.append(_scores(worst, name)[0][MeasureKey(worst.setting.headline).name("worst")])
        rows.append(row)
    return columns, rows


def _scores(result: EvalResult, group: str | None) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and intervals of a group of queries, or of all."""
    scores = result if group is None else result.groups[group]
    return scores.values, scores.interval
