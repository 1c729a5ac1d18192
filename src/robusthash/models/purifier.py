"""What stands before an encoder and repairs its input: the interface of gates, generators and input
transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robusthash.core.types import HashOutput

Encode = Callable[[Tensor], HashOutput]
"""Hash inputs of the purifier's modality without it."""


class _Carried(torch.autograd.Function):
    """Values of one tensor, gradients of another."""

    @staticmethod
    def forward(ctx: object, values: Tensor, carrier: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def carried(values: Tensor, carrier: Tensor) -> Tensor:
    """``values`` bit for bit, with the gradient of ``carrier`` (BPDA, Athalye et al., ICML 2018).

    Raises:
        ValueError: tensors of different shapes, whose gradients would mean nothing.
    """
    if values.shape != carrier.shape:
        raise ValueError(
            f"values of {tuple(values.shape)} cannot take the gradient of {tuple(carrier.shape)}"
        )
    return _Carried.apply(values.detach(), carrier)


class Purifier(nn.Module, ABC):
    """Interface: inputs of one modality -> inputs of the same shape, before the encoder (and its
    normalisation).

    It is part of the victim: attacks differentiate through it, and it is saved with the weights.
    ``Hasher.bare()`` is the victim without it, which only an *oblivious* attack differentiates. ``declares``
    is the defense class that it makes of a hasher which had none of its own.
    """

    declares: ClassVar[Literal["gate", "purifier", "randomised"]] = "purifier"

    @abstractmethod
    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, ...) -> (B, ...) and what it shows (a gate, a mask), which joins ``HashOutput.aux``."""


class IdentityBackward(Purifier):
    """A purifier whose gradient is taken to be the identity (BPDA), for adaptive attacks on one that hides
    its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pure, shown = self.inner(x, encode)
        return carried(pure, x), shown
