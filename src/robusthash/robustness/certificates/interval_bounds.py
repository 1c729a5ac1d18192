"""Bounds of a hasher's logits over an L-inf ball of images, by interval bound propagation.

For small nets and small budgets: each layer is bounded by itself, so bounds grow with depth, and a net that
was not trained for them is soon left without a certified bit. ``auto_LiRPA``, which has tighter ones, needs
torch below 1.13.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.core.runtime import default_dtype
from robusthash.models.hasher import Hasher
from robusthash.robustness.certificates.interval_tensor import IntervalTensor

ROUNDING = 1e-4
"""Share of a query's largest logit by which a bound must clear zero: bounds are computed in float64, codes in
float32."""


class IntervalBounds:
    """Logit bounds of a hasher in eval mode, on a float64 copy of it.

    Args:
        modality: of the input that changes.
    """

    def __init__(self, hasher: Hasher, modality: str) -> None:
        self.hasher, self.modality = copy.deepcopy(hasher).double().eval(), modality
        self._inside: list[str] = []
        for name, module in self.hasher.named_modules():
            if name:
                self._follow(name, module)

    def _follow(self, name: str, module: nn.Module) -> None:
        """Know by name the layers that are being computed, so that a refusal can say which has no bound."""
        module.register_forward_pre_hook(lambda *_: self._inside.append(name))
        module.register_forward_hook(lambda *_: self._inside.pop() and None)

    def __call__(self, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(B, K) float64 lower and upper logits over all images within ``eps`` of these, in [0, 1].

        Raises:
            ValueError: a layer without a rule, by name.
        """
        images, self._inside = images.to(self.hasher.device, torch.float64), []
        box: Any = IntervalTensor((images - eps).clamp(min=0.0), (images + eps).clamp(max=1.0))
        try:
            with torch.inference_mode(), default_dtype(torch.float64):
                logits: Any = self.hasher({self.modality: box})[self.modality].logits
        except (TypeError, AttributeError) as error:
            layer = self._inside[-1] if self._inside else "the hasher"
            kind = type(self.hasher.get_submodule(layer)).__name__ if self._inside else "Hasher"
            remedy = "certify by smoothing, which works for any net"
            raise ValueError(f"no interval bounds through {layer} ({kind}): {error}; {remedy}") from None
        return logits.lower.cpu(), logits.upper.cpu()

    def free(self, images: Tensor, eps: float) -> Tensor:
        """(B, K) bool: the bits that are not proven to stay as they are within ``eps``."""
        lower, upper = self(images, eps)
        slack = ROUNDING * torch.maximum(lower.abs(), upper.abs()).amax(1, keepdim=True)
        return (lower <= slack) & (upper >= -slack)
