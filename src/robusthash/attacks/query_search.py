"""Searches by oracle queries: random squares, estimated gradients, random points, and words by trial.

Each takes a ``QuerySession`` in which the clean inputs were queried first, and goes on until the budget is
spent, one oracle query for every item of the block at a time. Draws are keyed by item: neither batch size nor
order matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from robusthash.attacks.base import SearchResult, Start
from robusthash.attacks.budgets import Ball, Edits, per_item
from robusthash.attacks.oracle import QueryScore, QuerySession
from robusthash.attacks.threat_model import Threat
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch


class QuerySearch(Protocol):
    """Spends the oracle queries of a session."""

    def __call__(self, session: QuerySession, draws: Draws) -> None: ...


def search_by_queries(
    search: QuerySearch,
    ask: QueryScore,
    batch: Batch,
    threat: Threat,
    draws: Draws,
    budget: int,
    start: Start = None,
    marks: tuple[int, ...] = (),
) -> SearchResult:
    """Query the clean inputs, ``start`` where one is given, and then as ``search`` decides.

    Args:
        ask: one oracle query for each item; (B,) scores of the answers, larger = better for the attacker.
        budget: oracle queries of each item in all, the clean one among them.
        start: feasible inputs, such as the solution at a smaller eps.
        marks: numbers of oracle queries after which the best so far is recorded.

    Raises:
        ValueError: a budget below 1, a mark outside it, several modalities, or a threat that the search
            cannot do.
    """
    session = QuerySession(ask, batch, threat, budget, marks)
    session(session.origin)
    if start is not None and session.left:
        session(session.feasible(start[session.modality]))
    search(session, draws)
    return session.result()


def _ball(session: QuerySession, name: str) -> Ball:
    if not isinstance(session.ball, Ball):
        other = "use 'greedy-words' or 'random-points'"
        raise ValueError(f"{name} searches norm balls, not {session.threat.name}; {other}")
    return session.ball


def _as_maps(x: Tensor) -> Tensor:
    """(B, C, H, W) as it is; vectors (B, D) as one row of one channel, (B, 1, 1, D)."""
    return x if x.dim() == 4 else x.reshape(len(x), 1, 1, -1)


Step = tuple[Callable[[Tensor], Tensor], Tensor]
"""The changed perturbation as a function of the signs of its square, and the signs drawn for it."""

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 oracle queries


def square_share(initial: float, progress: float) -> float:
    """Share of the pixels in a square after a share ``progress`` of the budget (the authors' schedule)."""
    return initial * 0.5 ** sum(progress * 10_000 > at for at in _HALVINGS)


_SQUARE = "Andriushchenko et al., ECCV 2020; Croce & Hein, ICML 2020"


@register("question-search", "square", paper=_SQUARE, evidence="paper+code")
@dataclass(frozen=True)
class Square:
    """Square attack: each oracle query changes one random square, accepted where the answer is no worse.

    ``linf``: the pixels of the square go to the corner +-eps of the ball, one sign for each channel; it
    starts with vertical stripes. ``l2``: the norm of a second square is moved into the first, in the shape of
    two opposite bumps; it starts with a tiling of bumps. Of vectors, which have no squares, a random set of
    entries is changed.

    Args:
        share: of the pixels that the first squares cover (0.8 as in AutoAttack; halved by the schedule).

    Differs: equal answers are accepted, because codes answer in steps and a plateau must be crossed; a draw
    that would change nothing is negated; starts from the best of the clean point, a given start and the
    pattern; the squares of ``l2`` are drawn for each item and need not be odd.
    """

    share: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")

    def __call__(self, session: QuerySession, draws: Draws) -> None:
        ball = _ball(session, "the square attack")
        if ball.norm == "l1":
            raise ValueError("the square attack has patterns for linf and l2; take estimated gradients")
        origin, ids = session.origin, session.batch.ids
        if session.left:
            session(session.feasible(origin + _pattern(origin, ids, ball, draws.within("square", "pattern"))))
        x, value = session.best
        step = _corner_step if ball.norm == "linf" else _bump_step
        while session.left:
            share = square_share(self.share, session.used / session.budget)
            scope = draws.within("square", session.used)
            delta, sign = step(_as_maps(x - origin), ids, ball.eps, share, scope)
            candidate = session.feasible(origin + delta(sign).view_as(origin))
            same = (candidate == x).flatten(1).all(1)
            if same.any():
                negated = session.feasible(origin + delta(-sign).view_as(origin))
                candidate = torch.where(per_item(same, x), negated, candidate)
            reached = session(candidate)
            better = reached >= value
            value = torch.where(better, reached, value)
            x = torch.where(per_item(better, x), candidate, x)


def _signs(numbers: Tensor, like: Tensor) -> Tensor:
    return torch.where(numbers < 0.5, -1.0, 1.0).to(like.dtype)


def _window(shape: torch.Size, side: int, ids: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Rows (B, H) and columns (B, W) counted from the corner of a random square of each item."""
    height, width = shape[-2:]
    place = draws.uniform(ids, (2,))
    top = (place[:, 0] * (height - min(side, height) + 1)).long()
    left = (place[:, 1] * (width - min(side, width) + 1)).long()
    rows = torch.arange(height, device=ids.device) - top[:, None]
    columns = torch.arange(width, device=ids.device) - left[:, None]
    return rows, columns


def _covered(shape: torch.Size, share: float, side: int, ids: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(B, 1, H, W) bool window of each item, and the bump of unit norm in it, 0 outside."""
    if shape[-2] == 1:  # a vector: neighbours mean nothing, so a random set of entries
        values = draws.uniform(ids, (1, 1, shape[-1]))
        inside = values <= torch.maximum(values.amin(3, keepdim=True), torch.tensor(share, device=ids.device))
        return inside, inside / inside.sum(3, keepdim=True).sqrt()
    rows, columns = _window(shape, side, ids, draws)
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    table = _two_bumps(side).to(ids.device)
    upright = draws.within("turn").uniform(ids, (1, 1)) < 0.5
    row, column = rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]
    bump = torch.where(upright, table[row, column], table[column, row])
    return inside[:, None], (bump * inside)[:, None]


def _bump(rows: int, columns: int) -> Tensor:
    """Nested rectangles: sum over c >= d of 1 / (c + 1)^2 at Chebyshev distance d from the centre."""
    reach = max(rows // 2, columns // 2) + 1
    tail = (1.0 / torch.arange(1, reach + 1, dtype=torch.float64).square()).flip(0).cumsum(0).flip(0)
    row, column = (torch.arange(rows) - rows // 2).abs(), (torch.arange(columns) - columns // 2).abs()
    return tail[torch.maximum(row[:, None], column[None])]


def _two_bumps(side: int) -> Tensor:
    """(side, side) of unit norm: one bump in the upper half, its opposite in the lower."""
    if side == 1:
        return torch.ones(1, 1)
    upper, lower = _bump(side // 2, side), _bump(side - side // 2, side)
    both = torch.cat([upper / upper.norm(), -lower / lower.norm()])
    return (both / both.norm()).float()


def _pattern(origin: Tensor, ids: Tensor, ball: Ball, draws: Draws) -> Tensor:
    """First point: stripes at the corners of the ball (``linf``), tiles of bumps on its sphere (``l2``)."""
    maps = _as_maps(origin)
    channels, height, width = maps.shape[1:]
    if ball.norm == "linf":
        stripes = _signs(draws.uniform(ids, (channels, 1, width)), maps) * ball.eps
        return stripes.expand_as(maps).reshape(origin.shape)
    tile = max(1, height // 5)
    down, across = -(-height // tile), -(-width // tile)
    signs = _signs(draws.uniform(ids, (channels, down, across)), maps)
    bumps = _two_bumps(tile).to(maps).repeat(down, across)[:height, :width]
    spread = signs.repeat_interleave(tile, 2).repeat_interleave(tile, 3)[..., :height, :width] * bumps
    return (ball.eps * spread / spread.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).reshape(origin.shape)


def _side(shape: torch.Size, share: float, least: int) -> int:
    """Pixels a side of a square that covers ``share`` of the image, and fits into it."""
    return min(max(round(math.sqrt(share * shape[-2] * shape[-1])), least), *shape[-2:])


def _corner_step(delta: Tensor, ids: Tensor, eps: float, share: float, draws: Draws) -> Step:
    """The change with one square at a corner of the ball, as a function of its signs, and drawn signs."""
    inside, _ = _covered(delta.shape, share, _side(delta.shape, share, 1), ids, draws)
    sign_shape = (delta.shape[1], 1, 1) if delta.shape[2] > 1 else tuple(delta.shape[1:])
    signs = _signs(draws.within("signs").uniform(ids, sign_shape), delta)
    return (lambda sign: torch.where(inside, eps * sign, delta)), signs


def _bump_step(delta: Tensor, ids: Tensor, eps: float, share: float, draws: Draws) -> Step:
    """The change with the norm of a second square moved into a first, as a function of the bumps' signs."""
    side = _side(delta.shape, share, 3)
    inside, bump = _covered(delta.shape, share, side, ids, draws.within("to"))
    source, _ = _covered(delta.shape, share, side, ids, draws.within("from"))
    held = (delta * inside).square().sum((2, 3), keepdim=True).sqrt()
    both = (delta * (inside | source)).square().sum((2, 3), keepdim=True)
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0) / delta.shape[1]
    sign_shape = (delta.shape[1], 1, 1) if delta.shape[2] > 1 else tuple(delta.shape[1:])
    signs = _signs(draws.within("signs").uniform(ids, sign_shape), delta)

    def moved(sign: Tensor) -> Tensor:
        shape = bump.to(delta.dtype) * sign + delta * inside / (held + 1e-10)
        shape = shape / shape.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
        whole = torch.where(inside, shape * (both + unused).sqrt(), torch.where(source, 0.0, delta))
        return eps * whole / whole.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

    return moved, signs


@register("question-search", "nes", paper="Ilyas et al., ICML 2018; Spall 1992", evidence="paper")
@dataclass(frozen=True)
class NES:
    """Estimate the gradient of the score from pairs of opposite points, and step along it.

    g = sum_i (s(x + sigma d_i) - s(x - sigma d_i)) d_i, then steps of the norm's steepest direction with
    momentum.

    Args:
        pairs: of opposite points in one estimate; 2 pairs + 1 oracle queries a step.
        sigma: reach of a pair, as a share of eps.
        step: as a share of eps.
        momentum: decay of the estimates.
        directions: ``gaussian`` (NES), or ``signs`` of +-1 (SPSA).

    Differs: sigma is half the budget (0.001 in the paper), since a binary code answers small changes with
    silence; all points are projected before they are queried, and the best of them is returned.
    """

    pairs: int = 10
    sigma: float = 0.5
    step: float = 0.25
    momentum: float = 0.9
    directions: Literal["gaussian", "signs"] = "gaussian"

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")
        if not self.sigma > 0 or not self.step > 0:
            raise ValueError(f"sigma and step are shares of eps above 0, got {self.sigma} and {self.step}")
        if self.directions not in ("gaussian", "signs"):
            raise ValueError(f"directions must be 'gaussian' or 'signs', got {self.directions!r}")

    def __call__(self, session: QuerySession, draws: Draws) -> None:
        ball = _ball(session, "NES")
        x, _ = session.best
        speed = torch.zeros_like(x)
        while session.left >= 2:
            scope = draws.within("nes", session.used)
            grad = torch.zeros_like(x)
            for number in range(min(self.pairs, session.left // 2)):
                away = self._direction(x, session.batch.ids, ball, scope.within(number))
                higher, lower = session(session.feasible(x + away)), session(session.feasible(x - away))
                grad += per_item((higher - lower).to(x.dtype), x) * away
            size = per_item(grad.abs().flatten(1).mean(1).clamp_min(1e-12), x)
            speed = self.momentum * speed + grad / size
            x = session.feasible(x + self.step * ball.eps * ball.steepest(speed))
            if session.left:
                session(x)

    def _direction(self, x: Tensor, ids: Tensor, ball: Ball, draws: Draws) -> Tensor:
        numbers = draws.uniform(ids, x.shape[1:]).to(x.dtype)
        if self.directions == "signs":
            away = _signs(numbers, x)
        else:  # the middle of each of the 2^24 cells, so that none is at infinity
            away = math.sqrt(2.0) * torch.erfinv(2.0 * (numbers + 2.0**-25).clamp_max(1 - 2.0**-24) - 1.0)
        if ball.norm != "linf":
            away = away / per_item(ball.size(away).clamp_min(1e-12), x)
        return self.sigma * ball.eps * away


@register("question-search", "random-points")
@dataclass(frozen=True)
class RandomPoints:
    """The best of independent random points: noise, and for bags of words random edits of m words.

    Args:
        shape: ``uniform`` in the ball, or ``corner``: every entry at +-eps (``linf``), a random direction of
            length eps (``l2``). Edits are always exactly m words.
    """

    shape: Literal["uniform", "corner"] = "uniform"

    def __post_init__(self) -> None:
        if self.shape not in ("uniform", "corner"):
            raise ValueError(f"shape must be 'uniform' or 'corner', got {self.shape!r}")

    def __call__(self, session: QuerySession, draws: Draws) -> None:
        origin, ids, ball = session.origin, session.batch.ids, session.ball
        while session.left:
            scope = draws.within("random-points", session.used)
            if self.shape == "uniform" or isinstance(ball, Edits):
                session(ball.random_start(origin, ids, scope))
            else:
                noise = 2.0 * scope.uniform(ids, origin.shape[1:]).to(origin.dtype) - 1.0
                session(ball.project(origin + ball.eps * ball.steepest(noise), origin))


@register("question-search", "greedy-words", modality="text")
@dataclass(frozen=True)
class GreedyWords:
    """One word a round: many single insertions and removals are queried, the best is taken unless it harms.

    The budget is shared out evenly over the m rounds. Each round tries the removal of every word that the
    text holds, in random order, and then random insertions. Greedy, so a lower bound on what m edits can do.
    """

    def __call__(self, session: QuerySession, draws: Draws) -> None:
        if not isinstance(session.ball, Edits):
            raise ValueError(f"greedy-words edits bags of words, not {session.threat.name}; use 'square'")
        x, value = session.best
        origin, ids = session.origin, session.batch.ids
        rows = torch.arange(len(x), device=x.device)
        rounds = min(session.ball.count, x.shape[1])
        for number in range(rounds):
            tries = min(session.left // (rounds - number), x.shape[1])
            order = draws.within("words", number).uniform(ids, (x.shape[1],)) - x.float()  # own words first
            order = order.masked_fill(x != origin, 2.0)  # what is edited stays so
            best, highest = x, torch.full_like(value, -torch.inf)
            for column in order.argsort(dim=1, stable=True)[:, :tries].T:
                flipped = x.clone()
                flipped[rows, column] = 1.0 - flipped[rows, column]
                reached = session(session.feasible(flipped))
                better = reached > highest
                highest = torch.where(better, reached, highest)
                best = torch.where(better[:, None], flipped, best)
            accept = highest >= value  # an edit that changes nothing may prepare the next one
            x, value = torch.where(accept[:, None], best, x), torch.where(accept, highest, value)
