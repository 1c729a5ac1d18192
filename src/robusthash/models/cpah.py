"""CPAH's encoders: any encoder, two layers, and a mask that parts what modalities share from what is one's
own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.core.registry import build, register

_PAPER = "Xie et al., IEEE TIP 2020"


class CommonPrivate(nn.Module):
    """f = two layers (Linear, BatchNorm, ReLU) on an encoder's features; the common part is m f, m = sigma(W
    f + b).

    Returns the common part as features (B, D) and the private part f - m f in aux as ``private`` (B, D). The
    mask is used in training and at test alike. BatchNorm cannot train on a batch of one item.

    Args:
        inner: the encoder before it, with ``.width``.
        width: D, 512 in the public code.
    """

    def __init__(self, inner: nn.Module, width: int = 512) -> None:
        super().__init__()
        self.inner = inner
        self.layers = nn.Sequential(
            nn.Linear(int(inner.width), width),  # type: ignore[arg-type]
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.mask = nn.Linear(width, width)
        self.width = width

    @property
    def smallest(self) -> int:
        """Least side of an image in pixels, the inner encoder's."""
        return self.inner.smallest  # type: ignore[return-value]

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, shown = self.inner(values)
        whole = self.layers(features)
        common = torch.sigmoid(self.mask(whole)) * whole
        return common, {**shown, "private": whole - common}


@register("image-encoder", "cpah", paper=_PAPER, evidence="reconstruction", modality="image")
def cpah_image(inner: str | Mapping[str, Any] = "small", width: int = 512) -> CommonPrivate:
    """CPAH's image side: common and private features on an inner ``image-encoder``.

    Args:
        inner: name or settings of the image encoder before it (CNN-F in the paper).
        width: D of both parts.
    """
    return CommonPrivate(build("image-encoder", inner), width)


@register("text-encoder", "cpah", paper=_PAPER, evidence="reconstruction", modality="text")
def cpah_text(vocabulary: int, inner: str | Mapping[str, Any] = "mlp", width: int = 512) -> CommonPrivate:
    """CPAH's text side: common and private features on an inner ``text-encoder``.

    Args:
        vocabulary: V, known from the data.
        inner: name or settings of the text encoder before it. The public code has none: bags enter the two
            layers, and one layer more stands before them here.
        width: D of both parts; the same as the image side's.
    """
    return CommonPrivate(build("text-encoder", inner, vocabulary=vocabulary), width)
