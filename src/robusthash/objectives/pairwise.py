"""Objectives on pairs of codes, each item of the batch against the memory: DPH, DPSH, DSH, HashNet."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.labels import relevant
from robusthash.core.registry import name_of, register
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
            facts.refuse_one_sided(name_of(self))
            share = facts.share_similar
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


@register("objective", "hashnet", paper="Cao et al., ICCV 2017", evidence="paper+code", state="measured")
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
        facts.refuse_one_sided(name_of(self))
        share = facts.share_similar
        self.weights.copy_(torch.tensor([1.0 / (1.0 - share), 1.0 / share]))

    def advance(self) -> None:
        self.steps += 1

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        similar = relevant(labels, code_labels).float()
        t = output.relaxed(self.beta) @ codes.T * (10.0 / codes.shape[1])
        weight = self.weights[0] + (self.weights[1] - self.weights[0]) * similar
        return (weight * (softplus(t) - similar * t)).mean(1)


@register("objective", "dsh", paper="Liu et al., CVPR 2016", evidence="paper+code", state="measured")
class DSH(WeightedPairs):
    """DSH: similar codes together, dissimilar ones at least a margin apart, values near +-1.

    L = (1/K) mean_ij w_ij [S_ij D_ij / 2 + (1 - S_ij) max(0, m - D_ij) / 2] + alpha mean ||v| - 1|, D_ij =
    ||v_i - U_j||^2, which is 4 times the Hamming distance of +-1 codes. The paper's head is ``linear``,
    without tanh; ``tanh`` works as well. One forward and backward pass an item, and O(N K) for its pairs.

    Args:
        margin: m in multiples of K, 2 in the paper: codes half of all bits apart are far enough.
        alpha: weight of the last term, 0.01 as in the paper; DeepHash-pytorch's is 0.1 / K in this form.
        balance: see ``WeightedPairs``; the paper draws pairs from each batch instead.

    Differs: pairs are those of an item with the memory, as in DeepHash-pytorch; all is divided by K, so that
    learning rates do not depend on the bits.
    """

    def __init__(self, margin: float = 2.0, alpha: float = 0.01, balance: bool = False) -> None:
        if margin <= 0:
            raise ValueError(f"margin must be above 0, or nothing keeps codes apart, got {margin:g}")
        super().__init__(balance)
        self.margin = margin
        self.alpha = alpha

    def pair_losses(self, output: HashOutput, similar: Tensor, codes: Tensor) -> Tensor:
        bits = codes.shape[1]
        # by norms and products, since (B, N, K) differences would not fit into memory
        squares = output.code.square().sum(1, keepdim=True) + codes.square().sum(1)
        distances = (squares - 2.0 * output.code @ codes.T).clamp_min(0.0)
        apart = (self.margin * bits - distances).relu()
        return (similar * distances + (1.0 - similar) * apart) / (2.0 * bits)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.alpha * (output.code.abs() - 1.0).abs().mean(1)
