"""AGAH: encoders with attention by the classes' mean features, cosine triplets, a class map and critics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.models.hasher import Encoder
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import (
    FAKE,
    REAL,
    Critic,
    CrossModalObjective,
    gradient_penalty,
    one_width,
)
from robusthash.objectives.dadh import hinge_triplets, unit

_PAPER = "Gu et al., ICMR 2019"


class ClassAttention(Encoder):
    """f' = keep f + (1 - keep) (m A) / sum m, m = sigma(5 f A^T), f an encoder's features of length 1.

    A (C, D) are the classes' mean features, which the objective ``agah`` sets after each epoch; until then f'
    = keep f. ``plain`` in aux is f. Length 1 is an item's own: the public code divides by the norm of the
    whole batch, so that a query's code depends on the others.
    """

    class_features: Tensor

    def __init__(self, inner: Encoder, classes: int, keep: float = 0.8) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes of 'agah' is the number of labels of the data, got {classes}")
        self.inner = inner
        self.keep = keep
        self.width = inner.width
        self.register_buffer("class_features", torch.zeros(classes, self.width))

    @property
    def smallest(self) -> int:
        """Least side of an image in pixels, the inner encoder's."""
        return self.inner.smallest  # type: ignore[return-value]

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, aux = self.inner(values)
        plain = unit(features)
        weights = torch.sigmoid(5 * plain @ self.class_features.T)
        attended = weights @ self.class_features / weights.sum(1, keepdim=True)
        return self.keep * plain + (1 - self.keep) * attended, {**aux, "plain": plain}


@register("image-encoder", "agah", paper=_PAPER, evidence="paper+code", modality="image", state="measured")
def agah_image(classes: int, inner: str | Mapping[str, Any] = "small", keep: float = 0.8) -> ClassAttention:
    """AGAH's image side: class attention on an ``image-encoder`` (CNN-F in the paper)."""
    return ClassAttention(build("image-encoder", inner), classes, keep)


@register("text-encoder", "agah", paper=_PAPER, evidence="paper+code", modality="text", state="measured")
def agah_text(
    vocabulary: int, classes: int, inner: str | Mapping[str, Any] = "mlp", keep: float = 0.8
) -> ClassAttention:
    """AGAH's text side: class attention on a ``text-encoder`` that ends with the image side's width."""
    return ClassAttention(build("text-encoder", inner, vocabulary=vocabulary), classes, keep)


def solved_map(class_codes: Tensor, codes: Sequence[Tensor], labels: Tensor) -> Tensor:
    """(C, K) the map M after a pass over its bits, for sum_Z |Z M^T - K Y|^2 over sign codes Z (N, K) and M.

    Y is 2 labels - 1 for items and 2 I - 1 for M itself, held as it came. Each bit is the best of its column
    with the others as they are; where it makes no difference the old one stays.
    """
    bits, classes = class_codes.shape[1], len(class_codes)
    targets = [2 * labels - 1] * len(codes) + [2 * torch.eye(classes, device=labels.device) - 1]
    fixed, result = [*codes, class_codes], class_codes.clone()
    for k in range(bits):
        pull = torch.zeros(classes, device=labels.device)
        for rows, goal in zip(fixed, targets, strict=True):
            rest = rows.T @ rows[:, k]
            rest[k] = 0.0
            pull += bits * goal.T @ rows[:, k] - result @ rest
        result[:, k] = torch.where(pull == 0, result[:, k], sign(pull))
    return result


@register("objective", "agah", paper=_PAPER, evidence="paper+code", state="measured")
class AGAH(CrossModalObjective):
    """AGAH: adversary-guided asymmetric hashing, for hashers whose encoders are ``agah``.

    L = T(v, t) + T(t, v) + even mean 1 / (1 + e^{cos(|h|, 1)}) + to_map mean (h M^T / K - Y)^2 + eta mean (h
    - sgn h)^2 + adversarial [-D_t(f^v) - D_v(f^t)]; T is the mean over positives and negatives of [d_ij -
    d_ik + margin]_+, d = 1 - cosine, Y = 2 y - 1, M the class map, ``solved_map`` after each epoch. The
    critics, in the group "critic", are Wasserstein's with gradient penalty: D_t tells text (real) from image
    features, D_v image (real) from text.

    Args:
        even, to_map, eta, adversarial: weights (ours, for means; the code's 1, 0.001, 1 and 1 are for sums).
        margin: 0.3.
        penalty: weight of the gradient penalty, 10.
        hidden: of the critics.

    Cost: one forward and backward an item, triplets in M log M an item, two critics with their gradients'
    gradient, and K * C * N * K operations an epoch for M. Differs: means for sums; references of a triplet
    are the memory of the other modality, held constant, not the batch. The class loss has weight 0 in the
    code and is left out. A item's features are normalised by themselves (see ``ClassAttention``). One
    modality alone has no critics.
    """

    class_codes: Tensor
    sums: Tensor
    counts: Tensor
    steps: Tensor

    def __init__(
        self,
        even: float = 0.1,
        to_map: float = 0.1,
        eta: float = 0.1,
        adversarial: float = 0.1,
        margin: float = 0.3,
        penalty: float = 10.0,
        hidden: Sequence[int] = (256,),
    ) -> None:
        super().__init__(eta)
        self.even = even
        self.to_map = to_map
        self.adversarial = adversarial
        self.margin = margin
        self.penalty = penalty
        self.hidden = tuple(hidden)
        self.register_buffer("class_codes", torch.empty(0))  # M, (C, K)
        self.register_buffer("sums", torch.empty(0))  # (C, D) of the features of this epoch, by class
        self.register_buffer("counts", torch.empty(0))  # (C,)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.encoders: tuple[nn.Module, ...] = ()  # a tuple, so that the hasher's parts do not become its own

    def setup(self, facts: TrainFacts) -> None:
        facts.refuse_one_sided("agah")
        self.draws = draws = Draws(facts.seed, ("agah",))
        width, device = one_width(facts.widths, "agah"), self.steps.device
        for name, encoder in facts.encoders.items():
            has = len(encoder.class_features) if isinstance(encoder, ClassAttention) else None
            if has != facts.classes:
                problem = "is another" if has is None else f"has classes: {has}"
                raise ValueError(
                    f"agah needs its own encoders, and the {name} encoder {problem}; use hasher.{name}: "
                    f"{{name: agah, classes: {facts.classes}, inner: <the encoder>}}"
                )
        self.encoders = tuple(facts.encoders.values())
        start = torch.randn(facts.classes, facts.bits, generator=draws.generator())
        self.class_codes = sign(start).to(device)
        self.sums = torch.zeros(facts.classes, width, device=device)
        self.counts = torch.zeros(facts.classes, device=device)
        if {REAL, FAKE} <= set(facts.widths):
            critics = {m: Critic(width, self.hidden, draws.within("critic", m)) for m in (REAL, FAKE)}
            self.critics = nn.ModuleDict(critics)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        similar = relevant(labels, code_labels)
        return hinge_triplets(output.code, codes, similar.float(), ~similar, self.margin)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity``, ``regularisation``, ``even``, ``map`` and, of both, ``adversarial``."""
        terms = super().forward(outputs, batch, memory)
        labels, _ = self.both_labels(batch, memory)
        spread = [self.regularisation(output).mean() for output in outputs.values()]
        terms["regularisation"] = torch.stack(spread).mean()
        codes = [output.code for output in outputs.values()]
        even = [torch.sigmoid(-cosine_similarity(h.abs(), torch.ones_like(h))).mean() for h in codes]
        goal, bits = 2 * labels - 1, self.class_codes.shape[1]
        mapped = [(h @ self.class_codes.T / bits - goal).square().mean() for h in codes]
        terms["even"] = self.even * torch.stack(even).mean()
        terms["map"] = self.to_map * torch.stack(mapped).mean()
        if self.critics is not None and {REAL, FAKE} <= set(outputs):
            fooled = [-critic(plain).mean() for _, plain, critic in self._crossed(outputs)]
            terms["adversarial"] = self.adversarial * torch.stack(fooled).sum()
            self._count(outputs, labels)
        return terms

    def _crossed(self, outputs: Outputs) -> list[tuple[str, Tensor, nn.Module]]:
        """The real side of each critic, the features that it should take for real, and the critic."""
        critics: nn.ModuleDict = self.critics  # type: ignore[assignment]
        return [(real, _plain(outputs, fake), critics[real]) for real, fake in ((FAKE, REAL), (REAL, FAKE))]

    @torch.no_grad()
    def _count(self, outputs: Outputs, labels: Tensor) -> None:
        for name in outputs:
            self.sums += labels.T @ _plain(outputs, name).float()
            self.counts += labels.sum(0)

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        draws, terms = self.draws.within("penalty", int(self.steps)), {}
        for name, fake, critic in self._crossed(outputs):
            real, mix = _plain(outputs, name), draws.within(name).uniform(batch.ids, (1,))
            apart = critic(fake).mean() - critic(real).mean()
            terms[f"critic/{name}"] = apart + self.penalty * gradient_penalty(critic, real, fake, mix)
        return terms

    def advance(self) -> None:
        self.steps += 1

    def end_epoch(self, memory: CodeMemory) -> None:
        if memory.labels is None:
            raise ValueError("AGAH's class map needs labels, and the training split has none")
        codes = [sign(values.detach()) for values in memory.codes.values()]
        self.class_codes.copy_(solved_map(self.class_codes, codes, memory.labels))
        if self.counts.sum() > 0:
            means = unit(self.sums / self.counts.clamp_min(1)[:, None])
            for encoder in self.encoders:
                encoder.class_features.copy_(means)  # type: ignore[operator]
            self.sums.zero_()
            self.counts.zero_()


def _plain(outputs: Outputs, name: str) -> Tensor:
    if "plain" not in outputs[name].aux:
        raise ValueError(f"agah needs its encoders; use hasher.{name}: {{name: agah, inner: <the encoder>}}")
    return outputs[name].aux["plain"]
