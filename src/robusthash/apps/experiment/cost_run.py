"""What trained runs cost: parameters, products, the time of a query and of an epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robusthash.analysis.model_cost import Latency, Size, Work, asking, size_of, time_in_turn
from robusthash.apps.experiment.attribution_run import labelled
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.core.hamming import pack, sign
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.index.search_engines import FlatEngine, Rows
from robusthash.models.hasher import Hasher


@dataclass(frozen=True)
class CostRow:
    """What one run costs, for one image query and one epoch of training."""

    name: str
    size: Size
    latency: Latency
    minutes_per_epoch: float
    attack_steps: int  # of the inner attack of training; 0 where there is none


def cost_rows(
    paths: Sequence[Path], against: Path | None = None, runs: int = 100
) -> tuple[str, list[CostRow]]:
    """Cost of runs and the name of the reference: the hasher without purifiers of ``against``, or of the
    first run.

    The reference is timed in turn with all others in this process. A query runs from pixels to the ten
    nearest of an exact index of as many codes as the run's database has. Pixels and searched codes are
    random: neither changes the cost.

    Args:
        against: the undefended run.
        runs: timed queries of each.
    """
    opened = labelled(paths)
    base = load_run(against) if against is not None else next(iter(opened.values()))
    reference = f"{base.config.name} without purifiers" if base.config.hasher.purifiers else base.config.name
    hashers = {label: run.load_model()[0] for label, run in opened.items()}
    works = {label: _query_of(hashers[label], run) for label, run in opened.items()}
    asked = "undefended reference"
    works[asked] = _query_of(base.load_model()[0].bare(), base)
    times = time_in_turn(works, asked, runs=runs)
    return reference, [
        CostRow(
            name=label,
            size=size_of(hashers[label], _pixels(run)),
            latency=times[label],
            minutes_per_epoch=sum(line["seconds"] for line in run.lines()) / len(run.lines()) / 60,
            attack_steps=_inner_steps(run),
        )
        for label, run in opened.items()
    ]


def _inner_steps(run: Run) -> int:
    """Steps of the training attack: those of the config, else those it has by default."""
    settings = run.config.training.attack
    if settings is None:
        return 0
    attack = build("attack", settings, objective=build("objective", run.config.training.objective))
    return attack.search.steps


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
    count = int(json.loads((run.path / "data.json").read_text())["sizes"]["database"])
    codes = np.random.default_rng(0).integers(0, 256, (count, (hasher.bits + 7) // 8), dtype=np.uint8)
    engine = FlatEngine(Rows(np.arange(count), codes))
    return asking(
        hasher, _pixels(run), lambda logits: engine.search(pack(sign(logits)).numpy(), min(10, count))
    )


def cost_markdown(reference: str, rows: Sequence[CostRow]) -> str:
    """A Markdown table."""
    first = rows[0].latency
    lines = [
        f"One query: image to ten nearest, median of {first.runs} by wall clock, {first.threads} thread(s); ratio to "
        f"{reference}, timed in turn. FLOPs are twice the MACs.",
        "",
        "| model | parameters (M) | MACs (M) | query ms | p95 ms | ratio | training min/epoch | attack steps |",
        "|" + " --- |" * 8,
    ]
    lines += [
        f"| {row.name} | {row.size.parameters / 1e6:.3f} | {row.size.macs / 1e6:.2f} | {row.latency.median:.2f} | "
        f"{row.latency.p95:.2f} | {row.latency.ratio:.2f} | {row.minutes_per_epoch:.2f} | {row.attack_steps} |"
        for row in rows
    ]
    return "\n".join(lines)
