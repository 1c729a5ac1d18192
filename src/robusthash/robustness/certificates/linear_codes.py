"""A bound on the bits that a change within an L-inf ball can flip, for codes that are linear in the pixels.

Ours. Bits of one row of weights share a component of the image: they are thresholds of it. A change d
moves component i by s_i = w_i d, by at most eps |w_i|_1; and over all components at once, for any positive
pixel weights v, sum_i (c_i s_i)^2 <= L eps^2 |v|^2, where c_i = 1 / |w_i / v| and L is the largest eigenvalue
of the Gram matrix of the rows c_i w_i / v, 1 where these are orthogonal. To flip k thresholds of a component
costs the square of its distance to the k-th. The most flips under that budget are a knapsack, bounded by its
Lagrangian.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PRICES = torch.logspace(-2, 4, 150, dtype=torch.float64)  # of the whole budget, in bits
_ROUNDING = 1e-4  # share of an image's largest logit: bounds are of float64, codes of float32


def most_flips(weights: Tensor, logits: Tensor, eps: float, pixel_weights: Tensor) -> Tensor:
    """(N,) an upper bound on the bits of each code that some change within ``eps`` of every pixel flips.

    Args:
        weights: (K, P) of the linear codes; rows that are equal are thresholds of one component.
        logits: (N, K) of the unchanged images.
        eps: L-infinity, in units of the pixels.
        pixel_weights: (P,) positive; the bound holds for any, and is tight where the rows of ``weights``
            divided by them are orthogonal.

    Raises:
        ValueError: pixel weights that are not positive, or of another number.
    """
    if pixel_weights.shape != weights.shape[1:] or not bool((pixel_weights > 0).all()):
        raise ValueError(f"pixel_weights are {weights.shape[1]} positive numbers")
    rows, component = torch.unique(weights.double(), dim=0, return_inverse=True)
    scaled = rows / pixel_weights
    scales = 1 / scaled.norm(dim=1)
    unit = scaled * scales[:, None]
    largest = torch.linalg.eigvalsh(unit @ unit.T)[-1]
    budget = (largest * eps**2 * pixel_weights.double().square().sum()).clamp_min(1e-300)
    flips = _PRICES[:, None].expand(-1, len(logits)).clone()
    for number, (row, scale) in enumerate(zip(rows, scales, strict=True)):
        distances = _distances(logits.double(), component == number)
        costs = distances.square() * scale**2 / budget
        costs = costs.masked_fill(distances > eps * row.abs().sum(), torch.inf)
        count = torch.arange(costs.shape[1])  # of bits flipped, for these costs
        flips += (count - _PRICES[:, None, None] * costs).amax(2)
    return flips.amin(0).floor().long()


def _distances(logits: Tensor, component: Tensor) -> Tensor:
    """(N, K_i + 1) distance to pass 0, 1, 2, ... thresholds of a component, up or down, whichever is less."""
    nearest = logits.abs() - _ROUNDING * logits.abs().amax(1, keepdim=True)
    nearest = nearest.clamp(min=0.0)[:, component]
    below = (logits <= 0)[:, component]  # thresholds that a move up passes
    up, down = (nearest.masked_fill(~passed, torch.inf).sort(1).values for passed in (below, ~below))
    return torch.cat([torch.zeros(len(logits), 1, dtype=torch.float64), torch.minimum(up, down)], 1)
