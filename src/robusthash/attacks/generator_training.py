"""Training of generators: seeded, by epoch, and from its file on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from robusthash.attacks.generator import Discriminator, judged
from robusthash.attacks.generator_file import GeneratorFile
from robusthash.core.runtime import Draws, show_progress
from robusthash.core.types import Batch, HashOutput
from robusthash.data.base import RetrievalData, batches
from robusthash.models.hasher import Hasher, frozen

_EVERY = 3  # batches between two steps of the discriminator, in all three codes


@dataclass(frozen=True)
class GeneratorTask:
    """Task of the generator on one batch."""

    planes: Tensor  # (B, P, H, W) next to the images
    real: Tensor  # (B, C) labels of the images, for the discriminator
    target_labels: Tensor  # (B, C) labels that the attacked images should be taken for
    code_loss: Callable[[HashOutput], Tensor]  # of the attacked images


class TrainableGenerator(Protocol):
    """A generator in training: its nets, and what they learn of a batch."""

    @property
    def nets(self) -> nn.Module: ...

    def task(self, batch: Batch, draws: Draws) -> GeneratorTask: ...

    def paint(self, images: Tensor, planes: Tensor) -> Tensor:
        """(B, 3, H, W) attacked images in [0, 1]."""


@dataclass(frozen=True)
class GeneratorSchedule:
    """Adam (0.5, 0.999) from ``rate``, constant for half of the epochs and then falling to zero.

    ``reconstruction`` weighs the squared change in units of [-1, 1].
    """

    epochs: int = 20
    rate: float = 1e-4
    batch: int = 24
    reconstruction: float = 100.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1:
            raise ValueError(f"epochs and batch must be at least 1, got {self.epochs} and {self.batch}")
        if not self.rate > 0 or self.reconstruction < 0:
            raise ValueError(f"rate above 0 and weight from 0, got {self.rate}, {self.reconstruction}")


def change_weight(given: float | None, bounded: bool, published: float) -> float:
    """Weight of the squared change in a generator's loss: none within a bound, which limits it already."""
    if given is not None:
        return given
    return 0.0 if bounded else published


def train_generator(
    generator: TrainableGenerator,
    model: Hasher,
    data: RetrievalData,
    schedule: GeneratorSchedule,
    draws: Draws,
    file: GeneratorFile | None = None,
    begin: Callable[[], None] = lambda: None,
) -> int:
    """Train against ``model`` on the training images; the steps of the generator. Resumes from ``file``.

    Least squares as published: the discriminator learns every third batch [labels, 0] of real and
    [target labels, 1] of attacked images; the generator minimises the loss of the attacked code +
    least squares to [target labels, 0] + ``reconstruction`` x squared change.

    Args:
        begin: what is learned before the first epoch, such as the prototypes.
    """
    classes = 0 if data.train.labels is None else data.train.labels.shape[1]
    with seeded(draws.within("discriminator")):
        critic = Discriminator(classes, 16).to(model.device)
    optimisers = [
        torch.optim.Adam(nets.parameters(), schedule.rate, betas=(0.5, 0.999))
        for nets in (generator.nets, critic)
    ]
    nets: dict[str, Any] = {"nets": generator.nets, "critic": critic, "g": optimisers[0], "d": optimisers[1]}
    done = file.restore(nets) if file else 0
    if not done:
        begin()
    keys, per_epoch = ("image", "text"), -(-len(data.train) // schedule.batch)
    for epoch in range(done, schedule.epochs):
        left = min(1.0, 2 * (1 - epoch / schedule.epochs))
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = schedule.rate * left
        shuffle = draws.within("epoch", epoch)
        with frozen(model), torch.enable_grad():
            for step, batch in enumerate(batches(data.train, schedule.batch, shuffle, modalities=keys)):
                _step(generator, critic, model, batch.to(model.device), optimisers, schedule, shuffle, step)
        if file:
            file.write(nets, epoch + 1)
        show_progress(epoch + 1, schedule.epochs, "epochs of the generator")
    return schedule.epochs * per_epoch


def _step(
    generator: TrainableGenerator,
    critic: nn.Module,
    model: Hasher,
    batch: Batch,
    optimisers: list[torch.optim.Adam],
    schedule: GeneratorSchedule,
    draws: Draws,
    step: int,
) -> None:
    images, task = batch.inputs["image"], generator.task(batch, draws)
    attacked = generator.paint(images, task.planes)
    if step % _EVERY == 0:
        real = judged(critic(images), task.real, attacked=False)
        fake = judged(critic(attacked.detach()), task.target_labels, attacked=True)
        _descend((real + fake) / 2, optimisers[1])
    change = 4 * mse_loss(attacked, images)  # pixels of [0, 1], counted in [-1, 1]
    fooled = judged(critic(attacked), task.target_labels, attacked=False)
    code = task.code_loss(model({"image": attacked})["image"])
    _descend(code + fooled + schedule.reconstruction * change, optimisers[0])


def _descend(loss: Tensor, optimiser: torch.optim.Adam) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError("the loss of the generator is NaN or infinite; take a smaller rate")
    parameters = [p for p in optimiser.param_groups[0]["params"] if p.requires_grad]
    for parameter, slope in zip(
        parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
    ):
        parameter.grad = slope
    optimiser.step()


@contextmanager
def seeded(draws: Draws) -> Iterator[None]:
    """Initial weights from these draws; the global stream is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.key())
        yield
