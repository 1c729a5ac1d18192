"""EQB2A: a knockoff learned from ranked lists alone, and a generator trained against it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack
from robusthash.attacks.generator import Generator
from robusthash.attacks.generator_training import (
    GeneratorSchedule,
    GeneratorTask,
    change_weight,
    seeded,
    train_generator,
)
from robusthash.attacks.losses import Agreement
from robusthash.attacks.oracle import QueryOracle
from robusthash.attacks.painting import Generated, Painted, painted
from robusthash.attacks.substitute import Substituted, answered_modalities, sample
from robusthash.attacks.threat_model import Threat, image_threat
from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, HashOutput, Outputs, Reference
from robusthash.data.base import RetrievalData, Split
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher

_PAPER = "Zhu et al., ACM TOIS 2023"
NEAREST, RANKS = 5, 5
_AT_ONCE = 256  # listed items encoded at a time; a training step has 160
PAIRS = tuple(combinations(range(RANKS), 2))  # of the ranks that are spread over the list


def relaxed_distance(left: Tensor, right: Tensor) -> Tensor:
    """Relaxed Hamming distance over K of the last axis, in [0, 1]."""
    return (1 - (left * right).sum(-1) / left.shape[-1]) / 2


def ranking_loss(nearer: Tensor, farther: Tensor, gap: Tensor, margin: float = 0.1) -> Tensor:
    """Mean max(0, (d_1 - d_2) / g + margin): 0 once d_2 - d_1 >= margin g; ``gap`` is of the ranks."""
    return ((nearer - farther) / gap + margin).clamp_min(0).mean()


def listed(count: int) -> Tensor:
    """(10,) places of a list of ``count``: the five first, and five spread over all that follow."""
    if count < NEAREST + RANKS:
        raise ValueError(f"ranked lists of at least {NEAREST + RANKS} items are needed, got {count}")
    spread = torch.linspace(NEAREST, count - 1, RANKS).long()
    return torch.cat([torch.arange(NEAREST), spread])


@register("attack-guide", "knockoff", paper=_PAPER, evidence="paper+code", supervised=False)
@dataclass(frozen=True)
class Knockoff(Substituted):
    """A substitute that ranks as the victim does, and a generator that leads images away from what is near.

    Args:
        questions: training items sent to the victim in each modality; their ranked lists are all it shows.
        generator_epochs, width: of the generator; 100 and 64 published.
    """

    questions: int = 2000
    generator_epochs: int = 20
    width: int = 16
    bounded: bool = True
    eps: float = field(default=8 / 255, compare=False)
    nets: nn.ModuleDict | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.generator_epochs) < 1:
            raise ValueError(f"width and generator_epochs from 1, got {self.width}, {self.generator_epochs}")

    def under(self, threat: Threat) -> Knockoff:
        return replace(self, eps=threat.balls["image"].eps)

    def at_most(self, steps: int) -> Knockoff:
        return replace(
            self, epochs=min(steps, self.epochs), generator_epochs=min(steps, self.generator_epochs)
        )

    def fit_size(self, items: int) -> int:
        return (self.epochs + self.generator_epochs) * min(self.questions, items)

    def fitted(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws
    ) -> Knockoff:
        modalities, rows = answered_modalities(victim, data), sample(data, self.questions, draws)
        split, other = data.train.take(rows), modalities[-1]
        across = {"image": other, "text": "image"}
        lists = {name: self._lists(victim, data, split, name, across[name]) for name in modalities}
        model = self.new_model(victim, data, victim.bits, draws)

        def loss(outputs: Outputs, batch: Batch, scope: Draws) -> Tensor:
            terms = [
                self._ranking(
                    model, outputs[name].relaxed(), lists[name][batch.ids.cpu()], data, across[name]
                )
                for name in modalities
            ]
            return torch.stack(terms).sum()

        steps = self.train_substitute(model, split, draws, loss)
        with seeded(draws.within("generator")):
            nets = nn.ModuleDict({"planes": Generator(0, self.width, 1), "paint": Generator(3, self.width)})
        guide = replace(self, model=model, nets=nets.to(victim.device))
        training = KnockoffTraining(guide, self._codes(model, data, lists["image"][:, :NEAREST], other))
        weight = change_weight(None, self.bounded, published=5.0)  # 20 x MSE in [0, 1]
        schedule = GeneratorSchedule(self.generator_epochs, self.rate, reconstruction=weight)
        unlabelled = replace(data, train=replace(split, labels=None))
        steps += train_generator(training, model, unlabelled, schedule, draws)
        nets.requires_grad_(False)
        oracle_queries = len(rows) * len(modalities)
        return replace(guide, fit_steps=steps, fit_queries=oracle_queries, fit_items=len(data.train))

    @staticmethod
    def _lists(victim: Hasher, data: RetrievalData, split: Split, name: str, searched: str) -> Tensor:
        """(M, 10) ids of the listed items, from one counted oracle query (B1) for each item."""
        database = encode_split(victim.for_database(), data.train, modality=searched)[searched]
        oracle, lists = QueryOracle(victim, database, 1, "B1", k=len(database)), []
        places = listed(len(database))
        for part in torch.arange(len(split)).split(128):
            lists.append(oracle.rank(split.batch(part).only({name}).to(victim.device))[:, places])
        return torch.cat(lists)

    @staticmethod
    def _codes(model: Hasher, data: RetrievalData, rows: Tensor, name: str) -> Tensor:
        """(M, n, K) relaxed codes of listed training items by the model; those of a training step at once."""
        flat, inverse = torch.unique(rows, return_inverse=True)
        parts = (data.train.batch(part).only({name}).to(model.device) for part in flat.split(_AT_ONCE))
        codes = torch.cat([model(part.inputs)[name].relaxed() for part in parts])
        return codes[inverse.to(model.device)]

    def _ranking(self, model: Hasher, anchor: Tensor, rows: Tensor, data: RetrievalData, name: str) -> Tensor:
        """The knockoff's loss of one direction: rank pairs, + 0.01 balance + 0.001 quantisation."""
        apart = relaxed_distance(anchor[:, None], self._codes(model, data, rows[:, NEAREST:], name))
        first, second = (torch.tensor([pair[side] for pair in PAIRS]) for side in (0, 1))
        gap = (second - first).to(apart)
        bits = anchor.shape[1] * len(anchor)
        balance = anchor.sum(0).square().sum() / bits
        spread = (sign(anchor.detach()) - anchor).square().sum() / bits
        return ranking_loss(apart[:, first], apart[:, second], gap) + 0.01 * balance + 0.001 * spread

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Painted:
        if self.nets is None:
            raise ValueError("this generator is not trained yet: call attack.fit(...) on the victim")
        images = batch.inputs["image"]
        with torch.no_grad():
            small = images.float()
            planes = self.nets["planes"](small, small[:, :0])
            result = painted(self.nets["paint"](small, planes), small, self.eps if self.bounded else None)
        if not torch.isfinite(result).all():
            raise FloatingPointError("the generator's images are NaN or infinite")
        return Painted(torch.empty(0, victim.bits, device=images.device), inputs={"image": result.to(images)})


class KnockoffTraining:
    """EQB2A's generator in training: sum over the five nearest of max(0, 0.8 - d(h', b))."""

    FAR = 0.8

    def __init__(self, guide: Knockoff, nearest: Tensor) -> None:
        assert guide.nets is not None
        self.guide, self.nets, self.nearest = guide, guide.nets, nearest.detach()

    def task(self, batch: Batch, draws: Draws) -> GeneratorTask:
        images, near = batch.inputs["image"], self.nearest[batch.ids]
        nothing = images.new_empty(len(images), 0)

        def code_loss(output: HashOutput) -> Tensor:
            apart = relaxed_distance(output.relaxed()[:, None], near)
            return (self.FAR - apart).clamp_min(0).mean(0).sum()

        return GeneratorTask(self.nets["planes"](images, images[:, :0]), nothing, nothing, code_loss)

    def paint(self, images: Tensor, planes: Tensor) -> Tensor:
        bound = self.guide.eps if self.guide.bounded else None
        return painted(self.nets["paint"](images, planes), images, bound)


@register(
    "attack",
    "eqb2a",
    paper=_PAPER,
    evidence="paper+code",
    modality="image",
    supervised=False,
    state="measured",
    published={"generator_epochs": 100, "width": 64, "rate": 1e-4},
)
def eqb2a(
    eps: float | None = None,
    questions: int = 2000,
    encoder: str | dict[str, Any] = "small",
    epochs: int = 20,
    generator_epochs: int = 20,
    width: int = 16,
    rate: float = 1e-3,
    bounded: bool = True,
) -> Attack:
    """EQB2A: one pass of a generator that learned on a knockoff of the victim, which learned from ranks.

    ``questions`` of each modality against the training set; no oracle query per attacked item. The code asks
    8,000 times in all: 4,000 for the knockoff, and the 2,000 images again in each of two more stages.

    Differs: the lists of the first stage serve the others too; the perturbation net learns with the generator
    in place of a stage of its own, whose supervisor never sees an image; one convention of pixels (the code
    trains the knockoff on 0 to 255 and attacks it in [-1, 1]); within eps (``bounded: false``: an image, as
    published); nets from scratch unless ``encoder`` names another. Of images alone the lists are of images.
    """
    threat = image_threat(8 / 255 if eps is None else eps, knowledge="B1")
    guide = Knockoff(encoder, epochs, rate, questions=questions, bounded=bounded)
    guide = replace(guide, generator_epochs=generator_epochs, width=width)
    return Attack("eqb2a", guide, Agreement(), Generated(), threat)
