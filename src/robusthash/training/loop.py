"""The one training loop: epochs, optimisers, schedules, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from robusthash.core.runtime import Draws, choose_device, precision, seed_everything
from robusthash.core.types import Batch, LossTerms
from robusthash.data.base import RetrievalData, batches
from robusthash.data.transforms import augment
from robusthash.training.optimiser_groups import Group, divided
from robusthash.training.recipe import FIGURES, Moment, Recipe


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")


def _in_range(name: str, value: float, above: float) -> None:
    if not 0 <= value < above:
        limit = "finite" if above == math.inf else f"below {above:g}"
        raise ValueError(f"{name} must be at least 0 and {limit}, got {value!r}")


@dataclass(frozen=True)
class OptimConfig:
    """One optimiser group; ``lr`` 0 freezes a part of the hasher, ``frozen_epochs`` for its first epochs."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    frozen_epochs: int = 0

    def __post_init__(self) -> None:
        _one_of("optimiser", self.name, ("sgd", "adam", "adamw"))
        for name, above in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
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
class Schedule:
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
class TrainConfig:
    """Settings of training that belong to no method."""

    epochs: int = 20
    batch_size: int = 64
    optim: dict[str, OptimConfig] = field(default_factory=lambda: {"hasher": OptimConfig()})
    schedule: Schedule = Schedule()
    augment: Literal["none", "flip-crop"] = "none"
    clip: float = 0.0  # largest gradient norm of a group; 0 does not clip
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    batchnorm: Literal["train", "frozen"] = "train"  # frozen: the encoders' statistics stay as they came

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _one_of("augment", self.augment, ("none", "flip-crop"))
        _one_of("batchnorm", self.batchnorm, ("train", "frozen"))


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
    groups: Mapping[str, Group]
    by_name: Mapping[str, torch.optim.Optimizer]

    def step(self, group: str, loss: torch.Tensor, factor: float) -> float:
        """Step the optimisers of a group; returns its learning rate."""
        stepped = {name: self.by_name[name] for name in self.groups[group].shares}
        for optimiser in stepped.values():
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.groups[group].parameters, self.config.clip)
        for name, optimiser in stepped.items():
            for parameters in optimiser.param_groups:
                parameters["lr"] = self.config.optim[name].lr * factor
            optimiser.step()
        return self.config.optim[group].lr * factor


def fit(
    recipe: Recipe, data: RetrievalData, config: TrainConfig, run: RunLog | None = None
) -> list[dict[str, Any]]:
    """Train ``recipe`` on ``data.train``; returns terms, learning rate, seconds and ``figures`` by epoch.

    With ``run``, a checkpoint is written after each epoch, and training goes on from the last one to the same
    result as an uninterrupted run on the same machine.

    Raises:
        FloatingPointError: a loss that is NaN or infinite, with epoch, step and terms.
        KeyError: an optimiser group that the configuration does not know.
        ValueError: settings of a group that the recipe does not have.
    """
    device = choose_device(config.device)
    seed_everything(config.seed)
    recipe.hasher.to(device)
    recipe.setup(data, config.seed, config.batch_size)
    rates = {name: optim.lr for name, optim in config.optim.items()}
    groups, still = divided(recipe.hasher, recipe.parameter_groups(), rates)
    shares = {name: parameters for group in groups.values() for name, parameters in group.shares.items()}
    by_name = {name: config.optim[name].make(parameters) for name, parameters in shares.items()}
    optimisers = _Optimisers(config, groups, by_name)
    first, lines = _resume(recipe, by_name, run)
    for epoch in range(first, config.epochs):
        recipe.hasher.freeze([*still, *_held(shares, config, epoch)], config.batchnorm == "frozen")
        lines.append(_epoch(recipe, data, epoch, optimisers, run))
        if run is not None:
            run.log(lines[-1])
            run.checkpoint(_state(recipe, by_name, epoch + 1, lines))
    recipe.hasher.freeze([])
    recipe.hasher.eval()
    return lines


def _held(
    shares: Mapping[str, list[torch.nn.Parameter]], config: TrainConfig, epoch: int
) -> list[torch.nn.Parameter]:
    """Parameters of the parts that hold still in this epoch."""
    held = (name for name in shares if config.optim[name].frozen_epochs > epoch)
    return [parameter for name in held for parameter in shares[name]]


def _epoch(
    recipe: Recipe, data: RetrievalData, epoch: int, optimisers: _Optimisers, run: RunLog | None
) -> dict[str, Any]:
    """Train one epoch; returns its entry of the log."""
    config, device = optimisers.config, recipe.hasher.device
    pool = recipe.pool(epoch)
    items = len(data.train) if pool is None else len(pool)
    steps = math.ceil(items / config.batch_size)
    draws = Draws(config.seed, ("train",)).within(epoch)
    started, rate = time.perf_counter(), 0.0
    sums: dict[str, float] = {}
    figures: dict[str, float] = {}
    loader = batches(data.train, config.batch_size, draws.within("order"), pool, recipe.hasher.modalities)
    for step, batch in enumerate(loader):
        progress = (epoch + step / steps) / config.epochs
        factor = config.schedule.factor(progress)
        batch = _augmented(batch.to(device), config, draws)
        with precision(config.precision, device):
            for group, terms in recipe.step(batch, Moment(epoch, progress, draws)):
                means = figures if group == FIGURES else sums
                for name, term in terms.items():
                    means[name] = means.get(name, 0.0) + float(term.detach()) * len(batch) / items
                if group != FIGURES:
                    loss = _loss(terms, f"loss of {group!r} is not finite at epoch {epoch}, step {step}")
                    rate = optimisers.step(group, loss, factor)
        if run is not None:
            done, total = epoch * steps + step + 1, config.epochs * steps
            run.progress(done, total, f"epoch {epoch + 1}/{config.epochs}")
    recipe.end_epoch(epoch)
    line = {"epoch": epoch, "lr": rate, "seconds": round(time.perf_counter() - started, 3), **sums}
    return {**line, FIGURES: figures} if figures else line


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


def _state(
    recipe: Recipe, optimisers: Mapping[str, torch.optim.Optimizer], epoch: int, lines: list
) -> dict[str, Any]:
    """All that the rest of training depends on; readable in weights-only mode."""
    return {
        "epoch": epoch,
        "lines": lines,
        "modules": {name: module.state_dict() for name, module in recipe.modules().items()},
        "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers.items()},
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _resume(
    recipe: Recipe, optimisers: Mapping[str, torch.optim.Optimizer], run: RunLog | None
) -> tuple[int, list[dict[str, Any]]]:
    """Load the last checkpoint, if there is one; returns the first epoch to train and the entries so far."""
    state = run.resume() if run is not None else None
    if state is None:
        return 0, []
    for name, module in recipe.modules().items():
        module.load_state_dict(state["modules"][name])
    for name, optimiser in optimisers.items():
        optimiser.load_state_dict(state["optimisers"][name])
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return state["epoch"], state["lines"]
