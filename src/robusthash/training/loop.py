"""The one training loop: epochs, optimisers, schedules, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from robusthash.core.option_types import Checked
from robusthash.core.processes import rank, world
from robusthash.core.runtime import Draws, choose_device, precision, seed_everything
from robusthash.core.types import Batch, LossTerms
from robusthash.data.base import RetrievalData, batches
from robusthash.data.transforms import augment
from robusthash.models.hasher import Hasher
from robusthash.training.data_parallel import average_buffers, divided_among_processes, reduce_gradients
from robusthash.training.least_batch import least_batch
from robusthash.training.optimiser_groups import Group, check_shapes, divided
from robusthash.training.recipe import FIGURES, Moment, Recipe, check_labels

logger = logging.getLogger(__name__)

Lines = list[dict[str, Any]]


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")


def _in_range(name: str, value: float, above: float) -> None:
    if not 0 <= value < above:
        limit = "finite" if above == math.inf else f"below {above:g}"
        raise ValueError(f"{name} must be at least 0 and {limit}, got {value!r}")


@dataclass(frozen=True)
class OptimConfig(Checked):
    """One optimiser group; ``lr`` 0 freezes a part of the hasher, ``frozen_epochs`` for its first epochs."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    frozen_epochs: int = 0

    def __post_init__(self) -> None:
        _one_of("optimiser", self.name, ("sgd", "adam", "adamw"))
        for name, above in (("lr", 1e32), ("momentum", 1.0), ("weight_decay", 1e32)):  # floats end there
            _in_range(name, getattr(self, name), above)
        if self.frozen_epochs < 0:
            raise ValueError(f"frozen_epochs must be at least 0, got {self.frozen_epochs}")

    def make(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        decay = self.weight_decay
        if self.name == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=decay)
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, betas=(self.momentum, 0.999), weight_decay=decay)


@dataclass(frozen=True)
class Schedule(Checked):
    """Learning-rate factor over training: a warm-up share, then one of four kinds.

    ``steps`` multiplies by ``gamma`` at each share of ``at``; ``exponential`` falls smoothly from 1 to
    ``gamma``.
    """

    kind: Literal["constant", "cosine", "steps", "exponential"] = "cosine"
    warmup: float = 0.0
    at: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _one_of("schedule", self.kind, ("constant", "cosine", "steps", "exponential"))
        _in_range("warmup", self.warmup, 1.0)
        if not all(0 <= share <= 1 for share in self.at):
            raise ValueError(f"at holds shares of the training from 0 to 1, got {list(self.at)}")
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be above 0 and finite, got {self.gamma!r}")

    def factor(self, progress: float) -> float:
        """The factor after a share ``progress`` of all steps; of it alone, so that resuming is exact."""
        if progress < self.warmup:
            return min((progress + 1e-3) / self.warmup, 1.0)
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))
        if self.kind == "steps":
            return self.gamma ** sum(progress >= share for share in self.at)
        if self.kind == "exponential":
            return self.gamma ** ((progress - self.warmup) / (1.0 - self.warmup))
        return 1.0


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Settings of training that belong to no method."""

    epochs: int = 20
    batch_size: int = 64
    optim: dict[str, OptimConfig] = field(default_factory=lambda: {"hasher": OptimConfig()})
    schedule: Schedule = Schedule()
    augment: Literal["none", "flip-crop"] = "none"
    clip: float = 0.0  # largest gradient norm of a group; 0 does not clip
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    batchnorm: Literal["train", "frozen"] = "train"  # frozen: the encoders' statistics stay as they came
    accumulate: int = 1  # batches whose gradients make one step; each loss sees its own batch alone
    checkpoint_minutes: float = 0.0  # between checkpoints inside an epoch; 0 has them at its end alone
    compile: bool = False  # by torch.compile, the encoders

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, optim in self.optim.items():
            if not isinstance(optim, OptimConfig):
                raise ValueError(f"optim[{name!r}] must be an OptimConfig(lr=...), got {optim!r}")
        _one_of("augment", self.augment, ("none", "flip-crop"))
        _in_range("checkpoint_minutes", self.checkpoint_minutes, math.inf)
        _in_range("seed", self.seed, 2**63)
        _one_of("batchnorm", self.batchnorm, ("train", "frozen"))


class CheckpointError(ValueError):
    """A checkpoint of another training than the one that goes on from it."""


class RunLog(Protocol):
    """Store of a run's checkpoints and log lines; the loop itself touches no file."""

    def resume(self) -> dict[str, Any] | None: ...

    def checkpoint(self, state: dict[str, Any]) -> None: ...

    def log(self, line: dict[str, Any]) -> None: ...

    def progress(self, done: int, total: int, text: str) -> None: ...


@dataclass(frozen=True)
class _Optimisers:
    """The optimisers by the name of their settings, and how a step of each group updates them."""

    config: TrainConfig
    hasher: Hasher
    groups: Mapping[str, Group]
    by_name: Mapping[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of fp16, whose small gradients would be 0; idle otherwise
    least: int  # items that a step needs

    def step(self, group: str, loss: torch.Tensor, factor: float, turn: _Turn) -> float:
        """Take the gradients of a group and, where it is its turn, step its optimisers; its learning rate."""
        stepped = {name: self.by_name[name] for name in self.groups[group].shares}
        parameters = self.groups[group].parameters
        if turn.first:
            for optimiser in stepped.values():
                optimiser.zero_grad(set_to_none=True)
        self._add_gradients(self.scaler.scale(loss / turn.of), parameters, turn)
        if turn.last:
            reduce_gradients(self.hasher, parameters)
            if self.config.clip:
                for optimiser in stepped.values():
                    self.scaler.unscale_(optimiser)
                torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
            for name, optimiser in stepped.items():
                for settings in optimiser.param_groups:
                    settings["lr"] = self.config.optim[name].lr * factor
                self.scaler.step(optimiser)
            self.scaler.update()
        return self.config.optim[group].lr * factor

    @staticmethod
    def _add_gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter], turn: _Turn) -> None:
        if turn.of == 1:
            loss.backward()
            return
        # backward would leave gradients in the parameters of other groups, which are in the middle of a sum
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter, grad in zip(
            learning, torch.autograd.grad(loss, learning, allow_unused=True), strict=True
        ):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad


@dataclass(frozen=True)
class _Turn:
    """The place of a batch among those whose gradients make one step."""

    place: int
    of: int

    @classmethod
    def at(cls, step: int, steps: int, accumulate: int) -> _Turn:
        """The turn of batch ``step`` of an epoch; the epoch's last step may be made of fewer."""
        start = step - step % accumulate
        return cls(step - start, min(accumulate, steps - start))

    @property
    def first(self) -> bool:
        return self.place == 0

    @property
    def last(self) -> bool:
        return self.place == self.of - 1


@dataclass
class _Position:
    """The point that training has reached, and the sums of the epoch so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def fit(recipe: Recipe, data: RetrievalData, config: TrainConfig, run: RunLog | None = None) -> Lines:
    """Train ``recipe`` on ``data.train``; returns terms, learning rate, seconds and ``figures`` by epoch.

    With ``run``, a checkpoint is written after each epoch, and inside it every ``checkpoint_minutes``;
    training goes on from the last one to the same result as an uninterrupted run on the same machine.

    Raises:
        CheckpointError: the last checkpoint is of other settings.
        FloatingPointError: a loss that is NaN or infinite, with epoch, step and terms.
        KeyError: an optimiser group that the configuration does not know.
        ValueError: gradients are off; a model that is searched by its numbers; settings of a group that the
            recipe does not have; batches of one item, and a layer that normalises over the batch alone;
            labels from which a supervised objective learns nothing.
    """
    if not torch.is_grad_enabled():
        raise ValueError("fit needs gradients; call it outside of torch.no_grad() and inference_mode()")
    if world() > 1 and not recipe.data_parallel:
        raise ValueError(f"{type(recipe).__name__} trains in one process alone; start it without torchrun")
    device = choose_device(config.device)
    seed_everything(config.seed)
    recipe.hasher.to(device)
    check_labels(recipe, data.train)  # before setup, which would name another cause
    data = recipe.enlarged(data)
    with divided_among_processes(recipe.hasher):
        recipe.setup(data, config.seed, config.batch_size)
        lines = _train(recipe, data, config, device, run)
    recipe.hasher.freeze([])
    recipe.hasher.eval()
    recipe.hasher.side = data.image_size[0] if len(data.image_size) == 2 else None
    return lines


def _train(
    recipe: Recipe, data: RetrievalData, config: TrainConfig, device: torch.device, run: RunLog | None
) -> Lines:
    """Train a recipe that is set up; returns the entries of the log."""
    rates = {name: optim.lr for name, optim in config.optim.items()}
    groups, still = divided(recipe.hasher, recipe.parameter_groups(), rates)
    shares = {name: parameters for group in groups.values() for name, parameters in group.shares.items()}
    by_name = {name: config.optim[name].make(parameters) for name, parameters in shares.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    recipe.hasher.freeze(still, config.batchnorm == "frozen")
    least = max(world(), least_batch(recipe, data, config.batch_size))
    optimisers = _Optimisers(config, recipe.hasher, groups, by_name, scaler, least)
    if config.compile:
        for encoder in recipe.hasher.encoders.values():
            encoder.compile()
    position, lines = _resume(recipe, optimisers, run)
    while position.epoch < config.epochs:
        recipe.hasher.freeze([*still, *_held(shares, config, position.epoch)], config.batchnorm == "frozen")
        lines.append(_epoch(recipe, data, position, optimisers, run, lines))
        position = _Position(position.epoch + 1)
        if run is not None:
            run.log(lines[-1])
            run.checkpoint(_state(recipe, optimisers, position, lines))
    return lines


def _held(
    shares: Mapping[str, list[torch.nn.Parameter]], config: TrainConfig, epoch: int
) -> list[torch.nn.Parameter]:
    """Parameters of the parts that hold still in this epoch."""
    held = (name for name in shares if config.optim[name].frozen_epochs > epoch)
    return [parameter for name in held for parameter in shares[name]]


def _epoch(
    recipe: Recipe,
    data: RetrievalData,
    at: _Position,
    optimisers: _Optimisers,
    run: RunLog | None,
    lines: Lines,
) -> dict[str, Any]:
    """Train one epoch from ``at`` to its end; returns its entry of the log."""
    config, device = optimisers.config, recipe.hasher.device
    pool = recipe.pool(at.epoch)
    items = len(data.train) if pool is None else len(pool)
    steps = math.ceil(items / config.batch_size)
    steps -= steps > 1 and items % config.batch_size in range(1, optimisers.least)
    draws = Draws(config.seed, ("train",)).within(at.epoch)
    started, earlier, saved, rate = time.perf_counter(), at.seconds, time.perf_counter(), 0.0
    order, parts = draws.within("order"), recipe.hasher.modalities
    loader = batches(data.train, config.batch_size, order, pool, parts, at.step, optimisers.least)
    for step, batch in enumerate(loader, at.step):
        updates = math.ceil(steps / config.accumulate)
        progress = (at.epoch + step // config.accumulate / updates) / config.epochs
        factor = config.schedule.factor(progress)
        turn = _Turn.at(step, steps, config.accumulate)
        batch = _augmented(batch.to(device), config, draws)
        with precision(config.precision, device):
            for group, terms in recipe.step(batch, Moment(at.epoch, progress, draws)):
                means = at.figures if group == FIGURES else at.sums
                for name, term in terms.items():
                    means[name] = means.get(name, 0.0) + float(term.detach()) * len(batch) / items
                if group != FIGURES:
                    place = f"at epoch {at.epoch}, step {step}"
                    loss = _loss(terms, f"loss of {group!r} is not finite {place}")
                    rate = optimisers.step(group, loss, factor, turn)
        average_buffers(recipe.hasher, len(batch))
        at.step, at.seconds = step + 1, earlier + time.perf_counter() - started
        if run is not None:
            done, total = at.epoch * steps + step + 1, config.epochs * steps
            run.progress(done, total, f"epoch {at.epoch + 1}/{config.epochs}")
            due = 0 < config.checkpoint_minutes * 60 <= time.perf_counter() - saved
            if due and turn.last and at.step < steps:  # between the batches of one step there are gradients
                run.checkpoint(_state(recipe, optimisers, at, lines))
                saved = time.perf_counter()
    recipe.end_epoch(at.epoch)
    line = {"epoch": at.epoch, "lr": rate, "seconds": round(at.seconds, 3), **at.sums}
    return {**line, FIGURES: at.figures} if at.figures else line


def _augmented(batch: Batch, config: TrainConfig, draws: Draws) -> Batch:
    if config.augment == "none":
        return batch
    images = augment(batch.inputs["image"], batch.ids, draws.within("augment"))
    return batch.with_inputs({"image": images})


def _loss(terms: LossTerms, message: str) -> torch.Tensor:
    """Sum of the terms."""
    loss = torch.stack([term.float() for term in terms.values()]).sum()
    if not torch.isfinite(loss):
        values = {name: float(term.detach()) for name, term in terms.items()}
        raise FloatingPointError(f"{message}: {values}; lower the learning rate")
    return loss


def _state(recipe: Recipe, optimisers: _Optimisers, at: _Position, lines: list) -> dict[str, Any]:
    """All that the rest of training depends on; readable in weights-only mode."""
    return {
        **vars(at),
        "processes": world(),
        "lines": lines,
        "modules": {name: module.state_dict() for name, module in recipe.modules().items()},
        "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers.by_name.items()},
        "scaler": optimisers.scaler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _resume(recipe: Recipe, optimisers: _Optimisers, run: RunLog | None) -> tuple[_Position, Lines]:
    """Load the last checkpoint, if there is one; returns where to go on and the entries so far."""
    state = run.resume() if run is not None else None
    if state is None:
        return _Position(), []
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__} and no state of training")
    if (processes := state.get("processes", 1)) != world():
        raise CheckpointError(
            f"was begun by {processes} processes, and there are {world()} now; start as many"
        )
    try:
        for name, module in recipe.modules().items():
            module.load_state_dict(state["modules"][name])
        for name, optimiser in optimisers.by_name.items():
            optimiser.load_state_dict(state["optimisers"][name])
            check_shapes(optimiser)
        if state.get("scaler"):
            optimisers.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        # checkpoints of earlier versions were written at the end of an epoch alone
        fields = (name for name in _Position.__dataclass_fields__ if name in state)
        position = _Position(**{name: state[name] for name in fields})
        if position.epoch < optimisers.config.epochs and rank() == 0:
            logger.info("goes on from epoch %d of %d", position.epoch + 1, optimisers.config.epochs)
        return position, list(state["lines"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"does not fit this training ({reason})") from None
