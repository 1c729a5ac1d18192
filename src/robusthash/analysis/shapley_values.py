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
    many: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapley value of each player with its standard error.

    A permutation adds the players one by one and credits each with the change of ``value``; its reverse is
    taken with it, which cancels the interaction of pairs exactly (two players: exact). The credits of every
    permutation telescope, so the values sum to value(all) - value(none) to rounding, and a player that
    changes nothing gets 0 exactly. Castro, Gomez and Tejada, "Polynomial calculation of the Shapley value
    based on sampling", 2009.

    Args:
        value: (players,) bool mask of the coalition -> a number, or a tensor of one number per image. It must
            be deterministic.
        players: number of players, at least 1.
        permutations: even, at least 4; each costs ``players`` - 1 evaluations.
        many: ``value`` takes (S, players) masks at once and gives (S, *shape).
        progress: called with (permutations done, permutations) after each pair.

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
        raise ValueError(f"permutations must be even and at least 4 (two antithetic pairs): {permutations}")

    def worth(masks: Tensor) -> Tensor:
        values = value(masks) if many else torch.stack([torch.as_tensor(value(mask)) for mask in masks])
        return torch.as_tensor(values, dtype=torch.float64).cpu()

    ends = worth(torch.stack([torch.zeros(players, dtype=torch.bool), torch.ones(players, dtype=torch.bool)]))
    if not torch.isfinite(ends).all():
        raise ValueError("the value of the empty or of the full coalition is not finite")
    generator = draws.within("shapley").generator()
    pairs = []
    for done in range(2, permutations + 1, 2):
        order = torch.randperm(players, generator=generator)
        pairs.append((_credits(worth, order, ends) + _credits(worth, order.flip(0), ends)) / 2)
        if progress is not None:
            progress(done, permutations)
    credits = torch.stack(pairs)
    return credits.mean(0), credits.std(0) / len(pairs) ** 0.5


def _credits(worth: Callable[[Tensor], Tensor], order: Tensor, ends: Tensor) -> Tensor:
    """(players, *shape) change of value as each player joins in ``order``; ``ends`` is that of none and of
    all.
    """
    players = len(order)
    joined = torch.ones(players, players, dtype=torch.bool).tril()[:-1]  # (steps, places)
    masks = torch.zeros_like(joined)
    masks[:, order] = joined
    between = worth(masks) if players > 1 else ends[:0]
    steps = torch.cat([ends[:1], between, ends[1:]]).diff(dim=0)
    credits = torch.empty_like(steps)
    credits[order] = steps
    return credits
