"""The interface of a training recipe, and the plain one: a hasher on its objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusthash.core.registry import card_of, name_of, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, LossTerms, Outputs
from robusthash.data.base import RetrievalData, Split, batches
from robusthash.models.external.wrap import require_hasher
from robusthash.models.hasher import Encoder, Hasher, frozen
from robusthash.models.heads import MetaEmbeddingHead
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts, refuse_labels, share_similar

FIGURES = "figures"
"""In place of a group's name: such terms of a recipe are averaged into the log and not optimised."""


@dataclass(frozen=True)
class Moment:
    """The point of training at which a step is taken."""

    epoch: int
    progress: float  # share of all steps already taken, in [0, 1)
    draws: Draws  # of this epoch


class Recipe(ABC):
    """Interface of one way to train; the loop owns optimisers and checkpoints, it owns modes and losses."""

    groups: ClassVar[tuple[str, ...] | None] = None
    """The optimiser groups that it may have, the first always, by which a recipe file is checked when it is
    read; None leaves that to training."""

    data_parallel: ClassVar[bool] = True
    """It calls the hasher as a whole, so that several processes may each hash a share of a batch."""

    new_heads: ClassVar[bool] = False
    """It makes the heads itself, so those of a run that it starts from are replaced."""

    starts_trained: ClassVar[bool] = False
    """It makes no sense on a new net: a recipe file must say ``init_from``."""

    hasher: Hasher
    objective: HashObjective

    @property
    def learns_from_labels(self) -> bool:
        """Training is refused where labels are missing or all the same."""
        card = card_of(type(self))
        return self.objective.supervised and (card is None or card.supervised)

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Everything with state, by name, for checkpoints. ``hasher`` is always one of them."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by optimiser group: ``hasher``, and with any ``critic``, ``purifier``, ``guide``."""

    def enlarged(self, data: RetrievalData) -> RetrievalData:
        """The data to train on, where a recipe trains on more than the training split."""
        return data

    @abstractmethod
    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        """Make what depends on the data, once, before the first step or a resume."""

    def pool(self, epoch: int) -> Tensor | None:
        """Positions trained on this epoch; None is all of them."""
        return None

    def epoch_items(self, train: int) -> int:
        """Items that an epoch trains on, of a training split of ``train``."""
        return train

    @abstractmethod
    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        """Yield (group, loss terms); the loop steps that group and resumes here, with parameters moved.

        Terms with ``FIGURES`` as their group are only logged.
        """

    def end_epoch(self, epoch: int) -> None:  # noqa: B027 - only discrete solvers have something to do
        """Update what is solved once an epoch."""

    def database_codes(self) -> Codes | None:
        """Learned database codes, where the method makes them."""
        return None


def train_facts(split: Split, hasher: Hasher, seed: int) -> TrainFacts:
    """Facts on ``split`` and on the hasher for an objective."""
    share = 0.0 if split.labels is None else share_similar(split.labels)
    widths = {name: int(encoder.width) for name, encoder in hasher.encoders.items()}  # type: ignore[arg-type]
    aux = {name: e.aux_widths if isinstance(e, Encoder) else {} for name, e in hasher.encoders.items()}
    return TrainFacts(
        len(split), hasher.bits, split.labels, seed, share, widths, aux, split, dict(hasher.encoders)
    )


def check_labels(recipe: Recipe, split: Split) -> None:
    """Refuse training items whose labels teach nothing, where the recipe learns from labels."""
    if recipe.learns_from_labels:
        refuse_labels(name_of(recipe.objective), split.labels, len(split))


def check_modalities(hasher: Hasher, data: RetrievalData) -> None:
    """Refuse a net that is no hasher or has no codes, and data that lack a modality of the hasher."""
    require_hasher(hasher)
    if hasher.distance != "hamming":
        raise ValueError(
            f"this model is searched by the {hasher.distance} distance of its numbers; codes are trained: "
            "wrap it with output='logits'"
        )
    for name in hasher.modalities:
        if name not in data.modalities:
            raise ValueError(f"this hasher encodes {name!r}, {data.name} has {list(data.modalities)}")


def detached(outputs: Outputs) -> Outputs:
    """The same outputs, from which no gradient flows back."""
    result = {}
    for name, o in outputs.items():
        aux = {key: value.detach() for key, value in o.aux.items()}
        logits, code, features = o.logits.detach(), o.code.detach(), o.features.detach()
        result[name] = replace(o, logits=logits, code=code, features=features, aux=aux)
    return result


@torch.no_grad()
def fill_memory(memory: CodeMemory, hasher: Hasher, split: Split, batch_size: int) -> None:
    """Fill every row of the memory by one eval-mode pass."""
    with frozen(hasher):
        for batch in batches(split, batch_size, modalities=hasher.modalities):
            batch = batch.to(hasher.device)
            memory.update(hasher(batch.inputs), batch)


@torch.no_grad()
def renew_class_means(hasher: Hasher, split: Split, batch_size: int) -> None:
    """Set the class means of LTHNet's heads, where a hasher has such, by one eval-mode pass.

    Raises:
        ValueError: a split without labels, or of another number of classes.
    """
    heads = {name: head for name, head in hasher.heads.items() if isinstance(head, MetaEmbeddingHead)}
    if not heads:
        return
    classes = 0 if split.labels is None else split.labels.shape[1]
    for head in heads.values():
        if classes != len(head.means):
            remedy = f"set hasher.head.classes: {classes}" if classes else "it needs labels"
            raise ValueError(
                f"the head 'meta-embedding' has {len(head.means)} classes, the data {classes}; {remedy}"
            )
    sums = {name: torch.zeros_like(head.means) for name, head in heads.items()}
    counts = torch.zeros(classes, 1, device=hasher.device)
    with frozen(hasher):
        for batch in batches(split, batch_size, modalities=hasher.modalities):
            batch = batch.to(hasher.device)
            outputs, labels = hasher(batch.inputs), batch.labels
            assert labels is not None, "the split has labels"
            counts += labels.sum(0)[:, None]
            for name, head in heads.items():
                sums[name] += labels.T @ head.direct(outputs[name].features)
    for name, head in heads.items():
        head.means.copy_(sums[name] / counts.clamp_min(1.0))


@register("recipe", "hashing", state="measured")
class HashingRecipe(Recipe):
    """Train a hasher on its objective, undefended.

    Args:
        noise: standard deviation of Gaussian noise on every training image, in units of the range [0, 1], for
            codes by majority under such noise (Cohen et al., ICML 2019); none by default.
    """

    groups = ("hasher", "critic")

    def __init__(self, hasher: Hasher, objective: HashObjective, noise: float = 0.0) -> None:
        if not 0.0 <= noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, such as 0.25, got {noise!r}")
        if noise and "image" not in hasher.modalities:
            raise ValueError(f"noise is for images, and this hasher encodes {', '.join(hasher.modalities)}")
        self.hasher = hasher
        self.objective = objective
        self.noise = noise
        self.memory: CodeMemory

    def modules(self) -> dict[str, nn.Module]:
        return {"hasher": self.hasher, "objective": self.objective, "memory": self.memory}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        critics = [] if self.objective.critics is None else list(self.objective.critics.parameters())
        ids = {id(parameter) for parameter in critics}
        own = [parameter for parameter in self.objective.parameters() if id(parameter) not in ids]
        groups = {"hasher": [*self.hasher.parameters(), *own]}
        return {**groups, "critic": critics} if critics else groups

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        check_modalities(self.hasher, data)
        device = self.hasher.device
        self.objective.to(device).setup(train_facts(data.train, self.hasher, seed))
        self.objective.to(device)  # what setup made
        self._renewal = (data.train, batch_size)
        renew_class_means(self.hasher, *self._renewal)
        memory = CodeMemory(len(data.train), self.hasher.bits, data.train.labels, self.hasher.modalities)
        self.memory = memory.to(device)
        fill_memory(self.memory, self.hasher, data.train, batch_size)

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        self.hasher.train()
        if self.noise:
            batch = batch.with_inputs({"image": self._noisy(batch, moment)})
        outputs = self.hasher(batch.inputs)
        self.memory.update(outputs, batch)
        yield from self.critic_step(outputs, batch)
        yield "hasher", self.objective(outputs, batch, self.memory)
        self.objective.advance()

    def _noisy(self, batch: Batch, moment: Moment) -> Tensor:
        """The images under noise of this step, in the order of the batch; not cut to [0, 1]."""
        images = batch.inputs["image"]
        # progress stands still over batches that make one step, so the items tell them apart
        generator = moment.draws.within("noise", moment.progress, int(batch.ids[0])).generator()
        return images + self.noise * torch.randn(images.shape, generator=generator).to(images)

    def critic_step(self, outputs: Outputs, batch: Batch) -> Iterator[tuple[str, LossTerms]]:
        """The step of the objective's discriminators, where it has any."""
        if self.objective.critics is not None:
            yield "critic", self.objective.critic(detached(outputs), batch)

    def end_epoch(self, epoch: int) -> None:
        self.objective.end_epoch(self.memory)
        renew_class_means(self.hasher, *self._renewal)
