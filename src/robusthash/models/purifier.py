"""Interface of what repairs an input before its encoder: gates, generators and input transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from robusthash.core.types import HashOutput

Encode = Callable[[Tensor], HashOutput]
"""Hash inputs of the purifier's modality without it."""


class _ExchangedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor, source: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_gradient_of(values: Tensor, source: Tensor) -> Tensor:
    """``values`` bit for bit, with the gradient of ``source`` (BPDA, Athalye et al., ICML 2018).

    Raises:
        ValueError: tensors of different shapes, whose gradients would mean nothing.
    """
    if values.shape != source.shape:
        raise ValueError(f"values of {tuple(values.shape)} cannot take the gradient of {tuple(source.shape)}")
    return _ExchangedGradient.apply(values.detach(), source)


class Purifier(nn.Module, ABC):
    """Interface: inputs of one modality -> inputs of the same shape, before the encoder normalises them.

    It is part of the victim: attacks differentiate through it, and it is saved with the weights.
    ``Hasher.bare()`` is the victim without it, which only an *oblivious* attack differentiates. ``declares``
    is the defense class of a hasher that gets one and had none: ``purifier``, ``gate``, ``randomised``, or
    the name by which the purifier's file registers its own attacks as kind ``adaptive``.
    """

    declares: ClassVar[str] = "purifier"

    @abstractmethod
    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, ...) -> (B, ...), and entries such as a gate or a mask that join ``HashOutput.aux``."""


class ProxyBackward(Purifier):
    """A purifier's values with the gradient of another module, by default the identity (BPDA)."""

    def __init__(self, inner: nn.Module, proxy: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.proxy = nn.Identity() if proxy is None else proxy

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pure, aux = self.inner(x.clone(), encode)
        return with_gradient_of(pure, self.proxy(x)), aux
