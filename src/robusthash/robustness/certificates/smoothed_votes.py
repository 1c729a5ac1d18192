"""Votes for the bits of a smoothed code: how often each is +1 under keyed Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.surrogate_gradients import keyed_noise


def noise_votes(
    hasher: Hasher,
    modality: str,
    inputs: Tensor,
    keys: Sequence[str],
    sigma: float,
    samples: int,
    draws: Draws,
    at_once: int = 256,
) -> Tensor:
    """(B, K) int64 number of samples, of ``samples`` under N(0, sigma^2 I), in which each bit is +1.

    Args:
        hasher: the base hasher; its own noise, where it draws some, is part of what the majority is over.
        inputs: (B, ...).
        keys: of each item, such as the hash of its content: with ``draws`` they alone choose its noise.
        at_once: samples encoded at a time; they change numbers by float rounding alone.
    """
    votes = torch.zeros(len(inputs), hasher.bits, dtype=torch.int64)
    with frozen(hasher), torch.inference_mode():
        for row, key in enumerate(keys):
            scope = draws.within(key)
            generator = scope.generator()
            with keyed_noise(scope.within("own").key(), hasher.device):
                for count in _parts(samples, at_once):
                    noise = torch.randn(count, *inputs.shape[1:], generator=generator)
                    noisy = inputs[row : row + 1].to(hasher.device) + sigma * noise.to(hasher.device)
                    signs = hasher.compared(hasher({modality: noisy})[modality].logits)
                    votes[row] += (signs > 0).sum(0).cpu()
    return votes


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
