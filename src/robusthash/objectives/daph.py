"""DAPH: learn a proxy code for every training item first, then hash towards the proxies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.labels import overlap
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts
from robusthash.objectives.cross_modal import CrossModalObjective, seeded_linear
from robusthash.objectives.dadh import unit

ABSENT = -1e4
"""A logit that adds nothing to a logsumexp; finite, because the gradient of an empty one would be NaN."""


def proxy_softmax(logits: Tensor, positive: Tensor, negative: Tensor, slope: float, margin: float) -> Tensor:
    """(B,) mean over positives p of -log(e^{g(s_p-m)} / (e^{g(s_p-m)} + sum over negatives q of e^{g s_q})).

    s (B, M) are similarities in [-1, 1], g the slope, m the margin; 0 for an item without positives or
    negatives.
    """
    against = torch.logsumexp((slope * logits).masked_fill(~negative, ABSENT), 1, keepdim=True)
    losses = softplus(against - slope * (logits - margin)) * positive
    return losses.sum(1) / positive.sum(1).clamp_min(1)


def weighted_softmax(
    logits: Tensor, weights: Tensor, negative: Tensor, slope: float, margin: float
) -> Tensor:
    """(B,) the same with one positive an item, the mean of ``logits`` by ``weights`` (B, M); 0 without."""
    total = weights.sum(1)
    against = torch.logsumexp((slope * logits).masked_fill(~negative, ABSENT), 1)
    mean = (weights * logits).sum(1) / total.clamp_min(1e-8)
    return softplus(against - slope * (mean - margin)) * (total > 0)


class Proxies(nn.Module):
    """The nets of stage 1: a code per class, and a code per item from its features and its labels.

    Class c_k = norm(LabelNet(e_k)); item p = norm(W [norm(f(features)) + norm(g(labels))]), one W, f, g per
    modality.
    """

    def __init__(self, facts: TrainFacts, inner: int, draws: Draws) -> None:
        super().__init__()
        first = seeded_linear(facts.classes, inner, draws.within("classes"))
        last = seeded_linear(inner, facts.bits, draws.within("classes", "out"))
        self.classes = nn.Sequential(first, nn.ReLU(), last)
        self.count = facts.classes
        self.features = nn.ModuleDict()
        self.labels = nn.ModuleDict()
        self.out = nn.ModuleDict()
        for name, width in facts.widths.items():
            self.features[name] = seeded_linear(width, inner, draws.within("features", name))
            self.labels[name] = seeded_linear(facts.classes, inner, draws.within("labels", name))
            self.out[name] = seeded_linear(inner, facts.bits, draws.within("out", name))

    def of_classes(self) -> Tensor:
        """(C, K) unit rows."""
        device = next(self.parameters()).device
        return unit(self.classes(torch.eye(self.count, device=device)).float())

    def of_items(self, name: str, features: Tensor, labels: Tensor) -> Tensor:
        """(B, K) unit rows."""
        mixed = unit(self.features[name](features).float()) + unit(self.labels[name](labels).float())
        return unit(self.out[name](mixed).float())


@register("objective", "daph", paper="Tu et al., SIGIR 2023", evidence="paper+code", state="measured")
class DAPH(CrossModalObjective):
    """DAPH: data-aware proxy hashing, both stages in one run.

    Stage 1, ``proxy_epochs`` long, trains label-conditioned proxies (see ``Proxies``): L = mean over
    modalities of L_ms(p) + |relu(C C^T - I)|_F^2 + beta reg + alpha bal, L_ms the softmax of an item's
    classes against the others at logits <p, c_k>, reg = mean (<norm(sgn z), z> - 1)^2, bal = |mean z|^2.
    Stage 2 trains the hasher against the signs of the proxies of all training items, kept constant: at logits
    <h, a> / K, L = L_pos + eta L_part for the anchors a of each modality, + L_cls for the signs of the class
    codes. Positive are anchors of the same label set, negative those that share no label; L_part takes as
    positive the mean of the rest, weighted by the number of shared labels, and L_cls the mean of the item's
    classes.

    Args:
        proxy_epochs: length of stage 1 in epochs, at least 1, less than the run's epochs.
        slope, margin: g, 20, and sigma, 0.2, of the softmax.
        alpha, beta: weights of balance and polarisation in stage 1, 0.2 each.
        eta: weight of the partial matches in stage 2, 1.
        inner: width of the proxies' hidden layers, 512.

    Differs: means for sums in reg and bal. Stage 1 uses the hasher's own features, and trains its encoders,
    where the paper has nets of its own; anchors are the proxies that each item had in the last epoch of stage
    1. The code's extra 1 for every positive class in the negatives' sum is left out; a text's anchors are
    positive by the same label set, as an image's (the code takes supersets). Both nets train together, not by
    turns of an epoch.
    """

    training_only = ("critics", "proxies")
    anchors: Tensor
    class_codes: Tensor
    epochs: Tensor

    def __init__(
        self,
        proxy_epochs: int = 5,
        slope: float = 20.0,
        margin: float = 0.2,
        alpha: float = 0.2,
        beta: float = 0.2,
        eta: float = 1.0,
        inner: int = 512,
    ) -> None:
        if proxy_epochs < 1:
            reason = "there is nothing to hash to before"
            raise ValueError(f"proxy_epochs must be at least 1, for {reason}, got {proxy_epochs}")
        super().__init__(gamma=0.0)
        self.proxy_epochs = proxy_epochs
        self.slope = slope
        self.margin = margin
        self.alpha = alpha
        self.beta = beta
        self.eta = eta
        self.inner = inner
        self.register_buffer("anchors", torch.empty(0))  # (modalities, N, K) proxies, their signs in stage 2
        self.register_buffer("class_codes", torch.empty(0))  # (C, K) signs, from stage 2 on
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    @property
    def stage(self) -> int:
        """1 while the proxies are learned, then 2."""
        return 1 if int(self.epochs) < self.proxy_epochs else 2

    def setup(self, facts: TrainFacts) -> None:
        device = self.anchors.device
        self.order = list(facts.widths)
        self.proxies = Proxies(facts, self.inner, Draws(facts.seed, ("daph",)))
        self.anchors = torch.zeros(len(self.order), facts.items, facts.bits, device=device)
        self.class_codes = torch.zeros(facts.classes, facts.bits, device=device)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        """L_pos + eta L_part with the references as anchors, as an attack ascends it."""
        shared = overlap(labels, code_labels)
        own, theirs = labels.sum(1, keepdim=True), code_labels.sum(1)
        negative = shared == 0
        same = (shared == own) & (shared == theirs) & ~negative
        logits = output.code @ codes.T / codes.shape[1]
        partial = weighted_softmax(logits, shared * ~same, negative, self.slope, self.margin)
        return proxy_softmax(logits, same, negative, self.slope, self.margin) + self.eta * partial

    def regularisation(self, output: HashOutput) -> Tensor:
        return HashObjective.regularisation(self, output)  # no quantisation

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """``proxies``, ``crowding``, ``polarisation`` and ``balance``, then ``similarity``, ``classes``."""
        labels, all_labels = self.both_labels(batch, memory)
        if self.stage == 1:
            return self._proxy_terms(outputs, labels, batch.ids)
        values = [
            self.similarity(output, labels, anchors, all_labels).mean()
            for output in outputs.values()
            for anchors in self.anchors
        ]
        classes = torch.stack([self._class_loss(output.code, labels).mean() for output in outputs.values()])
        # the sum over both kinds of anchors, as in the paper; the mean over the modalities that are hashed
        return {"similarity": torch.stack(values).sum() / len(outputs), "classes": classes.mean()}

    def _class_loss(self, code: Tensor, labels: Tensor) -> Tensor:
        logits = code @ self.class_codes.T / code.shape[1]
        return weighted_softmax(logits, labels, labels == 0, self.slope, self.margin)

    def _proxy_terms(self, outputs: Outputs, labels: Tensor, ids: Tensor) -> LossTerms:
        classes = self.proxies.of_classes()
        proxies = {name: self.proxies.of_items(name, o.features, labels) for name, o in outputs.items()}
        with torch.no_grad():
            for name, rows in proxies.items():
                self.anchors[self.order.index(name), ids] = rows.detach()
        positive = labels > 0
        slope, margin = self.slope, self.margin
        logits = [rows @ classes.T for rows in proxies.values()]
        fits = [proxy_softmax(s, positive, ~positive, slope, margin).mean() for s in logits]
        eye = torch.eye(len(classes), device=classes.device)
        crowding = (classes @ classes.T - eye).relu().square().sum()
        parts = [classes, *proxies.values()]
        polarisation = [((unit(sign(z)) * z).sum(1) - 1.0).square().mean() for z in parts]
        balance = [z.mean(0).square().sum() for z in parts]
        return {
            "proxies": torch.stack(fits).mean(),
            "crowding": crowding,
            "polarisation": self.beta * torch.stack(polarisation).sum(),
            "balance": self.alpha * torch.stack(balance).sum(),
        }

    def end_epoch(self, memory: CodeMemory) -> None:
        self.epochs += 1
        if int(self.epochs) == self.proxy_epochs:
            with torch.no_grad():
                self.anchors.copy_(sign(self.anchors))
                self.class_codes.copy_(sign(self.proxies.of_classes()))
