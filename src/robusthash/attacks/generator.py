"""Nets of the attacks by generation: one pass paints the change; and the losses that they are trained by.

One generator, discriminator and prototype net serve ProS-GAN, TA-DCH and EQB2A. All are convolutional and
normalise by item, so neither batch nor image size matters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, softplus
from torch.nn.utils.parametrizations import spectral_norm

from robusthash.core.hamming import sign
from robusthash.core.labels import relevant


def _layer(wide: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    padding = (kernel - 1) // 2
    norm = nn.GroupNorm(out, out)  # instance norm; written so, a step takes four fifths of the time on a CPU
    return nn.Sequential(nn.Conv2d(wide, out, kernel, stride, padding), norm, nn.ReLU())


class Residual(nn.Module):
    """Two convolutions and the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_layer(width, width, 3), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Generator(nn.Module):
    """Images (B, 3, H, W) in [0, 1] and planes (B, P, H, W) -> (B, 3, H, W) in (-1, 1).

    A convolution of 7, two halvings, residual blocks, two doublings, the image once more, a convolution of 3,
    tanh: the shape of ProS-GAN, TA-DCH and EQB2A, of ``width`` 64 and six ``blocks`` there.
    """

    def __init__(self, planes: int, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.enter = _layer(3 + planes, width, 7)
        self.halve = nn.ModuleList([_layer(width, 2 * width, 4, 2), _layer(2 * width, 4 * width, 4, 2)])
        self.middle = nn.Sequential(*(Residual(4 * width) for _ in range(blocks)))
        self.widen = nn.ModuleList([_layer(4 * width, 2 * width, 3), _layer(2 * width, width, 3)])
        self.leave = nn.Conv2d(width + 3, 3, 3, padding=1)

    def forward(self, images: Tensor, planes: Tensor) -> Tensor:
        images = 2 * images - 1
        x, sizes = self.enter(torch.cat([images, planes], 1)), []
        for layer in self.halve:
            sizes.append(x.shape[2:])
            x = layer(x)
        x = self.middle(x)
        for layer, size in zip(self.widen, reversed(sizes), strict=True):
            x = layer(interpolate(x, size=size))
        return torch.tanh(self.leave(torch.cat([x, images], 1)))


class Planes(nn.Module):
    """Features (B, F) of a target -> 3 planes (B, 3, H, W) that the generator reads next to the image."""

    START = 4  # side of the first map

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(features, width * self.START**2)
        self.layers = nn.ModuleList([_layer(width, width, 3) for _ in range(3)])
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.enter(features).view(-1, self.width, self.START, self.START)
        for layer in self.layers:
            x = layer(interpolate(x, scale_factor=2.0))
        return torch.tanh(self.leave(interpolate(x, size=size)))


class Discriminator(nn.Module):
    """Images -> (B, C + 1): their labels, and 0 for a real or 1 for an attacked one; spectral norm."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        widths = [3, *(width * 2**step for step in (0, 1, 2, 3, 3))]
        layers: list[nn.Module] = []
        for wide, out in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(wide, out, 4, 2, 2)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.leave = nn.Linear(widths[-1], classes + 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.leave(self.layers(2 * images - 1).mean((2, 3)))


class Prototyped(NamedTuple):
    """Answer of a prototype net to a target."""

    features: Tensor  # (B, F)
    code: Tensor  # (B, K) in (-1, 1)
    labels: Tensor  # (B, C) in (0, 1)


class TargetNet(nn.Module):
    """Labels (B, C), and of pairs a text (B, V), -> features, code and labels of a target.

    Labels alone: Linear, ReLU, Linear (ProS-GAN: 4096 and 512). With texts both pass a layer of their own and
    are fused twice by a learned gate, first of their sum and then of what came of it (TA-DCH).
    """

    def __init__(self, classes: int, bits: int, texts: int = 0, hidden: int = 1024, features: int = 512):
        super().__init__()
        self.label = nn.Sequential(nn.Linear(classes, hidden), nn.ReLU())
        self.text = nn.Sequential(nn.Linear(texts, hidden), nn.ReLU()) if texts else None
        gates = 2 if texts else 0
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden // 4), nn.ReLU(), nn.Linear(hidden // 4, hidden))
            for _ in range(gates)
        )
        self.features = nn.Linear(hidden, features)
        self.code, self.labels = nn.Linear(features, bits), nn.Linear(features, classes)

    def forward(self, labels: Tensor, texts: Tensor | None = None) -> Prototyped:
        x = self.label(labels)
        if self.text is not None:
            label, text = x, self.text(texts)
            x = label + text
            for gate in self.gates:
                share = torch.sigmoid(gate(x))
                x = share * label + (1 - share) * text
        features = self.features(x)
        return Prototyped(features, torch.tanh(self.code(features)), torch.sigmoid(self.labels(features)))


def target_loss(
    prototype: Prototyped,
    labels: Tensor,
    codes: Tensor,
    code_labels: Tensor,
    pairs: float,
    quantisation: float,
) -> Tensor:
    """MSE of labels + ``pairs`` mean_ij [softplus(t_ij) - S_ij t_ij] + ``quantisation`` |sgn p - p|^2 / B.

    t_ij = p_i . b_j / 2 over codes (N, K) and their labels (N, C).
    """
    product = prototype.code @ codes.T / 2
    likelihood = (softplus(product) - relevant(labels, code_labels).float() * product).mean()
    spread = (sign(prototype.code.detach()) - prototype.code).square().sum() / len(labels)
    return mse_loss(prototype.labels, labels) + pairs * likelihood + quantisation * spread


def judged(answers: Tensor, labels: Tensor, attacked: bool) -> Tensor:
    """Least-squares loss of the discriminator's (B, C + 1) answers to labels (B, C) and the flag."""
    flag = torch.full_like(answers[:, :1], float(attacked))
    return mse_loss(answers, torch.cat([labels, flag], 1))
