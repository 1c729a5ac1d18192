"""Cost of trained runs: parameters, products, the time of a query, of a training step and of an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from robusthash.analysis.model_cost import Latency, Size, Work, single_query, size_of, time_in_turn
from robusthash.apps.experiment.dry_run_parts import StepClock
from robusthash.apps.experiment.model_stages import load_victim, read_data
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.run_selection import labelled
from robusthash.apps.experiment.stored_analyses import store_analysis
from robusthash.apps.experiment.training_stages import make_recipe, train_config
from robusthash.apps.reports.cell_text import markdown_table
from robusthash.core.hamming import pack, sign
from robusthash.core.limited_files import read_json
from robusthash.core.runtime import Draws, choose_device
from robusthash.core.types import Inputs
from robusthash.data.base import RetrievalData
from robusthash.data.splits import stable_subset
from robusthash.index.search_engines import FlatEngine, Rows
from robusthash.models.hasher import Hasher
from robusthash.training.loop import fit
from robusthash.training.recipe import Recipe

_COLUMNS = (
    *("model", "parameters (M)", "MACs (M)", "query ms", "p95 ms", "ratio"),
    *("training min/epoch", "step ms", "step ratio", "attack steps"),
)

_STEPS = 4
"""Of each run in a round; the first, which starts the reader, is not counted."""


@dataclass(frozen=True)
class CostRow:
    """Cost of one run, for one image query and one epoch of training."""

    name: str
    size: Size
    latency: Latency
    minutes_per_epoch: float
    attack_steps: int  # of the inner attack of training; 0 where there is none
    step_ms: float | None = None  # of a training step, by wall clock
    step_ratio: float | None = None  # median over the rounds of its time / the reference's


def cost_rows(
    paths: Sequence[Path], against: Path | None = None, repeats: int = 100, rounds: int = 0
) -> tuple[str, list[CostRow]]:
    """Cost of runs, and the name of the reference: the hasher without purifiers of ``against``, or of the
    first run.

    The reference is timed in turn with all others in this process. A query runs from pixels to the ten
    nearest of an exact index of as many codes as the run's database has. Pixels and searched codes are
    random: neither changes the cost. The numbers are stored in each run.

    Args:
        against: the undefended run.
        repeats: timed queries of each.
        rounds: of training steps, timed in turn too, which needs the data of the runs; none by default.

    Raises:
        FileNotFoundError: data of a run that are not there.
        RunError: runs without weights.
    """
    runs = labelled(paths)
    base = load_run(against) if against is not None else next(iter(runs.values()))
    reference = f"{base.config.name} without purifiers" if base.config.hasher.purifiers else base.config.name
    hashers = {label: run.load_model()[0] for label, run in runs.items()}
    works = {label: _query_of(hashers[label], run) for label, run in runs.items()}
    undefended = "undefended reference"
    works[undefended] = _query_of(base.load_model()[0].bare(), base)
    latencies = time_in_turn(works, undefended, runs=repeats)
    steps = step_times({**runs, undefended: base}, rounds) if rounds else {}
    rows = []
    for label, run in runs.items():
        epochs = [line["seconds"] for line in run.lines()]
        attack = run.config.training.inner_attack()
        inner = 0 if attack is None else attack.search.steps
        size, minutes = size_of(hashers[label], _pixels(run)), sum(epochs) / len(epochs) / 60
        trained = _step_of(steps[label], steps[undefended]) if rounds else ()
        rows.append(CostRow(label, size, latencies[label], minutes, inner, *trained))
        _store(run, rows[-1], reference, rounds)
    return reference, rows


def _step_of(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Milliseconds of a training step, and its ratio to the reference."""
    ratios = (mine / other for mine, other in zip(seconds, reference, strict=True))
    return 1e3 * median(seconds), median(ratios)


def step_times(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of each run, (rounds,) by label: the median of some steps in each round.

    Every run trains on from its weights on a part of its training set, and nothing of it is kept.

    Raises:
        FileNotFoundError: data of a run that are not there.
        RunError: a run without weights.
    """
    trainings = {label: (run, _some_batches(run)) for label, run in runs.items()}
    times: dict[str, list[float]] = {label: [] for label in runs}
    labels = list(runs)
    for number in range(rounds):
        for label in labels if number % 2 == 0 else labels[::-1]:
            times[label].append(_step_seconds(*trainings[label]))
    return times


def _some_batches(run: Run) -> RetrievalData:
    """The run's data with as many training items as its steps take."""
    data = read_data(run.config)
    items = _STEPS * run.config.training.batch_size
    share = _recipe_of(run).epoch_items(items) / items  # an epoch may pass its items several times
    train = data.train.take(stable_subset(data.train, math.ceil(items / share)))
    return replace(data, train=train)


def _recipe_of(run: Run) -> Recipe:
    hasher, objective = load_victim(run)
    return make_recipe(run.config, hasher, objective)


def _step_seconds(run: Run, data: RetrievalData) -> float:
    clock = StepClock(choose_device(run.config.runtime.device))
    clock.start()
    settings = replace(train_config(run.config), epochs=1, compile=False)
    fit(_recipe_of(run), data, settings, clock)
    seconds = clock.steps()
    return median(seconds[1:] or seconds)  # a small set has one step


def _store(run: Run, row: CostRow, reference: str, rounds: int) -> None:
    """Numbers of one query, and of a training step where it was timed, in the run's ``cost.json``; ratios are
    those to the reference."""
    time = row.latency
    settings = {"reference": reference, "threads": time.threads, "repeats": time.runs, "rounds": rounds}
    values = {"parameters": row.size.parameters, "MACs": row.size.macs, "ratio": time.ratio}
    values |= {"query ms": time.median, "p95 ms": time.p95, "minutes an epoch": row.minutes_per_epoch}
    if row.step_ms is not None and row.step_ratio is not None:
        values |= {"step ms": row.step_ms, "step ratio": row.step_ratio}
    store_analysis(run, "cost", settings, values)


def _pixels(run: Run) -> Inputs:
    """One random image (or feature vector) of the size that the run was trained on."""
    card = run.card()
    if "image" not in card["modalities"]:
        raise ValueError(f"{run.path} encodes {card['modalities']}; the cost is that of an image query")
    size = tuple(card["image_size"])
    shape = (1, 3, *size) if len(size) == 2 else (1, *size)
    return {"image": torch.rand(shape, generator=Draws(0, ("cost",)).generator())}


def _query_of(hasher: Hasher, run: Run) -> Work:
    """A query against random codes, as many as the database of ``run``."""
    count = int(read_json(run.path / "data.json")["sizes"]["database"])
    codes = np.random.default_rng(0).integers(0, 256, (count, (hasher.bits + 7) // 8), dtype=np.uint8)
    engine, k = FlatEngine(Rows(np.arange(count), codes)), min(10, count)
    return single_query(hasher, _pixels(run), lambda logits: engine.search(pack(sign(logits)).numpy(), k))


def cost_markdown(reference: str, rows: Sequence[CostRow]) -> str:
    """A Markdown table."""
    first = rows[0].latency
    title = (
        f"One query: image to ten nearest, median of {first.runs} by wall clock, {first.threads} thread(s); "
        f"ratio to {reference}, timed in turn. FLOPs are twice the MACs."
    )
    cells = []
    for row in rows:
        time = row.latency
        numbers = (row.size.macs / 1e6, time.median, time.p95, time.ratio, row.minutes_per_epoch)
        texts = [f"{number:.2f}" for number in numbers]
        trained = ["-" if n is None else f"{n:.2f}" for n in (row.step_ms, row.step_ratio)]
        cells.append([row.name, row.size.parameters / 1e6, *texts, *trained, row.attack_steps])
    return f"{title}\n\n{markdown_table(_COLUMNS, cells)}"
