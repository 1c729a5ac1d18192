"""LTHNet: a classifier on codes whose classes weigh by their effective number of items."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput
from robusthash.objectives.base import HashObjective, TrainFacts


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """(C,) (1 - beta) / (1 - beta^n_c), the largest 1; a class without items has none."""
    weights = (1.0 - beta) / (1.0 - beta ** counts.double().clamp_min(1.0))
    weights = torch.where(counts > 0, weights, 0.0)
    return (weights / weights.max()).float()


@register("objective", "lthnet", paper="Chen et al., SIGIR 2021", evidence="paper+code", state="measured")
class LTHNet(HashObjective):
    """LTHNet: class-balanced cross-entropy of a linear classifier on the codes; long-tailed classes.

    L = -sum_c w_c (y_c / |y|) log softmax_c(A h + a), w_c = (1 - beta) / (1 - beta^n_c) over its largest,
    n_c the items of class c, h the code. The classifier A, a is trained along and stays with the model, for
    attacks. The paper's net is the head ``meta-embedding``, whose class means are renewed before every
    epoch: one more forward pass of the training set an epoch.

    Args:
        beta: 0.99 in the paper's text; its code's default 0 is the plain cross-entropy.

    Differs: the code's mix with the unweighted loss is commented out there and left out here; several labels
    share the target evenly (the code reads one label an item). The paper's choice of diverse class means is
    not in its code, and not built.
    """

    weights: Tensor

    def __init__(self, beta: float = 0.99) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must be from 0 to below 1, got {beta:g}")
        super().__init__()
        self.beta = beta
        self.register_buffer("weights", torch.empty(0))
        self.matrix = nn.Parameter(torch.empty(0))  # (C, K) and (C,), made by setup
        self.bias = nn.Parameter(torch.empty(0))

    def setup(self, facts: TrainFacts) -> None:
        classes = facts.classes
        assert facts.labels is not None, "there are classes"
        if classes < 2:
            raise ValueError(f"LTHNet tells classes apart, and this data set has {classes}")
        device = self.weights.device
        self.weights = class_weights(facts.labels.sum(0), self.beta).to(device)
        generator = Draws(facts.seed, ("lthnet",)).within("classifier").generator()
        bound = facts.bits**-0.5  # that of nn.Linear
        weights = torch.rand(classes, facts.bits + 1, generator=generator) * 2.0 * bound - bound
        self.matrix = nn.Parameter(weights[:, :-1].clone().to(device))
        self.bias = nn.Parameter(weights[:, -1].clone().to(device))

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        share = labels / labels.sum(1, keepdim=True).clamp_min(1.0)
        logs = log_softmax(output.code @ self.matrix.T + self.bias, 1)
        return -(self.weights * share * logs).sum(1)
