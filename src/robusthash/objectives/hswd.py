"""HSWD: the values of each bit matched to fair coins, as a term added to any objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts


def coin_distance(values: Tensor, coins: Tensor) -> Tensor:
    """Mean squared distance of the sorted values of each bit (B, K) to the sorted coins (B, K)."""
    return (values.sort(0).values - coins.sort(0).values).square().mean()


@register("objective", "hswd", paper="Doan et al., CVPR 2022", evidence="paper+code", state="measured")
class HSWD(HashObjective):
    """HSWD: another objective, and the sliced Wasserstein distance of its bits to fair +-1 coins.

    L = L_base + weight q, q = (1 / (B K)) sum_k ||sort(v_k) - sort(R_k)||^2, R drawn again in every step. It
    replaces a quantisation penalty and balances each bit over the batch. It is a term of the batch, so an
    attack on this objective ascends the base's similarity. One forward and backward pass an item, a sort a
    bit.

    Args:
        base: the objective that it is added to, ``hashnet`` as in the published codes; any other.
        weight: 0.1 in the published codes.
        on_tanh: match the codes that the objective sees, as in SAAT's and CgAT's code; the authors match the
            logits.

    Differs: means over values, as in the codes. With a batch of B the coins are balanced to 1 / sqrt(B), so
    q does not reach 0.
    """

    steps: Tensor

    def __init__(
        self, base: str | Mapping[str, Any] = "hashnet", weight: float = 0.1, on_tanh: bool = False
    ) -> None:
        super().__init__()
        self.base: HashObjective = build("objective", base)
        if isinstance(self.base, HSWD):
            raise ValueError("the base of hswd is another objective than hswd itself")
        self.supervised = self.base.supervised  # type: ignore[misc]
        self.intra = self.base.intra  # type: ignore[misc]
        self.training_only = tuple(f"base.{name}" for name in self.base.training_only)  # type: ignore[misc]
        self.weight = weight
        self.on_tanh = on_tanh
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def setup(self, facts: TrainFacts) -> None:
        self.base.setup(facts)
        self.critics = self.base.critics
        self._draws = Draws(facts.seed, ("hswd",))

    def advance(self) -> None:
        self.steps += 1
        self.base.advance()

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return self.base.critic(outputs, batch)

    def end_epoch(self, memory: CodeMemory) -> None:
        self.base.end_epoch(memory)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return self.base.similarity(output, labels, codes, code_labels)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.base.regularisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The base's terms, and ``coins``."""
        terms = self.base(outputs, batch, memory)
        distances = []
        for name, output in outputs.items():
            values = output.code if self.on_tanh else output.logits / output.scale
            generator = self._draws.within("coins", name, int(self.steps)).generator()
            coins = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2.0 - 1.0
            distances.append(coin_distance(values, coins))
        return {**terms, "coins": self.weight * torch.stack(distances).mean()}
