"""DADH: weighted cosine triplets, critics of features and codes, and a discrete solver for the joint code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.labels import overlap
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import (
    FAKE,
    REAL,
    Critic,
    CrossModalObjective,
    critic_loss,
    deceive,
    one_width,
)


def weighted_triplets(
    code: Tensor, labels: Tensor, codes: Tensor, code_labels: Tensor, margin: float
) -> Tensor:
    """(B,) weighted mean over positives j and negatives k of [d_ij - d_ik + margin]_+, d = 1 - cosine.

    Codes (B, K) with multi-hot labels (B, C) against references (M, K), (M, C). A pair weighs 2^(shared
    labels) - 1; an item without a positive or without a negative gets 0. All triplets of an item cost M log
    M: with the negatives sorted, the hinge of one positive is active for a prefix of them, whose sum a
    running sum holds.
    """
    shared = overlap(labels, code_labels)
    weights = torch.exp2(shared) - 1.0  # the negative's part of the published weight is 2^0 - 1 = 0
    return hinge_triplets(code, codes, weights, shared == 0, margin)


def hinge_triplets(code: Tensor, codes: Tensor, weights: Tensor, negative: Tensor, margin: float) -> Tensor:
    """(B,) the same with the weights (B, M) of positives given, 0 for others, and bool negatives (B, M)."""
    distance = 1.0 - unit(code) @ unit(codes).T
    # no positive's bound, at most 2 + margin, reaches 4 + margin: positives never count as negatives
    ordered = distance.masked_fill(~negative, 4.0 + margin).sort(1).values
    bound = distance + margin
    active = torch.searchsorted(ordered.detach(), bound.detach().contiguous())  # negatives below the bound
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0)).gather(1, active)
    hinges = (active * bound - sums) / negative.sum(1, keepdim=True).clamp_min(1)
    return (weights * hinges).sum(1) / weights.sum(1).clamp_min(1e-8)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; the norm is held above 1e-8."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-8)


def discrete_step(joint: Tensor, labels: Tensor, relaxed: Tensor, mu: float, ridge: float) -> Tensor:
    """(N, K) next joint codes: sign(L P + mu H), P = (L^T L + ridge I)^-1 L^T B. A zero keeps the old bit.

    B (N, K) are the joint codes in {-1, +1}, L (N, C) multi-hot labels, H the relaxed codes averaged over
    modalities.
    """
    gram = labels.T @ labels + ridge * torch.eye(labels.shape[1], device=labels.device)
    total = labels @ torch.linalg.solve(gram, labels.T @ joint) + mu * relaxed
    return torch.where(total == 0, joint, sign(total))


@register("objective", "dadh", paper="Bai et al., ICMR 2020", evidence="paper+code", state="measured")
class DADH(CrossModalObjective):
    """DADH: weighted triplets across modalities, adversarial alignment, and discrete joint codes.

    L = alpha T + beta mean (B - h)^2 + gamma [adv(features) + adv(codes)], T ``weighted_triplets`` against
    the other modality's memory, adv = -log sigma(D(text)). The critics D, in the group "critic", tell image
    (real) from text (fake) by binary cross-entropy with gradient penalty 10. After each epoch B = sign(L P +
    mu H), P the ridge regression of B on the labels L.

    Args:
        alpha, beta, gamma: weights of triplets, quantisation and adversarial terms; the paper's 10, 1, 1 in
            its proportion, divided by ten because T is a mean here.
        margin: of a triplet.
        mu, ridge: weight of the relaxed codes in the discrete step, and lambda of its regression.
        penalty: weight of the gradient penalty.
        feature_critic, hash_critic: hidden widths.

    Differs: means for sums. A triplet's weight is normalised by the sum of the item's weights, not its ideal
    DCG, which only changes how much items weigh against each other; the code's constant factors (10 and 1.21)
    are left out. References are the whole memory, held constant, not the batch. The adversarial gradient of
    codes reaches the whole text net; the code stops it before the hash layer. Until the first discrete step B
    is sign(F + G). One modality alone has no critics.
    """

    joint_codes: Tensor
    steps: Tensor
    draws: Draws

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        gamma: float = 0.1,
        margin: float = 0.4,
        mu: float = 1e-5,
        ridge: float = 1.0,
        penalty: float = 10.0,
        feature_critic: Sequence[int] = (1024, 512),
        hash_critic: Sequence[int] = (512,),
    ) -> None:
        super().__init__(beta)
        self.alpha = alpha
        self.adversarial = gamma
        self.margin = margin
        self.mu = mu
        self.ridge = ridge
        self.penalty = penalty
        self.hidden = {"features": tuple(feature_critic), "codes": tuple(hash_critic)}
        self.register_buffer("joint_codes", torch.empty(0))  # (N, K), zero until the first discrete step
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def setup(self, facts: TrainFacts) -> None:
        self.draws = draws = Draws(facts.seed, ("dadh",))
        self.joint_codes = torch.zeros(facts.items, facts.bits, device=self.joint_codes.device)
        if {REAL, FAKE} <= set(facts.widths):
            widths = {"features": one_width(facts.widths, "dadh"), "codes": facts.bits}
            critics = {n: Critic(D, self.hidden[n], draws.within(n)) for n, D in widths.items()}
            self.critics = nn.ModuleDict(critics)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return self.alpha * weighted_triplets(output.code, labels, codes, code_labels, self.margin)

    def joint(self, memory: CodeMemory, batch: Batch) -> Tensor:
        solved = self.joint_codes[batch.ids]
        return torch.where(solved == 0, super().joint(memory, batch), solved)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective; for texts, ``adversarial``."""
        terms = super().forward(outputs, batch, memory)
        if self.critics is None or FAKE not in outputs:
            return terms
        critics: nn.ModuleDict = self.critics  # type: ignore[assignment]
        losses = [deceive(critic, _judged(outputs[FAKE], name)) for name, critic in critics.items()]
        return {**terms, "adversarial": self.adversarial * torch.stack(losses).sum()}

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        draws = self.draws.within("penalty", int(self.steps))
        critics: nn.ModuleDict = self.critics  # type: ignore[assignment]
        terms = {}
        for name, critic in critics.items():
            real, fake = (_judged(outputs[modality], name) for modality in (REAL, FAKE))
            mix = draws.within(name).uniform(batch.ids, (1,))
            terms[f"critic/{name}"] = critic_loss(critic, real, fake, mix, self.penalty)
        return terms

    def advance(self) -> None:
        self.steps += 1

    def end_epoch(self, memory: CodeMemory) -> None:
        if memory.labels is None:
            raise ValueError("DADH's discrete step needs labels, and the training split has none")
        relaxed = torch.stack([codes.detach() for codes in memory.codes.values()]).mean(0)
        joint = torch.where(self.joint_codes == 0, sign(relaxed), self.joint_codes)
        self.joint_codes.copy_(discrete_step(joint, memory.labels, relaxed, self.mu, self.ridge))


def _judged(output: HashOutput, name: str) -> Tensor:
    """(B, D) input of the critic ``name``: features or relaxed codes."""
    return output.features if name == "features" else output.code
