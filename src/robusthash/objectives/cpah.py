"""CPAH: encoders with a common and a private part of their features, and pairwise likelihood with critics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.models.hasher import Encoder
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import (
    FAKE,
    REAL,
    Critic,
    CrossLikelihood,
    critic_loss,
    deceive,
    one_width,
    seeded_linear,
)

_PAPER = "Xie et al., IEEE TIP 2020"
PRIVATE_OF_IMAGE, COMMON, PRIVATE_OF_TEXT = range(3)
"""Classes of the consistency classifier."""


class CommonPrivate(Encoder):
    """f = two layers (Linear, BatchNorm, ReLU) on an encoder's features; common part m f, m = sigma(W f + b).

    Features are the common part (B, D), D 512 in the public code; ``private`` in aux is f - m f. The mask is
    used in training and at test alike. BatchNorm cannot train on a batch of one item.
    """

    def __init__(self, inner: Encoder, width: int = 512) -> None:
        super().__init__()
        self.inner = inner
        first, second = nn.Linear(inner.width, width), nn.Linear(width, width)
        norms = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.layers = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())
        self.mask = nn.Linear(width, width)
        self.width = width

    @property
    def smallest(self) -> int:
        """Least side of an image in pixels, the inner encoder's."""
        return self.inner.smallest  # type: ignore[return-value]

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, aux = self.inner(values)
        whole = self.layers(features)
        common = torch.sigmoid(self.mask(whole)) * whole
        return common, {**aux, "private": whole - common}


@register(
    "image-encoder", "cpah", paper=_PAPER, evidence="reconstruction", modality="image", state="measured"
)
def cpah_image(inner: str | Mapping[str, Any] = "small", width: int = 512) -> CommonPrivate:
    """CPAH's image side: common and private features on an ``image-encoder`` (CNN-F in the paper)."""
    return CommonPrivate(build("image-encoder", inner), width)


@register("text-encoder", "cpah", paper=_PAPER, evidence="reconstruction", modality="text", state="measured")
def cpah_text(vocabulary: int, inner: str | Mapping[str, Any] = "mlp", width: int = 512) -> CommonPrivate:
    """CPAH's text side: common and private features, as wide as the image side's, on a ``text-encoder``.

    The public code has no inner encoder: bags enter the two layers, and one layer more is before them here.
    """
    return CommonPrivate(build("text-encoder", inner, vocabulary=vocabulary), width)


@register("objective", "cpah", paper=_PAPER, evidence="reconstruction", state="measured")
class CPAH(CrossLikelihood):
    """CPAH: consistency-preserving adversarial hashing, for hashers whose encoders are ``cpah``.

    L = NLL(h_i . U_j / 2, S) + beta mean (B - h)^2 + alpha (L_cons + L_cls) + adversarial * -log sigma(D(f_c
    text)), L_cons the cross-entropy of a 3-way classifier on {image-private, common, text-private} features,
    L_cls the binary cross-entropy of a label classifier per modality on common features. The critic D, in the
    group "critic", tells common image (real) from common text (fake) features with gradient penalty 10.

    Args:
        alpha, beta, adversarial: weights of the classifiers, the quantisation and the adversarial term.
        penalty: weight of the gradient penalty.
        hidden: hidden width of critic and consistency classifier, 64 in that code.
        balance: see ``WeightedPairs``. Off in the paper.

    Differs (only third-party code and no paper text was at hand): every term is a mean, with weights of our
    choice (the code sums, with 100 before the adversarial term, 0.1 for alpha and 1 for beta); the
    consistency loss is taken on the classifier's output, which that code makes and never uses; the mask is
    used at test too, and nothing is detached between pixels and code; references are the memory, not the
    batch; B follows it at every step. Over one modality alone there is no critic, and the classifiers get
    that modality.
    """

    training_only = ("critics", "classifiers")
    steps: Tensor
    draws: Draws

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.1,
        adversarial: float = 0.1,
        penalty: float = 10.0,
        hidden: int = 64,
        balance: bool = False,
    ) -> None:
        super().__init__(beta, balance)
        self.alpha = alpha
        self.adversarial = adversarial
        self.penalty = penalty
        self.hidden = hidden
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        self.draws = draws = Draws(facts.seed, ("cpah",))
        width = one_width(facts.widths, "cpah")
        parts: dict[str, nn.Module] = {
            f"labels of {name}": seeded_linear(width, facts.classes, draws.within("labels", name))
            for name in facts.widths
        }
        first = seeded_linear(width, self.hidden, draws.within("consistency"))
        last = seeded_linear(self.hidden, 3, draws.within("consistency", "out"))
        parts["consistency"] = nn.Sequential(first, nn.ReLU(), last)
        self.classifiers = nn.ModuleDict(parts)
        if {REAL, FAKE} <= set(facts.widths):
            self.critics = Critic(width, (self.hidden,), draws.within("critic"))

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The cross-modal terms, ``consistency``, ``labels`` and, for texts, ``adversarial``."""
        terms = super().forward(outputs, batch, memory)
        terms["consistency"] = self.alpha * self.consistency(outputs)
        label_losses = [self._label_loss(name, output, batch) for name, output in outputs.items()]
        terms["labels"] = self.alpha * torch.stack(label_losses).mean()
        if self.critics is not None and FAKE in outputs:
            terms["adversarial"] = self.adversarial * deceive(self.critics, outputs[FAKE].features)
        return terms

    def consistency(self, outputs: Outputs) -> Tensor:
        """Mean cross-entropy of the 3-way classifier over all common and private features."""
        features, classes = [], []
        for name, output in outputs.items():
            if "private" not in output.aux:
                remedy = f"use hasher.{name}: {{name: cpah, inner: <the encoder>}}"
                raise ValueError(f"cpah needs the private part of the {name} features; {remedy}")
            private = PRIVATE_OF_IMAGE if name == REAL else PRIVATE_OF_TEXT
            size, device = (len(output.code),), output.code.device
            features += [output.features, output.aux["private"]]
            classes += [torch.full(size, kind, device=device) for kind in (COMMON, private)]
        return cross_entropy(self.classifiers["consistency"](torch.cat(features)).float(), torch.cat(classes))

    def _label_loss(self, name: str, output: HashOutput, batch: Batch) -> Tensor:
        logits = self.classifiers[f"labels of {name}"](output.features).float()
        return binary_cross_entropy_with_logits(logits, batch.labels)  # type: ignore[arg-type]

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        mix = self.draws.within("penalty", int(self.steps)).uniform(batch.ids, (1,))
        real, fake = outputs[REAL].features, outputs[FAKE].features
        return {"critic": critic_loss(self.critics, real, fake, mix, self.penalty)}  # type: ignore[arg-type]

    def advance(self) -> None:
        self.steps += 1
