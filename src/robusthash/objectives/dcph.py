"""DCPH: a proxy code for every class, and hashing towards the proxies of an item's classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, HashOutput, LossTerms, Outputs
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts, quantisation
from robusthash.objectives.cross_modal import seeded_linear
from robusthash.objectives.dadh import unit
from robusthash.objectives.daph import ABSENT


def spread_codes(classes: int, bits: int, steps: int, hidden: int, draws: Draws) -> Tensor:
    """(C, K) signs of class codes that a small net of the labels learns to hold apart.

    The net is c = norm(W2 relu(W1 e)); in ``steps`` steps of Adam it lowers |relu(C C^T - I)|^2 / C^2 + 0.2
    mean (<norm(sgn c), c> - 1)^2 + 0.2 |mean c|^2, DAPH's terms on class codes.
    """
    first = seeded_linear(classes, hidden, draws.within("first"))
    net = nn.Sequential(first, nn.ReLU(), seeded_linear(hidden, bits, draws.within("last")))
    optimiser, eye = torch.optim.Adam(net.parameters(), 1e-3), torch.eye(classes)
    with torch.enable_grad():
        for _ in range(steps):
            codes = unit(net(eye))
            crowding = (codes @ codes.T - eye).relu().square().mean()
            polarisation = ((unit(sign(codes)) * codes).sum(1) - 1.0).square().mean()
            loss = crowding + 0.2 * polarisation + 0.2 * codes.mean(0).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return sign(net(eye))


@register("objective", "dcph", paper="Tu et al., IEEE TKDE 2023", evidence="reconstruction", state="measured")
class DCPH(HashObjective):
    """DCPH: deep cross-modal proxy hashing, reconstructed without its paper and without code.

    Proxies are ``spread_codes``, learned once at ``setup`` from the labels alone. L = mean over an item's n
    classes k of -log(e^{g (s_k - m)} / (e^{g (s_k - m)} + sum over other classes q of e^{g s_q})) + eta mean
    (sgn h - h)^2, s = <h, p> / K, for image and text alike. The margin m = margin / sqrt(n) adapts to the
    number of
    labels: no code is nearer than 1 / sqrt(n) to n orthogonal proxies at once.

    Args:
        slope, margin: g, 20, and 0.2, DAPH's.
        eta: weight of the quantisation.
        steps, hidden: of learning the proxies.

    Cost: one forward and backward an item, B * C * K operations besides. Differs: what is known of the
    paper is that proxies come first, one a class, from the labels, and that a margin softmax towards them
    adapts to the number of labels; net, loss of the proxies and form of the margin are ours. An item of all
    classes has no negative and a loss of 0.
    """

    class_codes: Tensor

    def __init__(
        self, slope: float = 20.0, margin: float = 0.2, eta: float = 0.1, steps: int = 300, hidden: int = 512
    ) -> None:
        super().__init__()
        self.slope = slope
        self.margin = margin
        self.eta = eta
        self.steps = steps
        self.hidden = hidden
        self.register_buffer("class_codes", torch.empty(0))  # (C, K) in {-1, +1}

    def setup(self, facts: TrainFacts) -> None:
        if facts.labels is not None and bool((facts.labels > 0).all()):
            raise ValueError("dcph needs a class that some training item lacks; all items have every label")
        draws, device = Draws(facts.seed, ("dcph",)), self.class_codes.device
        self.class_codes = spread_codes(facts.classes, facts.bits, self.steps, self.hidden, draws).to(device)

    def targets(self, labels: Tensor) -> Tensor:
        """(B, K) the code nearest to the proxies of each item's classes."""
        return sign(labels @ self.class_codes)

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        """The softmax towards the proxies; references count for nothing."""
        cosines, positive = output.code @ self.class_codes.T / self.class_codes.shape[1], labels > 0
        own = self.slope * (cosines - self.margin / positive.sum(1, keepdim=True).clamp_min(1).sqrt())
        against = torch.logsumexp((self.slope * cosines).masked_fill(positive, ABSENT), 1, keepdim=True)
        losses = nn.functional.softplus(against - own) * positive
        return losses.sum(1) / positive.sum(1).clamp_min(1)

    def regularisation(self, output: HashOutput) -> Tensor:
        return self.eta * quantisation(output)

    def forward(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> LossTerms:
        labels, _ = self.both_labels(batch, memory)
        values = [self.similarity(o, labels, o.code, labels).mean() for o in outputs.values()]
        spread = [self.regularisation(output).mean() for output in outputs.values()]
        return {"similarity": torch.stack(values).mean(), "regularisation": torch.stack(spread).mean()}
