"""The transfer matrix of runs: the effect of attacks found on each model on every other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusthash.apps.experiment.model_stages import load_hasher, prepare_process, read_data
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.stored_analyses import store_analysis
from robusthash.apps.experiment.threat_options import threat_on_data
from robusthash.apps.reports.cell_text import markdown_cell
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.context import make_context
from robusthash.metrics.measure_key import MeasureKey
from robusthash.robustness.specs.transfer_attacks import TransferMatrix, transfer_matrix


@dataclass(frozen=True)
class TransferTable:
    """A transfer matrix of runs."""

    runs: dict[str, str]  # name in the matrix -> run directory
    matrix: TransferMatrix

    def plain(self) -> dict[str, Any]:
        """The matrix as plain data for JSON."""
        m = self.matrix
        tables = {name: getattr(m, name).tolist() for name in ("clean", "attacked", "worst")}
        names = {name: list(getattr(m, name)) for name in ("surrogates", "victims")}
        plain = {name: getattr(m, name) for name in ("measure", "threat", "search", "queries", "chosen")}
        return {"runs": self.runs, **plain, **names, **tables}

    def markdown(self) -> str:
        """Rows are surrogates, columns victims; a cell is the wMAP of this attack alone and (the mean under
        it).
        """
        m = self.matrix
        lines = [
            f"{MeasureKey(m.measure).name('worst')} ({m.measure} under attack), {m.threat}, "
            f"{m.queries} queries ({m.chosen}); "
            "rows: found on, columns: tried on",
            "",
            "| found on | " + " | ".join(map(markdown_cell, m.victims)) + " |",
            "| --- |" + " ---: |" * len(m.victims),
            "| (clean) | " + " | ".join(f"{value:.4f}" for value in m.clean.tolist()) + " |",
        ]
        for name, worst, attacked in zip(m.surrogates, m.worst.tolist(), m.attacked.tolist(), strict=True):
            cells = (f"{low:.4f} ({mean:.4f})" for low, mean in zip(worst, attacked, strict=True))
            lines.append(f"| {markdown_cell(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def transfer_table(
    paths: Sequence[Path],
    queries: int | None = 200,
    steps: int = 20,
    threat: str = "img-linf-8",
    progress: Progress = silent,
) -> TransferTable:
    """Attack the images of every run from every run, under the protocol, seed and batch size of the first.

    What each victim loses to each surrogate is stored in its run, of every query.

    Args:
        paths: at least two run directories of one data set.
        queries: number of queries, chosen by content.
        threat: budget of the images, by name.

    Raises:
        ValueError: fewer than two runs, one given twice, runs without images, or of other data; a threat that
            does not change images alone.
    """
    if len(paths) < 2:
        raise ValueError(f"a transfer matrix needs at least two runs, got {len(paths)}")
    runs = [load_run(path) for path in paths]
    cards = [run.card() for run in runs]
    shared = Counter(card["name"] for card in cards)
    names = [card["name"] if shared[card["name"]] == 1 else f"{card['name']}/{card['id']}" for card in cards]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{repeated[0]} is given twice; name each run once")
    for run, card in zip(runs, cards, strict=True):
        if "image" not in card["modalities"]:
            raise ValueError(f"{run.path} encodes {card['modalities']}; this table attacks images")
    first = runs[0].config
    prepare_process(first)
    data = {str(first.data): read_data(first, progress)}
    budget = threat_on_data(threat, data[str(first.data)])
    if set(budget.balls) != {"image"} or budget.side != "query":
        raise ValueError(f"this table attacks images, and {threat} does not change images alone")
    contexts = {}
    for name, run in zip(names, runs, strict=True):
        key = str(run.config.data)
        if key not in data:  # the same data may be spelled otherwise; the matrix compares content
            data[key] = read_data(run.config, progress)
        contexts[name] = make_context(
            load_hasher(run),
            data[key],
            build("protocol", first.evaluation.protocol),
            direction=("image", "image"),
            database=run.learned_database(),
            queries=queries,
            seed=first.evaluation.seed,
            batch_size=first.evaluation.batch_size,
            progress=_titled(progress, name),
        )
    matrix = transfer_matrix(contexts, budget, steps, progress)
    for run, name in zip(runs, names, strict=True):
        _store(run, name, matrix)
    return TransferTable({name: str(run.path) for name, run in zip(names, runs, strict=True)}, matrix)


def _store(run: Run, victim: str, matrix: TransferMatrix) -> None:
    """The column of a victim, of each query, in its ``transfer.json``: ``clean``, ``from SURROGATE``."""
    column = matrix.victims.index(victim)
    settings = {name: getattr(matrix, name) for name in ("measure", "threat", "search", "chosen")}
    values = {"clean": matrix.clean_per_query[column].tolist()}
    for row, name in enumerate(matrix.surrogates):
        values[f"from {name}"] = matrix.per_query[row, column].tolist()
    store_analysis(run, "transfer", {"victim": victim, **settings}, values)


def _titled(progress: Progress, name: str) -> Progress:
    return lambda done, total, text: progress(done, total, f"{name}: {text}")
