"""Fully connected layers, as image and text encoders share them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def dense(inputs: int, widths: Sequence[int], dropout: float = 0.0, batchnorm: bool = False) -> nn.Sequential:
    """Linear layers of ``widths``, each with ReLU; ``batchnorm`` before it, ``dropout`` after it.

    Raises:
        ValueError: no width, or one below 1.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be at least one positive number, got {list(widths)}")
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *widths), widths, strict=False):
        layers.append(nn.Linear(before, after))
        layers += [nn.BatchNorm1d(after)] if batchnorm else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers)
