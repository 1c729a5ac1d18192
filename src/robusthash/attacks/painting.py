"""Images that a generator painted: the guidance that carries them, and the search that only takes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robusthash.attacks.base import Score, Search, SearchResult, Select, Start
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Guidance, Inputs


@dataclass(frozen=True)
class Painted(Guidance):
    """The code of each target, and the images that a generator made of the queries for it."""

    inputs: Inputs = field(default_factory=dict)


@register(
    "attack-search", "generated", paper="ProS-GAN, CVPR 2021; TA-DCH, TCSVT 2023", evidence="paper+code"
)
@dataclass(frozen=True)
class Generated(Search):
    """No search: the inputs that the guide painted, brought into the budget. It passes through no victim."""

    steps: int = 1
    by_gradient = False
    painted: Inputs | None = field(default=None, compare=False, repr=False)

    def towards(self, guidance: Guidance) -> Generated:
        if not isinstance(guidance, Painted):
            raise ValueError("the search 'generated' takes what a guide painted, such as 'generator'")
        return replace(self, painted=guidance.inputs)

    def __call__(
        self, score: Score, batch: Batch, threat: Threat, draws: Draws, select: Select | None, start: Start
    ) -> SearchResult:
        assert self.painted is not None
        origin = {name: batch.inputs[name] for name in threat.balls}
        return SearchResult(threat.project(self.painted, origin), torch.empty(0))


def painted(output: Tensor, images: Tensor, eps: float | None) -> Tensor:
    """Images of a generator's output in (-1, 1): the output itself (None), or a change of at most ``eps``."""
    return (output + 1) / 2 if eps is None else (images + eps * output).clamp(0, 1)
