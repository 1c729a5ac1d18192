"""UCCH: contrast of each pair with a bank of binary codes, and a ranking loss with a soft margin."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.dadh import unit
from robusthash.objectives.unsupervised import Unsupervised


def ranking(cosines: Tensor, margin: float, shift: float) -> Tensor:
    """Mean_i of logsumexp_j c_ij - s_ii + margin; c_ij = s_ij, less ``shift`` if below s_ii - margin."""
    own = cosines.diagonal()
    hard = cosines >= own[:, None] - margin
    return (torch.logsumexp(torch.where(hard, cosines, cosines - shift), 1) - own).mean() + margin


@register(
    "objective",
    "ucch",
    paper="Hu et al., TPAMI 2023",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class UCCH(Unsupervised):
    """UCCH: unsupervised contrastive cross-modal hashing. It needs neither labels nor fixed features.

    h are codes of length 1, m_j the bank's code of pair j. L = alpha L_c + (1 - alpha) L_r. L_c is the cross
    entropy, summed over image and text, of logits <h, sgn m_j> / (T sqrt K) with the own pair as the class;
    L_r is ``ranking`` of the batch's <h^v_i, h^t_j>, rows and columns. After each step m = norm(rho m + (1 -
    rho) norm((h^v + h^t) / 2)). For ``warmup`` epochs the batch's own mean codes stand in the bank's place.

    Args:
        alpha: share of the contrast, 0.7 (MIRFlickr; the code's default is 0.9).
        temperature: T, 0.9.
        negatives: codes of the bank that a batch is compared with, 4,096 in the code.
        rho: momentum of the bank, 0.4.
        margin, shift: of the ranking, 0.2 and 0.1 (MIRFlickr; the code's default shift is 1).
        warmup: in epochs, 5.

    Cost: one forward and backward an item; N * K floats for the bank, B * min(N, negatives) * K operations.
    Differs: a batch shares its negatives, drawn without replacement (all of the bank where it is no larger),
    and none is the pair itself; log-softmax instead of the log of a softmax. The backbone is not frozen in
    the warm-up (``training.optim.backbone.frozen_epochs`` does that). The official script keeps the epoch
    that is best on 2,000 labelled items of the database; here the last epoch is kept.
    """

    bank: Tensor
    epochs: Tensor
    steps: Tensor

    def __init__(
        self,
        alpha: float = 0.7,
        temperature: float = 0.9,
        negatives: int = 4096,
        rho: float = 0.4,
        margin: float = 0.2,
        shift: float = 0.1,
        warmup: int = 5,
    ) -> None:
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.negatives = negatives
        self.rho = rho
        self.margin = margin
        self.shift = shift
        self.warmup = warmup
        self.register_buffer("bank", torch.empty(0))  # (N, K) rows of length 1
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        self.draws = Draws(facts.seed, ("ucch",))
        start = torch.randn(facts.items, facts.bits, generator=self.draws.generator())
        self.bank = unit(sign(start)).to(self.bank.device)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``contrast`` and, where both modalities are known, ``ranking``."""
        codes = self.directions(outputs, batch, memory)
        mean = unit(torch.stack([code.detach() for code in codes.values()]).mean(0))
        bank, own = self._compared(mean, batch.ids)
        scale = self.temperature * mean.shape[1] ** 0.5
        contrast = [
            cross_entropy(code @ sign(bank).T / scale, own) for name, code in codes.items() if name in outputs
        ]
        terms = {"contrast": self.alpha * torch.stack(contrast).sum()}
        if len(codes) == 2:
            cosines = codes["image"] @ codes["text"].T
            both = ranking(cosines, self.margin, self.shift) + ranking(cosines.T, self.margin, self.shift)
            terms["ranking"] = (1 - self.alpha) * both
        if len(outputs) == 2:  # clean pairs; an attacked image alone leaves the bank as it is
            rho = 0.0 if int(self.epochs) < self.warmup else self.rho
            self.bank[batch.ids] = unit(rho * self.bank[batch.ids] + (1 - rho) * mean)
        return terms

    def _compared(self, mean: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) codes that the batch is compared with, and (B,) which of them is each item's own."""
        if int(self.epochs) < self.warmup:
            return mean, torch.arange(len(ids), device=ids.device)
        if len(self.bank) <= self.negatives:
            return self.bank.clone(), ids
        generator = self.draws.within("negatives", int(self.steps)).generator()
        sample = torch.randperm(len(self.bank), generator=generator)[: self.negatives + len(ids)].to(
            ids.device
        )
        others = sample[~torch.isin(sample, ids)][: self.negatives]
        return self.bank[torch.cat([ids, others])], torch.arange(len(ids), device=ids.device)

    def advance(self) -> None:
        self.steps += 1

    def end_epoch(self, memory: CodeMemory) -> None:
        self.epochs += 1
