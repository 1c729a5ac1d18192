"""DPN: a hinge that pushes every bit past a margin, towards the target code of its class."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives.base import TrainFacts
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.csq import CSQ


@register("objective", "dpn", paper="Fan et al., IJCAI 2020", evidence="paper+code")
class DPN(CSQ):
    """DPN: polarisation; L = mean_k max(0, margin - v_k t_k), t the target code of the item's classes.

    Targets are random balanced codes (half of the bits -1); an item of several classes has the sign of their
    sum, with zeros filled from one random vector, as in CSQ. v are the logits, without tanh: past the margin
    a bit is at rest, which is what polarises. So an attack on this objective gets no gradient from an item
    whose bits are all at rest: judge the robustness of DPN by attacks with a guide.

    Args:
        margin: m, 1.
        on_tanh: feed tanh(v) as SAAT's code does; with margin 1 the hinge is then always active, L = 1 - mean
            h t.
        adaptive: after each epoch the target of a class becomes the majority of its items' codes; a tie keeps
            its bit.

    Differs: mean over bits (the authors' code sums them; SAAT's takes the mean). Several classes: the authors
    sum the hinges of each class; ours is the rule of SAAT's code.
    """

    def __init__(self, margin: float = 1.0, on_tanh: bool = False, adaptive: bool = False) -> None:
        super().__init__(quantisation=0.0)
        self.margin = margin
        self.on_tanh = on_tanh
        self.adaptive = adaptive

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)  # the filler
        generator = Draws(facts.seed, ("dpn",)).within("targets").generator()
        order = torch.rand(facts.classes, facts.bits, generator=generator).argsort(1)
        self.centers = torch.where(order < facts.bits // 2, -1.0, 1.0).to(self.filler.device)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        values = output.relaxed() if self.on_tanh else output.logits
        hinge = (self.margin - values * self.targets(labels)).relu().mean(1)
        return hinge * (labels.sum(1) > 0)  # an item without labels has no target

    def end_epoch(self, memory: CodeMemory) -> None:
        if not self.adaptive:
            return
        if memory.labels is None:
            raise ValueError("adaptive targets need labels, and the training split has none")
        votes = memory.labels.T @ torch.stack([sign(codes.detach()) for codes in memory.codes.values()]).sum(
            0
        )
        self.centers = torch.where(votes == 0, self.centers, sign(votes))
