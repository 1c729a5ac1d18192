"""Substitutes: nets of the attacker's own, trained on what a victim answered or on labels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.base import Guide
from robusthash.attacks.generator_training import seeded
from robusthash.core.runtime import Draws, show_progress
from robusthash.core.types import Batch, Outputs
from robusthash.data.base import RetrievalData, Split, batches
from robusthash.models.hasher import Hasher, build_hasher


@dataclass(frozen=True)
class Substituted(Guide):
    """A guide with a model of its own, learned in ``fitted``, in place of the victim.

    Args:
        encoder: name of the image encoder of the substitute; ``resnet50`` with weights in the papers.
        epochs, rate, batch: of its training by Adam.
    """

    encoder: str | dict[str, Any] = "small"
    epochs: int = 20
    rate: float = 1e-3
    batch: int = 32
    model: Hasher | None = field(default=None, compare=False)
    fit_steps: int = field(default=0, compare=False)
    fit_queries: int = field(default=0, compare=False)
    fit_items: int = field(default=0, compare=False)
    learns = True
    substitutes = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or not self.rate > 0:
            raise ValueError(
                f"epochs and batch from 1 and a rate above 0, got {self.epochs}, {self.batch}, {self.rate}"
            )

    def at_most(self, steps: int) -> Substituted:
        return replace(self, epochs=min(steps, self.epochs))

    def fit_size(self, items: int) -> int:
        return self.epochs * items

    def ascended_model(self, victim: Hasher) -> Hasher:
        return self.required

    @property
    def required(self) -> Hasher:
        """The substitute; refused before ``fitted``."""
        if self.model is None:
            raise ValueError("there is no substitute yet: call attack.fit(...) on the victim")
        return self.model

    def new_model(self, victim: Hasher, data: RetrievalData, bits: int, draws: Draws) -> Hasher:
        """An untrained substitute: the encoder, and a net of bags of words where the victim reads them."""
        vocabulary = data.vocabulary if "text" in answered_modalities(victim, data) else None
        text = None if vocabulary is None else "mlp"
        with seeded(draws.within("substitute")):
            seed = draws.within("weights").key() % 2**31
            model = build_hasher(bits=bits, image=self.encoder, text=text, vocabulary=vocabulary, seed=seed)
        return model.to(victim.device)

    def train_substitute(
        self, model: Hasher, split: Split, draws: Draws, loss: Callable[[Outputs, Batch, Draws], Tensor]
    ) -> int:
        """Train the model on a split by a loss of its outputs; the steps taken. It ends in eval mode."""
        optimiser, steps = torch.optim.Adam(model.parameters(), self.rate), 0
        model.train()
        for epoch in range(self.epochs):
            scope = draws.within("epoch", epoch)
            for batch in batches(split, self.batch, scope, modalities=model.modalities, least=2):
                batch = batch.to(model.device)
                with torch.enable_grad():
                    value = loss(model(batch.inputs), batch, scope)
                if not torch.isfinite(value):
                    raise FloatingPointError("the loss of the substitute is NaN or infinite; lower its rate")
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
                steps += 1
            show_progress(epoch + 1, self.epochs, "epochs of the substitute")
        model.eval().requires_grad_(False)
        return steps


def answered_modalities(victim: Hasher, data: RetrievalData) -> tuple[str, ...]:
    """Modalities in which a victim can be asked and a substitute learn: images, and bags of words.

    Raises:
        ValueError: no images.
    """
    if "image" not in victim.modalities or "image" not in data.modalities:
        raise ValueError(f"a substitute reads images, and {data.name} or this victim has none")
    bags = "text" in data.modalities and data.train.batch(torch.arange(1)).inputs["text"].is_floating_point()
    return ("image", "text") if bags and "text" in victim.modalities else ("image",)


def sample(data: RetrievalData, count: int, draws: Draws) -> Tensor:
    """Positions of ``count`` training items, all of them where there are fewer, in the order of the split.

    Raises:
        ValueError: fewer than two questions.
    """
    if count < 2:
        raise ValueError(f"a substitute learns from at least 2 oracle queries, got {count}")
    every = torch.arange(len(data.train))
    return draws.within("asked").uniform(every, ()).argsort(stable=True)[:count].sort().values
