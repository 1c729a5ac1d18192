"""DJSRH, JDSH and DSAH: codes whose cosines rebuild a similarity matrix of the batch's fixed features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import seeded_linear
from robusthash.objectives.dadh import unit
from robusthash.objectives.unsupervised import Features, FixedSimilarity


def squared(left: Tensor, right: Tensor | float) -> Tensor:
    """Mean squared difference."""
    return (left - right).square().mean()


class MatrixReconstruction(FixedSimilarity):
    """Base: II, TT and IT are the cosines of the batch's codes, S its matrix ``target``."""

    @abstractmethod
    def target(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, B) S of the cosines of fixed image and text features."""

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``intra`` and, where both modalities are known, those of ``across``."""
        image, text = self.cosines(batch.ids)
        target, codes = self.target(image, text), self.directions(outputs, batch, memory)
        within = [
            self.within(codes[name], target, own)
            for name, own in (("image", image), ("text", text))
            if name in codes
        ]
        terms = {"intra": torch.stack(within).sum()}
        if len(codes) == 2:
            terms |= self.across(codes["image"] @ codes["text"].T, target)
        return terms

    @abstractmethod
    def within(self, codes: Tensor, target: Tensor, own: Tensor) -> Tensor:
        """The term of one modality's codes; ``own`` (B, B) are the cosines of its own features."""

    @abstractmethod
    def across(self, crossed: Tensor, target: Tensor) -> LossTerms:
        """The terms of IT = ``crossed``."""


class _Sloped(MatrixReconstruction):
    """Codes tanh(a u), a = sqrt(epochs + 1)."""

    epochs: Tensor

    def __init__(self, image_features: Features, text_features: Features) -> None:
        super().__init__(image_features, text_features)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def slope(self) -> float:
        return (int(self.epochs) + 1) ** 0.5

    def end_epoch(self, memory: CodeMemory) -> None:
        self.epochs += 1


@register(
    "objective",
    "djsrh",
    paper="Su, Zhong & Zhang, ICCV 2019",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class DJSRH(_Sloped):
    """DJSRH: the joint-semantics matrix of both modalities, rebuilt within and across them. Unsupervised.

    L = intra [MSE(II, S) + MSE(TT, S)] + MSE(IT, S), S = mu [(1 - eta) S~ + eta S~ S~^T / B], S~ = beta S_I +
    (1 - beta) S_T, S_m = 2 cos(F, F) - 1 of fixed features F; h = tanh(a u), a = sqrt(epoch + 1).

    Args:
        beta: share of the images' cosines; the code's are 0.9 (MIRFlickr), 0.6 (NUS-WIDE), 0.3 (Wikipedia).
        eta, mu: share of second neighbours, and scale, 0.4 and 1.5.
        intra: weight of the terms within a modality; the code's 0.1 on both large sets, 0.3 on Wikipedia.
        image_features, text_features: see ``FixedSimilarity``.

    Cost: a pass of the fixed encoder over the training items, then one forward and backward an item; B^3
    operations for S~ S~^T. Differs: B is the size of the batch at hand, where the code divides a smaller last
    batch's by the full size (it drops that batch); the fixed image net is EfficientNet-Lite0, not AlexNet's
    fc7.
    """

    def __init__(
        self,
        beta: float = 0.6,
        eta: float = 0.4,
        mu: float = 1.5,
        intra: float = 0.1,
        image_features: Features = "efficientnet-lite0",
        text_features: Features = "raw",
    ) -> None:
        super().__init__(image_features, text_features)
        self.beta = beta
        self.eta = eta
        self.mu = mu
        self.intra_weight = intra

    def target(self, image: Tensor, text: Tensor) -> Tensor:
        joint = self.beta * (2 * image - 1) + (1 - self.beta) * (2 * text - 1)
        return self.mu * ((1 - self.eta) * joint + self.eta * joint @ joint.T / len(joint))

    def within(self, codes: Tensor, target: Tensor, own: Tensor) -> Tensor:
        return self.intra_weight * squared(codes @ codes.T, target)

    def across(self, crossed: Tensor, target: Tensor) -> LossTerms:
        return {"similarity": squared(crossed, target)}


@register(
    "objective",
    "jdsh",
    paper="Liu et al., SIGIR 2020",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class JDSH(_Sloped):
    """JDSH: a joint-modal matrix whose far ends are stretched by its distribution. Unsupervised.

    S = alpha S_I + beta S_T + gamma (M + M^T) / 2, M = norm(S_I) norm(S_T)^T, S_m = 2 cos(F, F) - 1. Entries
    below the left end are multiplied by 1 + l1 exp(low - s), those above the right end by 1 + l2 exp(s -
    high), then all by mu. L = intra [MSE(II, S) + MSE(TT, S)] + MSE(IT, S) + MSE(TI, S) - mean_i <h^v_i,
    h^t_i>, codes of length 1; h = tanh(a u), a = sqrt(epoch + 1).

    Args:
        alpha, beta, gamma: shares, 0.5, 0.1 and 0.4 in the code for MIRFlickr.
        ends: left and right; the code's are of a fit of two normal distributions to S of its data.
        extremes: low and high, the least and the largest of S there.
        stretch: l1 and l2.
        mu, intra: scale of S, and weight of the terms within a modality.
        image_features, text_features: see ``FixedSimilarity``.

    Cost: as DJSRH. Differs: features are fixed; the code takes the image's from the net that it trains, and
    lets the target have a gradient, by which all similarities can fall together. MSE(TI, S) is MSE(IT, S^T),
    and M + M^T makes S symmetric, so the two are one term counted twice.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.1,
        gamma: float = 0.4,
        ends: Sequence[float] = (-0.528, -0.138),
        extremes: Sequence[float] = (-0.52, 0.68),
        stretch: Sequence[float] = (0.1, 0.2),
        mu: float = 1.4,
        intra: float = 0.1,
        image_features: Features = "efficientnet-lite0",
        text_features: Features = "raw",
    ) -> None:
        super().__init__(image_features, text_features)
        self.shares = (alpha, beta, gamma)
        for name, pair in (("ends", ends), ("extremes", extremes), ("stretch", stretch)):
            if len(pair) != 2:
                raise ValueError(f"{name} of jdsh are two numbers, low and high, got {list(pair)}")
        self.ends = tuple(ends)
        self.extremes = tuple(extremes)
        self.stretch = tuple(stretch)
        self.mu = mu
        self.intra_weight = intra

    def target(self, image: Tensor, text: Tensor) -> Tensor:
        (alpha, beta, gamma), (left, right) = self.shares, self.ends
        (low, high), (l1, l2) = self.extremes, self.stretch
        image, text = 2 * image - 1, 2 * text - 1
        mixed = unit(image) @ unit(text).T
        joint = alpha * image + beta * text + gamma * (mixed + mixed.T) / 2
        factor = 1 + (joint < left) * l1 * (low - joint).exp() + (joint > right) * l2 * (joint - high).exp()
        return self.mu * factor * joint

    def within(self, codes: Tensor, target: Tensor, own: Tensor) -> Tensor:
        return self.intra_weight * squared(codes @ codes.T, target)

    def across(self, crossed: Tensor, target: Tensor) -> LossTerms:
        return {"similarity": 2 * squared(crossed, target), "pairs": -crossed.diagonal().mean()}


@register(
    "objective",
    "dsah",
    paper="Yang et al., ICMR 2020",
    evidence="paper+code",
    supervised=False,
    state="measured",
)
class DSAH(MatrixReconstruction):
    """DSAH: semantic alignment, and decoders from a code to the other modality's features. Unsupervised.

    S = k [alpha S_I + (1 - alpha) S_T]. L = MSE(II, S) + MSE(TT, S) + MSE(IT, S) + MSE(diag IT, k) + 2
    MSE(IT, IT^T) + own [MSE(II, k S_I) + MSE(TT, k S_T)] + rebuild [MSE(D_v(h^v), F_t) + MSE(D_t(h^t), F_v)],
    D linear.

    Args:
        alpha, k, own: 0.9, 1.5 and 0.1 in the paper.
        rebuild: weight of the decoders' terms, 1 in the paper.
        image_features, text_features: see ``FixedSimilarity``.

    Cost: as DJSRH, and two linear maps from K to the features' width. Differs: decoders read the relaxed
    code; the code gives them its sign, from which no gradient reaches an encoder. Features are rows of mean
    square 1, so that the terms do not shrink with their width.
    """

    training_only = ("critics", "decoders")

    def __init__(
        self,
        alpha: float = 0.9,
        k: float = 1.5,
        own: float = 0.1,
        rebuild: float = 1.0,
        image_features: Features = "efficientnet-lite0",
        text_features: Features = "raw",
    ) -> None:
        super().__init__(image_features, text_features)
        self.alpha = alpha
        self.k = k
        self.own = own
        self.rebuild = rebuild

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        draws = Draws(facts.seed, ("dsah",))
        widths = {"image": self.fixed_text.shape[1], "text": self.fixed_image.shape[1]}
        decoders = {name: seeded_linear(facts.bits, D, draws.within(name)) for name, D in widths.items()}
        self.decoders = nn.ModuleDict(decoders)

    def target(self, image: Tensor, text: Tensor) -> Tensor:
        return self.k * (self.alpha * (2 * image - 1) + (1 - self.alpha) * (2 * text - 1))

    def within(self, codes: Tensor, target: Tensor, own: Tensor) -> Tensor:
        cosines = codes @ codes.T
        return squared(cosines, target) + self.own * squared(cosines, self.k * (2 * own - 1))

    def across(self, crossed: Tensor, target: Tensor) -> LossTerms:
        paired = squared(crossed.diagonal(), self.k)
        return {
            "similarity": squared(crossed, target),
            "pairs": paired,
            "symmetry": 2 * squared(crossed, crossed.T),
        }

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of ``MatrixReconstruction``, and ``decoders``."""
        terms = super().forward(outputs, batch, memory)
        targets: dict[str, Any] = {"image": self.fixed_text, "text": self.fixed_image}
        losses = []
        for name, output in outputs.items():
            features = targets[name][batch.ids] * targets[name].shape[1] ** 0.5
            losses.append(squared(self.decoders[name](output.code), features))
        return {**terms, "decoders": self.rebuild * torch.stack(losses).sum()}
