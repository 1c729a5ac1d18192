"""Two sides timed in turn, so that whatever else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[], object]


@dataclass(frozen=True)
class Compared:
    """Medians over the pairs: of the ratios ours / theirs, and of each side's seconds of the processor."""

    ratio: float  # of processor time, which other load on the machine hardly touches
    wall_ratio: float
    ours: float
    theirs: float
    ours_wall: float
    theirs_wall: float


def seconds(work: Work) -> tuple[float, float]:
    """Wall and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def in_turn(ours: Work, theirs: Work, pairs: int) -> Compared:
    """Both sides once to warm up, then ``pairs`` times each in alternating order."""
    sides = (ours, theirs)
    for work in sides:
        work()
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            times[side].append(seconds(sides[side]))
    wall, processor = (
        statistics.median(a[clock] / b[clock] for a, b in zip(*times, strict=True)) for clock in (0, 1)
    )
    medians = [statistics.median(made[clock] for made in side) for clock in (1, 0) for side in times]
    return Compared(processor, wall, *medians)


class StepLog:
    """A log of training that keeps nothing; ``progress``, called after each step, is for heirs."""

    def resume(self) -> None:
        return None

    def checkpoint(self, state: dict[str, Any]) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        pass
