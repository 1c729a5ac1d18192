"""SSAH: a net of the labels teaches the image and the text net, and critics align their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, TrainFacts
from robusthash.objectives.cross_modal import Critic, CrossLikelihood, deceive, one_width, seeded_linear


class LabelNet(nn.Module):
    """Labels (B, C) -> features (B, D) through a hidden layer, and codes tanh (B, K)."""

    def __init__(self, facts: TrainFacts, width: int, hidden: int, draws: Draws) -> None:
        super().__init__()
        first = seeded_linear(facts.classes, hidden, draws.within("first"))
        second = seeded_linear(hidden, width, draws.within("second"))
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.head = seeded_linear(width, facts.bits, draws.within("head"))

    def forward(self, labels: Tensor) -> HashOutput:
        features = self.features(labels)
        logits = self.head(features).float()
        return HashOutput(logits, logits.tanh(), features)


@register("objective", "ssah", paper="Li et al., CVPR 2018", evidence="paper+code", state="measured")
class SSAH(CrossLikelihood):
    """SSAH: self-supervised adversarial hashing; a label net is the third modality.

    For each net m of image, text and label: L^m = codes NLL(<h^l_j, h^m_i> / 2) + features NLL(<f^l_j, f^m_i>
    / 2) + beta mean (B - h^m)^2 + labels mean (sigma(y^m) - y)^2, NLL over all training items j, l the label
    net, held constant but where m = l; B = sign(F + G + H) of all three. For m of image and text, +
    adversarial * -log sigma(D_m(f^m)): the critics D_m, in the group "critic", tell the label net's features
    (real) from its own (fake).

    Args:
        codes, features, beta, labels, adversarial: weights (ours, for means; the code has 1 for each sum).
        hidden: of the label net, 4,096 in the code.
        critic_hidden: of the critics, (512, 256).
        balance: see ``WeightedPairs``. Off in the paper.

    Cost: one forward and backward an item; the label net on all training items in each step (N * C * hidden
    operations, no gradient), and two critics. Differs: the likelihood is the paper's; the code takes the
    squared difference of S T and log(1 + e^T) with S times 0.999. All nets step together, once a batch, where
    the code runs 10 passes of the label net, 15 of each other and stops when a loss rises. The codes and
    features of the label net are of this step, not of its last pass. Text features have no multi-scale
    fusion; the encoder is the recipe's. The label net is for training alone; ``similarity``, which attacks
    ascend, is the likelihood between codes.
    """

    training_only = ("critics", "label_net", "classifiers")

    def __init__(
        self,
        codes: float = 1.0,
        features: float = 0.1,
        beta: float = 0.1,
        labels: float = 0.1,
        adversarial: float = 0.1,
        hidden: int = 512,
        critic_hidden: Sequence[int] = (512, 256),
        balance: bool = False,
    ) -> None:
        super().__init__(beta, balance)
        self.codes_weight = codes
        self.features_weight = features
        self.labels_weight = labels
        self.adversarial = adversarial
        self.hidden = hidden
        self.critic_hidden = tuple(critic_hidden)

    def setup(self, facts: TrainFacts) -> None:
        facts.refuse_one_sided("ssah")
        super().setup(facts)
        draws, width = Draws(facts.seed, ("ssah",)), one_width(facts.widths, "ssah")
        self.label_net = LabelNet(facts, width, self.hidden, draws.within("labels"))
        heads = {
            m: seeded_linear(width, facts.classes, draws.within("classes", m))
            for m in (*facts.widths, "label")
        }
        self.classifiers = nn.ModuleDict(heads)
        critics = {m: Critic(width, self.critic_hidden, draws.within("critic", m)) for m in facts.widths}
        self.critics = nn.ModuleDict(critics)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        """Terms ``similarity``, ``features``, ``regularisation``, ``labels`` and ``adversarial``."""
        labels, memory_labels = self.both_labels(batch, memory)
        with torch.no_grad():
            label_output: HashOutput = self.label_net(memory_labels)
        nets = {**outputs, "label": self.label_net(labels)}
        totals = [codes.detach()[batch.ids] for codes in memory.codes.values()]
        joint = sign(torch.stack([*totals, nets["label"].code.detach()]).sum(0))
        codes, features, spread, classes = [], [], [], []
        for name, output in nets.items():
            codes.append(self.losses(output, labels, label_output.code, memory_labels).mean())
            as_code = replace(output, code=output.features.float())
            features.append(self.losses(as_code, labels, label_output.features.float(), memory_labels).mean())
            spread.append((output.code - joint).square().mean())
            guess = torch.sigmoid(self.classifiers[name](output.features).float())
            classes.append((guess - labels).square().mean())
        critics: nn.ModuleDict = self.critics  # type: ignore[assignment]
        fooled = [deceive(critics[name], output.features) for name, output in outputs.items()]
        return {
            "similarity": self.codes_weight * torch.stack(codes).mean(),
            "features": self.features_weight * torch.stack(features).mean(),
            "regularisation": self.gamma * torch.stack(spread).mean(),
            "labels": self.labels_weight * torch.stack(classes).mean(),
            "adversarial": self.adversarial * torch.stack(fooled).mean(),
        }

    def critic(self, outputs: Outputs, batch: Batch) -> LossTerms:
        if batch.labels is None:
            raise ValueError("SSAH is supervised, and this batch has no labels")
        with torch.no_grad():
            real = self.label_net(batch.labels).features
        critics: nn.ModuleDict = self.critics  # type: ignore[assignment]
        terms = {}
        for name, output in outputs.items():
            loss = softplus(-critics[name](real)).mean() + softplus(critics[name](output.features)).mean()
            terms[f"critic/{name}"] = loss
        return terms
