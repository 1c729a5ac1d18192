"""Discriminators between modalities, with the gradient penalty that DADH and CPAH train them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from robusthash.core.runtime import Draws

REAL, FAKE = "image", "text"
"""Both papers let the images' distribution be the real one, and only the text net is trained to imitate
it."""


class Critic(nn.Module):
    """Fully connected layers with ReLU: (B, D) -> (B,) logit, positive for real.

    Args:
        width: D.
        hidden: widths of the hidden layers.
        draws: key of the initial weights, so that a run that goes on begins with the same ones.
    """

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
    """A linear layer with torch's usual initial weights (uniform within 1 / sqrt(inputs)), drawn from
    ``draws``."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    generator, bound = draws.generator(), inputs**-0.5
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, penalty: float) -> Tensor:
    """Mean binary cross-entropy of real as 1 and fake as 0, plus ``penalty`` times the mean gradient penalty.

    Args:
        real, fake: (B, D).
        mix: (B, 1) in [0, 1): where between real and fake the gradient is looked at.
    """
    told = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
    return told + penalty * gradient_penalty(critic, real, fake, mix)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|grad D| - 1)^2 at mix * real + (1 - mix) * fake, differentiable, in float32 also under
    autocast."""
    with torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        point = (mix * real.float() + (1.0 - mix) * fake.float()).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
        # a critic that is flat at a point (all ReLU off) has norm 0, where the root has no derivative
        return ((slope.square().sum(1) + 1e-12).sqrt() - 1.0).square().mean()


def deceive(critic: nn.Module, fake: Tensor) -> Tensor:
    """Mean of -log sigma(D(fake)): what the imitating side lowers."""
    return softplus(-critic(fake)).mean()


def one_width(widths: Mapping[str, int], name: str) -> int:
    """The feature width that both modalities share.

    Raises:
        ValueError: widths differ.
    """
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"{name} compares the features of both modalities, whose widths differ: {dict(widths)}; "
            "end hasher.text.widths with the image encoder's width"
        )
    return next(iter(widths.values()))
