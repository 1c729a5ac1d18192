"""FPAD's attack: away from a fuzzy prototype, the codes of an item's classes weighed by how near it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Own, known
from robusthash.attacks.losses import Agreement
from robusthash.attacks.published import Slope, steps_on
from robusthash.attacks.tha import Prototype
from robusthash.attacks.threat_model import Attacked, threat_on
from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, LossTerms, Reference
from robusthash.models.hasher import Hasher


def memberships(codes: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """(B, C) shares of each item in each class, summing to 1: softmax_c((1/K) h_i . p_c / temperature).

    The inner product is minus the distance of codes in [-1, 1], up to a constant.

    Args:
        codes, prototypes: (B, K) relaxed codes h and (C, K) class codes p.
    """
    return (codes @ prototypes.T / (codes.shape[1] * temperature)).softmax(1)


@register("attack-guide", "fuzzy-prototype", paper="Yu et al., TCSVT 2025", evidence="reconstruction")
class FuzzyPrototype(Prototype):
    """FpNet: class (C) -> Linear -> ReLU -> Linear K -> tanh is its code p_c; an item has a mix.

    q_i = sgn(sum_c w_ic p_c), w_ic the item's ``memberships`` among its own labels, scaled to 1. Of a label
    set without an item, as in the net's training, the labels count alike. Trained on pairs of a label set and
    a reference code: L = mean [softplus(T) - S T] + 0.01 mean (|q| - 1)^2, T = q . b / 2.

    Args:
        hidden: width, 512. The second one of ``Prototype`` is unused.
        temperature: of the memberships.

    Cost: as ``Prototype``, and one forward pass of the victim for the memberships of a block. Differs: the
    abstract names an adaptive net that learns fuzzy prototypes in feature and in Hamming space; layers,
    memberships and loss are ours, in Hamming space alone.
    """

    temperature = 0.25

    def __init__(self, hidden: int = 512, middle: int = 1, steps: int | None = None) -> None:
        super().__init__(hidden, middle, steps)

    def _layers(self, classes: int, bits: int) -> tuple[int, ...]:
        return classes, self.widths[0], bits

    def class_codes(self, classes: int, device: torch.device) -> Tensor:
        """(C, K) relaxed codes of the classes."""
        return super().prototypes(torch.eye(classes, device=device))

    def prototypes(self, labels: Tensor) -> Tensor:
        return self.mixed(labels, labels.float())

    def mixed(self, labels: Tensor, shares: Tensor) -> Tensor:
        """(B, K) class codes of each label set, by (B, C) shares; only those of its labels count."""
        weights = labels * (shares + 1e-6)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
        return weights @ self.class_codes(labels.shape[1], labels.device)

    def terms(self, goal_labels: Tensor | None, reference: Reference | None, draws: Draws) -> LossTerms:
        codes, labels, label_sets = known(reference, Goal(goal_labels, +1))
        mixtures = self.prototypes(label_sets)
        products = mixtures @ codes.T / 2
        similar = relevant(label_sets, labels).float()
        spread = (mixtures.abs() - 1.0).square().mean()
        likelihood = (softplus(products) - similar * products).mean()
        return {"prototype": likelihood, "prototype/quantisation": 0.01 * spread}

    def forward(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        if goal.labels is None:
            raise ValueError("the guide 'fuzzy-prototype' needs labels: use labelled data")
        with torch.no_grad():
            own = Own()(victim, batch, goal, reference, draws).codes
            classes = self.class_codes(goal.labels.shape[1], own.device)
            shares = memberships(own, classes, self.temperature)
            return Guidance(sign(self.mixed(goal.labels, shares)))


@register("attack", "fpad", paper="Yu et al., TCSVT 2025", evidence="reconstruction", state="measured")
def fpad(
    eps: float | None = None,
    steps: int = 100,
    step_size: float | None = None,
    slope: Slope = "one",
    random_start: bool = True,
    fit_steps: int | None = None,
    modality: Attacked = "image",
) -> Attack:
    """FPAD: away from the item's fuzzy prototype, by a net fitted to the victim's training codes.

    Image and text together are ``modality: both``. ``fit_steps``: steps of the fit, until settled by default.
    """
    search = steps_on(modality, steps, step_size, random_start)
    guide = FuzzyPrototype(steps=fit_steps)
    return Attack("fpad", guide, Agreement(), search, threat_on(modality, eps), slope)
