"""Likelihood objectives over image and text, DCMH, DSARH and SFCL, and discriminators between modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective, quantisation
from robusthash.objectives.pairwise import DPSH, PairLikelihood

REAL, FAKE = "image", "text"
"""In DADH and CPAH the images' distribution is real, and only the text net is trained to imitate it."""


class CrossModalObjective(HashObjective):
    """Each code is compared with the memory of the *other* modality, and pulled to the code both share.

    Over one modality alone there is no other: the memory is its own one's, the shared code is the sign of its
    own, and what needs two modalities (discriminators) is not made.

    Args:
        gamma: weight of the quantisation term, mean_k (B_k - h_k)^2.
    """

    intra: ClassVar[bool] = False

    def __init__(self, gamma: float, **pairs: Any) -> None:
        super().__init__(**pairs)  # of the second base class, where an objective has two
        self.gamma = gamma

    def joint(self, memory: CodeMemory, batch: Batch) -> Tensor:
        """(B, K) shared codes of the batch's items, B = sign(F + G), held constant."""
        return memory.joint(batch)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.gamma * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity`` and ``regularisation``, the latter towards the joint codes."""
        joint = self.joint(memory, batch)
        distances = [(output.code - joint).square().mean() for output in outputs.values()]
        regularisation = self.gamma * torch.stack(distances).mean()
        return {**super().forward(outputs, batch, memory), "regularisation": regularisation}


class CrossLikelihood(CrossModalObjective, PairLikelihood):
    """The pair likelihood across modalities."""

    def __init__(self, gamma: float, balance: bool) -> None:
        super().__init__(gamma, balance=balance)


def _bit_balance(outputs: Outputs) -> Tensor:
    """Mean over modalities of mean_k (mean_i h_ik)^2."""
    return torch.stack([output.code.mean(0).square().mean() for output in outputs.values()]).mean()


@register("objective", "dcmh", paper="Jiang & Li, CVPR 2017", evidence="paper+code", state="measured")
class DCMH(CrossLikelihood):
    """DCMH: maximum likelihood of similarity between image codes F and text codes G, with one joint code B.

    L = mean_ij [softplus(Theta_ij) - S_ij Theta_ij] + gamma mean (B - h)^2 + eta mean_k (mean_i h_ik)^2,
    Theta_ij = F_i . G_j / 2 and B = sign(F + G). The paper's head is ``linear``; ``tanh`` works as well.

    Args:
        gamma: weight of the quantisation, a mean over items and bits (ours; the paper's 1 is K / N by this
            measure).
        eta: weight of the balance term (ours; the paper's 1 is K by this measure). At the start, while all
            codes of a modality are nearly the same, it is the larger part of the loss and holds back the
            first.
        balance: weight similar pairs, see ``WeightedPairs``. Off in the paper.

    Differs: terms are the published ones divided by the pairs of a step, b N, except gamma's and eta's. The
    paper trains the image net for an epoch, then the text net, then sets B; here one step trains both against
    the memory, which holds the other side constant: the same gradients, by turns of a step, and B follows at
    every step. The balance term is of the batch; the published mean over the training set, with only the
    batch's rows live, has a gradient that answers for codes up to an epoch old and swings ever wider with
    momentum.
    """

    def __init__(self, gamma: float = 0.1, eta: float = 0.1, balance: bool = False) -> None:
        super().__init__(gamma, balance)
        self.eta = eta

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective, and ``balance``."""
        balance = self.eta * _bit_balance(outputs)
        return {**super().forward(outputs, batch, memory), "balance": balance}


@register(
    "objective", "dsarh", paper="DSARH, Zhang et al., manuscript 2024", evidence="paper", state="measured"
)
class DSARHObjective(DPSH):
    """DSARH's clean loss: asymmetric pair likelihood within and between modalities, and quantisation.

    L = L_vt + alpha L_vv + L_tv + beta L_tt + eta sum_m mean (h^m - sgn h^m)^2 (Eq 12-13, 15), where L_ab =
    mean_ij w_ij [softplus(T_ij) - S_ij T_ij], T_ij = h^a_i . b^b_j / 2, h relaxed codes of the batch and b
    the sign codes of the memory, held constant. An item is not compared with its own code of the same
    modality.

    Args:
        alpha, beta: weights of image and of text codes among themselves; 1 is ours, the paper gives no
            weight.
        eta: of the quantisation, 0.1.
        balance: see ``WeightedPairs`` (ours; off as in the paper).

    Differs: L_tv is added (the paper writes the image side only, which leaves the text encoder without a
    gradient from images). Terms are sums over the pairs of modalities, as the paper writes them, not means.
    """

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, eta: float = 0.1, balance: bool = False
    ) -> None:
        super().__init__(eta, balance)
        self.alpha = alpha
        self.beta = beta

    def losses(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        return super().losses(output, labels, sign(codes), code_labels)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        labels, memory_labels = self.both_labels(batch, memory)
        intra = {"image": self.alpha, "text": self.beta}
        similarity = []
        for modality, output in outputs.items():
            for other, codes in memory.codes.items():
                pairs = self.losses(output, labels, codes, memory_labels)
                if other != modality:
                    similarity.append(pairs.mean())
                else:  # without each item's inner product with itself, which is constant
                    pairs = pairs.scatter(1, batch.ids[:, None], 0.0)
                    similarity.append(intra[modality] * pairs.sum() / max(1, pairs.numel() - len(pairs)))
        spread = [self.regularisation(output).mean() for output in outputs.values()]
        return {"similarity": torch.stack(similarity).sum(), "regularisation": torch.stack(spread).sum()}


@register("objective", "sfcl", paper="SFCL, ICMR 2026", evidence="paper", state="measured")
class SFCLObjective(DPSH):
    """SFCL's L_sem: intra-modal likelihoods (Eq. 11), inter-modal ones (Eq. 12) and quantisation, summed.

    L_sem = intra (L_vv + L_tt) + (L_vt + L_tv) + eta sum_m mean (h^m - sgn h^m)^2, where L_ab = mean_ij w_ij
    [softplus(T_ij) - S_ij T_ij], T_ij = h^a_i . h^b_j / 2, i over the batch and j over the memory of all
    training items, held constant. Over images alone only L_vv is left. Pairs of an item with itself stay, as
    printed.

    Args:
        intra: weight of the intra-modal terms, 1 in the paper; 0 leaves Eq. 11 out.
        eta: of the quantisation in mean form, 0.1; the paper prints an unnormalised sum next to means, with
            no weight.
        settings: ``printed``, or ``dcmh``, a reading of "internal settings as DCMH": the quantisation goes to
            the code that both modalities share, eta mean (B - h)^2, and bits are balanced, eta mean_k (mean_i
            h_ik)^2, both averaged over the modalities.
        balance: see ``WeightedPairs`` (ours; off as in the paper).
    """

    def __init__(
        self,
        intra: float = 1.0,
        eta: float = 0.1,
        settings: Literal["printed", "dcmh"] = "printed",
        balance: bool = False,
    ) -> None:
        super().__init__(eta, balance)
        for name, weight in (("intra", intra), ("eta", eta)):
            if weight < 0.0:
                raise ValueError(f"{name} is a weight of at least 0, got {weight:g}")
        if settings not in ("printed", "dcmh"):
            raise ValueError(f"settings must be 'printed' or 'dcmh', got {settings!r}")
        self.intra_weight = intra
        self.settings = settings

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``intra``, ``inter`` (of two modalities), ``regularisation`` and, of DCMH, ``balance``."""
        labels, memory_labels = self.both_labels(batch, memory)
        within: list[Tensor] = []
        between: list[Tensor] = []
        for modality, output in outputs.items():
            for other, codes in memory.codes.items():
                mean = self.similarity(output, labels, codes, memory_labels).mean()
                (within if other == modality else between).append(mean)
        terms = {"intra": self.intra_weight * torch.stack(within).sum()}
        if between:
            terms["inter"] = torch.stack(between).sum()
        if self.settings == "dcmh":
            joint = memory.joint(batch)
            distances = [(output.code - joint).square().mean() for output in outputs.values()]
            terms["regularisation"] = self.eta * torch.stack(distances).mean()
            terms["balance"] = self.eta * _bit_balance(outputs)
        else:
            spread = [self.regularisation(output).mean() for output in outputs.values()]
            terms["regularisation"] = torch.stack(spread).sum()
        return terms


# ------------------------------------------------------------------------------------- discriminators


class Critic(nn.Module):
    """Fully connected layers with ReLU, keyed initial weights: (B, D) -> (B,) logit, positive for real."""

    def __init__(self, width: int, hidden: Sequence[int], draws: Draws) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((width, *hidden), hidden, strict=False):
            layers += [seeded_linear(inputs, outputs, draws.within(len(layers))), nn.ReLU()]
        layers.append(seeded_linear((width, *hidden)[-1], 1, draws.within(len(layers))))
        self.layers = nn.Sequential(*layers)

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values).squeeze(1)


def seeded_linear(inputs: int, outputs: int, draws: Draws) -> nn.Linear:
    """A linear layer with torch's usual initial weights (uniform within 1 / sqrt(inputs)) from ``draws``."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    generator, bound = draws.generator(), inputs**-0.5
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, penalty: float) -> Tensor:
    """Mean binary cross-entropy of real (B, D) as 1, fake as 0, and a gradient penalty at ``mix`` (B, 1)."""
    entropy = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
    return entropy + penalty * gradient_penalty(critic, real, fake, mix)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|grad D| - 1)^2 at mix * real + (1 - mix) * fake, differentiable, always in float32."""
    with torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        point = (mix * real.float() + (1.0 - mix) * fake.float()).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
        # a critic that is flat at a point (all ReLU off) has norm 0, where the root has no derivative
        return ((slope.square().sum(1) + 1e-12).sqrt() - 1.0).square().mean()


def deceive(critic: nn.Module, fake: Tensor) -> Tensor:
    """Mean of -log sigma(D(fake)), which the imitating side lowers."""
    return softplus(-critic(fake)).mean()


def one_width(widths: Mapping[str, int], name: str) -> int:
    """The feature width that both modalities share."""
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"{name} compares the features of both modalities, whose widths differ: {dict(widths)}; "
            "end hasher.text.widths with the image encoder's width"
        )
    return next(iter(widths.values()))
