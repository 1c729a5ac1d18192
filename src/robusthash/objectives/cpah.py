"""CPAH: a shared part of both modalities' features, told from their private parts, and pairwise
likelihood."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import TrainFacts
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.critics import FAKE, REAL, Critic, critic_loss, deceive, one_width, seeded_linear
from robusthash.objectives.cross_modal import CrossLikelihood

PRIVATE_OF_IMAGE, COMMON, PRIVATE_OF_TEXT = range(3)
"""Classes of the consistency classifier."""


@register("objective", "cpah", paper="Xie et al., IEEE TIP 2020", evidence="reconstruction")
class CPAH(CrossLikelihood):
    """CPAH: consistency-preserving adversarial hashing, for hashers whose encoders are ``cpah``.

    L = NLL(h_i . U_j / 2, S) + beta mean (B - h)^2 + alpha (L_cons + L_cls) + adversarial * -log sigma(D(f_c
    text)), L_cons the cross-entropy of a 3-way classifier on {image-private, common, text-private} features,
    L_cls the binary cross-entropy of a label classifier per modality on common features. The critic D, in the
    group "critic", tells common image (real) from common text (fake) features with gradient penalty 10.

    Args:
        alpha: weight of the consistency and the label classifiers.
        beta: weight of the quantisation term.
        adversarial: weight of the adversarial term.
        penalty: weight of the gradient penalty.
        hidden: hidden width of critic and consistency classifier, 64 in that code.
        balance: weight similar pairs, see ``CrossLikelihood``. Off in the paper.

    Raises:
        ValueError: at ``setup``, feature widths that differ; in training, encoders without a private part.

    Differs (only third-party code and no paper text was at hand): every term is a mean, with weights of our
    choice (the code sums, with 100 before the adversarial term, 0.1 for alpha and 1 for beta); the
    consistency loss is taken on the classifier's output, which that code makes and never uses; the mask is
    used at test too, and nothing is detached between pixels and code; references are the memory instead of
    the batch; B follows the memory at every step. Over one modality alone there is no critic, and the
    classifiers see that modality.
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
        parts["consistency"] = nn.Sequential(
            seeded_linear(width, self.hidden, draws.within("consistency")),
            nn.ReLU(),
            seeded_linear(self.hidden, 3, draws.within("consistency", "out")),
        )
        self.classifiers = nn.ModuleDict(parts)
        if {REAL, FAKE} <= set(facts.widths):
            self.critics = Critic(width, (self.hidden,), draws.within("critic"))

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """The terms of every cross-modal objective, ``consistency``, ``labels``, and for texts
        ``adversarial``."""
        terms = super().forward(outputs, batch, memory)
        terms["consistency"] = self.alpha * self.consistency(outputs)
        told = [self._label_loss(name, output, batch) for name, output in outputs.items()]
        terms["labels"] = self.alpha * torch.stack(told).mean()
        if self.critics is not None and FAKE in outputs:
            terms["adversarial"] = self.adversarial * deceive(self.critics, outputs[FAKE].features)
        return terms

    def consistency(self, outputs: Outputs) -> Tensor:
        """Mean cross-entropy of the 3-way classifier over all common and private features."""
        features, kinds = [], []
        for name, output in outputs.items():
            if "private" not in output.aux:
                raise ValueError(
                    f"cpah needs the private part of the {name} features; "
                    f"use hasher.{name}: {{name: cpah, inner: <the encoder>}}"
                )
            own = PRIVATE_OF_IMAGE if name == REAL else PRIVATE_OF_TEXT
            features += [output.features, output.aux["private"]]
            kinds += [
                torch.full((len(output.code),), kind, device=output.code.device) for kind in (COMMON, own)
            ]
        return cross_entropy(self.classifiers["consistency"](torch.cat(features)).float(), torch.cat(kinds))

    def _label_loss(self, name: str, output: HashOutput, batch: Batch) -> Tensor:
        logits = self.classifiers[f"labels of {name}"](output.features).float()
        return binary_cross_entropy_with_logits(logits, batch.labels)  # type: ignore[arg-type]

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        mix = self.draws.within("penalty", int(self.steps)).uniform(batch.ids, (1,))
        real, fake = outputs[REAL].features, outputs[FAKE].features
        return {"critic": critic_loss(self.critics, real, fake, mix, self.penalty)}  # type: ignore[arg-type]

    def advance(self) -> None:
        self.steps += 1
