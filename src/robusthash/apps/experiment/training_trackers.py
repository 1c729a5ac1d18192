"""TensorBoard and Weights & Biases as readers of the training log, next to a run's own ``log.jsonl``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from robusthash.apps.experiment.config import ConfigError
from robusthash.apps.experiment.run_directory import Run
from robusthash.core.processes import rank
from robusthash.training.loop import RunLog
from robusthash.training.recipe import FIGURES

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receiver of the numbers of each epoch, counted from 1."""

    def log(self, epoch: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``; an epoch trained again after a kill replaces the earlier one."""

    def __init__(self, run: Run) -> None:
        self.folder = run.path / "tensorboard"
        self.writer: Any = None

    def log(self, epoch: int, values: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=epoch)
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """A run of Weights & Biases by the name and id of ours; its own variables (``WANDB_MODE``) count."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "robusthash"),
            name=f"{run.config.name}/{run.id}",
            id=run.id,
            resume="allow",
            dir=str(run.path),
            config=run.config.model_dump(mode="json"),
        )

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self.session.log(values, step=epoch)

    def close(self) -> None:
        self.session.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed; ConfigError."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"runtime.loggers holds {name!r}, which needs an extra: pip install 'robusthash[{name}]'"
            )


@contextmanager
def tracked(run: Run) -> Iterator[RunLog]:
    """The log of a run, which its ``runtime.loggers`` read too; of several processes the first one alone.

    Raises:
        ConfigError: a logger that does not start.
    """
    trackers: dict[str, Tracker] = {}
    for name in run.config.runtime.loggers if rank() == 0 else ():
        try:
            trackers[name] = TRACKERS[name](run)
        except Exception as error:  # a family of errors of its own
            raise ConfigError(f"runtime.loggers: {name} does not start: {error}") from error
    try:
        yield _TrackedRun(run.path, run.config, run.on_progress, trackers) if trackers else run
    finally:
        for tracker in trackers.values():
            tracker.close()


@dataclass(frozen=True)
class _TrackedRun(Run):
    """A run whose lines trackers get too. One that fails is left out; training goes on."""

    trackers: dict[str, Tracker] = field(default_factory=dict)

    def log(self, line: dict[str, Any]) -> None:
        super().log(line)
        values = scalars(line)
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.log(line["epoch"] + 1, values)
            except Exception as error:  # a full disk, a network that is gone
                logger.warning("%s gets no more lines: %s", name, error)
                del self.trackers[name]


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Numbers of a line: ``lr``, ``seconds``, ``loss/TERM``, ``loss/total`` over all, ``figures/NAME``."""
    terms = {name: value for name, value in line.items() if name not in ("epoch", "lr", "seconds", FIGURES)}
    named = {"lr": line["lr"], "seconds": line["seconds"], "loss/total": sum(terms.values())}
    named |= {f"loss/{name}": value for name, value in terms.items()}
    return named | {f"figures/{name}": value for name, value in line.get(FIGURES, {}).items()}
