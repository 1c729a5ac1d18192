"""TPAP's purifier: each query is moved one signed step away from the code that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.models.purifier import Encode, Purifier, with_gradient_of

EPS = {"image": 8 / 255, "text": 0.05}


class StepAway(Purifier):
    """P(x) = clamp(x - eps sgn grad_x (1/K) sgn(u(x)) . tanh u(x)), u the logits of the bare hasher.

    Always in the hasher's eval mode. Attackers differentiate it: the sign of the slope s has the
    gradient of tanh(s / mean |s|), so the white box goes through the inner gradient too (second derivatives);
    ``RepairIdentity`` takes it for the identity.

    Args:
        eps: length of the step, above 0.

    Cost: a query costs two forward passes and a backward pass more than the bare hasher's one.
    Differs: the paper steps away from the predicted class, argmax f(x), of a classifier; there are no classes
    here, so the step leaves the query's own binary code, sgn u(x).
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        if not 0.0 < eps <= 1.0:
            raise ValueError(f"eps is a length above 0 and at most 1, the range of the inputs, got {eps:g}")
        self.eps = eps

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        if not x.is_floating_point():
            raise ValueError("TPAP steps along a gradient, which token ids do not have; use bags of words")
        attacked = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            here = x if attacked else x.clone().requires_grad_(True)
            logits = encode(here).logits
            agreement = (torch.tanh(logits) * sign(logits.detach())).mean(1).sum()
            (slope,) = torch.autograd.grad(agreement, here, create_graph=attacked)
        step = slope.sign()
        if attacked:
            scale = slope.detach().abs().flatten(1).mean(1).clamp_min(1e-30)
            step = with_gradient_of(step, torch.tanh(slope / scale.view(-1, *[1] * (x.dim() - 1))))
        return (x - self.eps * step).clamp(0.0, 1.0), {}


@register(
    "purifier",
    "tpap-image",
    paper="Tang & Zhang, CVPR 2024",
    evidence="reconstruction",
    modality="image",
    state="measured",
)
class ImageStepAway(StepAway):
    """TPAP before the image encoder: one step of 8/255 away from the query's own code."""

    def __init__(self, eps: float = EPS["image"]) -> None:
        super().__init__(eps)


@register(
    "purifier",
    "tpap-text",
    paper="Tang & Zhang, CVPR 2024",
    evidence="reconstruction",
    modality="text",
    state="measured",
)
class TextStepAway(StepAway):
    """TPAP before the text encoder: one step of 0.05 a word of the bag away from the query's own code."""

    def __init__(self, eps: float = EPS["text"]) -> None:
        super().__init__(eps)
