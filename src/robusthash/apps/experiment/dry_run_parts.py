"""Parts of a dry run: the items that it takes at a time, the clock of its steps, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.evaluation_stages import attacks_of
from robusthash.attacks.eqb2a import NEAREST, RANKS
from robusthash.core.registry import check
from robusthash.evaluation.context import encoding_batch
from robusthash.training.recipe import Recipe


class StepClock:
    """The log of a training that is timed: seconds of setup, of each step, and of the end of the epoch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def start(self) -> None:
        """Forget earlier times, and begin."""
        self.times = [self._now()]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def resume(self) -> None:
        self.times.append(self._now())

    def progress(self, done: int, total: int, text: str) -> None:
        self.times.append(self._now())

    def log(self, line: dict[str, Any]) -> None:
        self.times.append(self._now())

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""

    def steps(self) -> list[float]:
        """Seconds of each step of an epoch that ended."""
        _, *marks, last, _ = self.times
        return [after - before for before, after in pairwise([*marks, last])]

    @contextmanager
    def timing(self) -> Iterator[Callable[[], float]]:
        """Seconds inside of the block, to be read after it."""
        times = [self._now()]
        yield lambda: times[1] - times[0]
        times.append(self._now())


def weight_bytes(recipe: Recipe) -> int:
    """Bytes of all tensors that a checkpoint of the recipe holds."""
    states = (module.state_dict() for module in recipe.modules().values())
    held = {values.data_ptr(): values.nbytes for state in states for values in state.values()}
    return sum(held.values())


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows has not

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def device_words(device: torch.device) -> str:
    """A device, and its model or the number of threads."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} thread(s)"


@dataclass(frozen=True)
class DryRunRows:
    """Items taken at a time; ``fitted`` is the fewest that the training can be done on."""

    train: int
    query: int
    database: int
    fitted: int

    @classmethod
    def of(cls, config: Config, batch: int | None) -> DryRunRows:
        """Those of a recipe, or at most ``batch`` where its parts take so few."""
        section, fitted = config.evaluation, _fitted(config)
        own = config.training.batch_size, section.batch_size, encoding_batch(section.batch_size)
        train, query, database = own if batch is None else (min(batch, each) for each in own)
        ranked = any(settings["name"] == "eqb2a" for _, settings in attacks_of(section).values())
        return cls(train, query, max(database, NEAREST + RANKS) if ranked else database, fitted)


def _fitted(config: Config) -> int:
    """Methods in closed form need as many items as bits, and as their heads have anchors."""
    if check("recipe", config.training.recipe)[0].name != "shallow":
        return 2
    head, options = check("head", config.hasher.head)
    anchors = signature(head.make).parameters.get("anchors")
    return max(config.hasher.bits, 0 if anchors is None else int(options.get("anchors", anchors.default)))
