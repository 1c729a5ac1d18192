"""Hash heads: features (B, D) -> (logits (B, K), the code an objective sees (B, K), logit scale)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robusthash.core.registry import register


@register("head", "tanh")
class TanhHead(nn.Module):
    """Linear layer and tanh: the head of almost every published deep hashing model."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.linear(features)
        return logits, torch.tanh(logits), 1.0


@register("head", "linear")
class LinearHead(nn.Module):
    """Linear layer; the objective sees the logits, and attacks divide by their running mean size."""

    size: Tensor

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits)
        # running mean of |logit|, so that an attack's tanh does not saturate
        self.register_buffer("size", torch.ones(()))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.linear(features)
        if self.training:
            self.size.lerp_(logits.detach().abs().mean().to(self.size.dtype), 0.1)
        return logits, logits, float(self.size)


@register("head", "batchnorm")
class BatchNormHead(nn.Module):
    """Bias-free linear layer and batch normalisation, which balances each bit (OrthoHash, NeurIPS 2021)."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = nn.Linear(width, bits, bias=False)
        self.norm = nn.BatchNorm1d(bits)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.norm(self.linear(features))
        return logits, torch.tanh(logits), 1.0


@register("head", "mlp")
class MLPHead(nn.Module):
    """Linear layers with ReLU between and tanh: the hash layer of SFCL and DSARH.

    Args:
        hidden: width of the hidden layer, 512 in both papers, or the widths of several; DSARH's image net
            after the convolutions is ``[4096, 512]``.
    """

    def __init__(self, width: int, bits: int, hidden: int | Sequence[int] = 512) -> None:
        super().__init__()
        sizes = list(hidden) if isinstance(hidden, Sequence) else [hidden]
        if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"hidden must be widths of at least 1 (without: 'tanh'), got {hidden!r}")
        self.bits = bits
        layers: list[nn.Module] = []
        for inputs, outputs in zip((width, *sizes), sizes, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], bits))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, float]:
        logits = self.layers(features)
        return logits, torch.tanh(logits), 1.0
