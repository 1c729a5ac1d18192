"""Objectives on pairs of codes, each item of the batch against the memory: DPH, DPSH, HashNet."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.types import HashOutput
from robusthash.objectives.base import HashObjective, TrainFacts, quantisation


class WeightedPairs(HashObjective):
    """A mean over pairs of an item and a reference, of which the similar ones may be weighted.

    Args:
        balance: weight similar pairs by #dissimilar / #similar of the training set. Single-label data need
            it: with one similar pair in ten or twenty, codes learn first of all to differ. Off in the papers.
        stored: a trained model keeps the weight.
    """

    similar_weight: Tensor

    def __init__(self, balance: bool, stored: bool = True) -> None:
        super().__init__()
        self.balance = balance
        self.register_buffer("similar_weight", torch.ones(()), persistent=stored)

    def setup(self, facts: TrainFacts) -> None:
        if self.balance:
            share = facts.share_similar
            if not 0.0 < share < 1.0:
                raise ValueError(f"cannot balance pairs: a share of {share:g} of them is similar")
            self.similar_weight.fill_((1.0 - share) / share)

    @abstractmethod
    def pair_losses(self, output: HashOutput, similar: Tensor, codes: Tensor) -> Tensor:
        """(B, M) loss of each pair before it is weighted; ``similar`` (B, M) is 1 or 0."""

    def losses(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        """(B, M) loss of each pair of an item with a reference."""
        similar = relevant(labels, code_labels).float()
        weight = 1.0 + (self.similar_weight - 1.0) * similar
        return weight * self.pair_losses(output, similar, codes)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return self.losses(output, labels, codes, code_labels).mean(1)


@register(
    "objective",
    "dph",
    paper="Yang et al., IEEE Trans. Cybernetics 2020",
    evidence="paper+code",
    state="measured",
)
class DPH(WeightedPairs):
    """DPH: regress scaled inner products of codes to +-1 similarity.

    L = mean_ij w_ij ((1/K) h_i . U_j - S'_ij)^2, S' in {-1, +1}, U the memory held constant. No quantisation
    term. Source: the re-implementations in the public SAAT and CgAT codes.
    Differs: the memory holds true codes and labels from the first step on (the codes start it at zero).

    Args:
        balance: see ``WeightedPairs``. Without it one code for all classes is nearly the best of single-label
            data: nine pairs in ten ask for opposite codes, which no ten classes can have.
    """

    def __init__(self, balance: bool = False) -> None:
        super().__init__(balance, stored=balance)  # stored models from before this option hold no weight

    def pair_losses(self, output: HashOutput, similar: Tensor, codes: Tensor) -> Tensor:
        return (output.code @ codes.T / codes.shape[1] - (2.0 * similar - 1.0)).square()


class PairLikelihood(WeightedPairs):
    """Negative log-likelihood of similarity: w_ij [softplus(T_ij) - S_ij T_ij], T_ij = h_i . U_j / 2."""

    def pair_losses(self, output: HashOutput, similar: Tensor, codes: Tensor) -> Tensor:
        theta = output.code @ codes.T / 2
        return softplus(theta) - similar * theta


@register("objective", "dpsh", paper="Li et al., IJCAI 2016", evidence="paper+code", state="measured")
class DPSH(PairLikelihood):
    """DPSH: maximum likelihood of pairwise similarity with Omega = half the inner product of codes.

    L = mean_ij w_ij [softplus(Omega_ij) - S_ij Omega_ij] + eta mean (sgn h - h)^2, Omega_ij = h_i . U_j / 2.

    Args:
        eta: weight of the quantisation in mean form (ours: 0.1; published codes: 0.15-0.32 by this measure).
        balance: see ``WeightedPairs``.

    Differs: h is tanh of the logits (the original feeds the unbounded output); the sums are means.
    """

    def __init__(self, eta: float = 0.1, balance: bool = False) -> None:
        super().__init__(balance)
        self.eta = eta

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.eta * quantisation(output)


@register("objective", "hashnet", paper="Cao et al., ICCV 2017", evidence="paper+code")
class HashNet(HashObjective):
    """HashNet: balanced pair likelihood with a tanh that steepens as training goes on.

    L = (1/|S|) sum_ij w_ij [softplus(t_ij) - S_ij t_ij], t_ij = (10/K) h_i . U_j, w = |S|/|S1| for similar
    pairs and |S|/|S0| for others, so L is the mean over similar pairs plus the mean over the others. h =
    tanh(beta v), beta = sqrt(1 + 0.005 steps), raised every 200 steps. No quantisation term.

    Differs: the pair weights come from the whole training set instead of the batch, so no batch lacks a side
    and the loss stays per item; the paper's extra weight by label overlap is left out, as in every code read.
    ``beta`` belongs to the objective: an attack's alpha never touches it.
    """

    steps: Tensor
    weights: Tensor

    def __init__(self, every: int = 200, gamma: float = 0.005) -> None:
        super().__init__()
        self.every = every
        self.gamma = gamma
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weights", torch.ones(2))  # of dissimilar and similar pairs

    @property
    def beta(self) -> float:
        """Slope of the tanh now; never falls."""
        return (1.0 + self.gamma * (int(self.steps) // self.every * self.every)) ** 0.5

    def setup(self, facts: TrainFacts) -> None:
        share = facts.share_similar
        if not 0.0 < share < 1.0:
            raise ValueError(f"HashNet needs similar and dissimilar pairs; a share of {share:g} is similar")
        self.weights.copy_(torch.tensor([1.0 / (1.0 - share), 1.0 / share]))

    def advance(self) -> None:
        self.steps += 1

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        similar = relevant(labels, code_labels).float()
        t = output.relaxed(self.beta) @ codes.T * (10.0 / codes.shape[1])
        weight = self.weights[0] + (self.weights[1] - self.weights[0]) * similar
        return (weight * (softplus(t) - similar * t)).mean(1)
