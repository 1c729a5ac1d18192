"""Shapley values of a set function, by sampled permutations in antithetic pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robusthash.core.runtime import Draws


def shapley(
    value: Callable[[Tensor], Tensor | float],
    players: int,
    permutations: int = 64,
    draws: Draws = Draws(0),
) -> tuple[Tensor, Tensor]:
    """Shapley value of each player with its standard error.

    A permutation adds the players one by one and credits each with the change of ``value``; its reverse is taken with
    it, which cancels the interaction of pairs exactly (two players: exact). The credits of every permutation telescope,
    so the values sum to value(all) - value(none) to rounding, and a player that changes nothing gets 0 exactly.
    Castro, Gomez and Tejada, "Polynomial calculation of the Shapley value based on sampling", 2009.

    Args:
        value: (players,) bool mask of the coalition -> a number, or a tensor of one number per image. It must be
            deterministic.
        players: number of players, at least 1.
        permutations: even, at least 4; each costs ``players`` - 1 evaluations.

    Returns:
        (players, *shape) values and standard errors, float64; the errors are those of the mean over pairs.

    Example:
        >>> worth = {(): 0.0, (0,): 1.0, (1,): 0.0, (0, 1): 3.0}
        >>> credit, error = shapley(lambda mask: worth[tuple(mask.nonzero().flatten().tolist())], players=2)
        >>> credit.tolist(), error.tolist()
        ([2.0, 1.0], [0.0, 0.0])
    """
    if players < 1:
        raise ValueError(f"players must be at least 1, got {players}")
    if permutations < 4 or permutations % 2:
        raise ValueError(f"permutations must be even and at least 4 (two antithetic pairs), got {permutations}")

    def worth(mask: Tensor) -> Tensor:
        return torch.as_tensor(value(mask), dtype=torch.float64).cpu()

    none = worth(torch.zeros(players, dtype=torch.bool))
    everyone = worth(torch.ones(players, dtype=torch.bool))
    if not (torch.isfinite(none).all() and torch.isfinite(everyone).all()):
        raise ValueError("the value of the empty or of the full coalition is not finite")
    generator = draws.within("shapley").generator()
    pairs = []
    for _ in range(permutations // 2):
        order = torch.randperm(players, generator=generator)
        pairs.append((_credits(worth, order, none, everyone) + _credits(worth, order.flip(0), none, everyone)) / 2)
    credits = torch.stack(pairs)
    return credits.mean(0), credits.std(0) / len(pairs) ** 0.5


def _credits(worth: Callable[[Tensor], Tensor], order: Tensor, none: Tensor, everyone: Tensor) -> Tensor:
    """(players, *shape) change of value as each player joins in ``order``."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    credits = torch.zeros(len(order), *none.shape, dtype=torch.float64)
    before = none
    for place, player in enumerate(order.tolist()):
        mask[player] = True
        after = everyone if place == len(order) - 1 else worth(mask.clone())
        credits[player] = after - before
        before = after
    return credits
