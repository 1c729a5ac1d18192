"""The budget of token substitutions: a few tokens of a text changed, each for one of a fixed list of
neighbours."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robusthash.core.runtime import Draws

_ROWS = 1024  # tokens compared with all others at a time


class Candidates:
    """For each token of a vocabulary the tokens that may stand in its place; its own id where nothing may.

    Args:
        table: (V, k) int64; row v holds the candidates of token v.
    """

    def __init__(self, table: Tensor) -> None:
        if table.ndim != 2 or table.dtype != torch.int64 or table.shape[1] < 1:
            raise ValueError(f"candidates are (V, k) int64 token ids, got {table.dtype} {tuple(table.shape)}")
        self.table = table.cpu()
        self.digest = hashlib.sha256(self.table.numpy().tobytes()).hexdigest()[:12]

    def of(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, k) what may stand in the place of each.

        Raises:
            ValueError: an id beyond the vocabulary.
        """
        if len(ids) and int(ids.max()) >= len(self.table):
            raise ValueError(
                f"token id {int(ids.max())} has no candidates, which were made for a vocabulary of {len(self.table)}; "
                "fit the attack to the victim that these texts belong to"
            )
        return self.table.to(ids.device)[ids]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidates) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest, 16)

    def __repr__(self) -> str:
        return f"Candidates({len(self.table)} tokens, {self.table.shape[1]} each, {self.digest})"


def nearest_tokens(embedding: Tensor, usable: Tensor, k: int = 8) -> Candidates:
    """The ``k`` nearest usable tokens of each usable token, by cosine in an embedding table; ties go to the
    lower id.

    Args:
        embedding: (V, D) the model's own table.
        usable: (V,) bool; the others (padding, [CLS], [SEP], tokens of no text) are neither replaced nor put
            in.
        k: candidates of each token.

    Raises:
        ValueError: k below 1, or fewer than k + 1 usable tokens.
    """
    count = int(usable.sum())
    if not 1 <= k < count:
        raise ValueError(
            f"{k} candidates for each token need more than {max(k, 1)} usable tokens, and there are {count}"
        )
    unit = torch.nn.functional.normalize(embedding.detach().to("cpu", torch.float64), dim=1)
    ids = torch.nonzero(usable.cpu()).flatten()
    table = torch.arange(len(embedding))[:, None].repeat(1, k)
    for rows in ids.split(_ROWS):
        alike = unit[rows] @ unit[ids].T
        alike[rows[:, None] == ids[None]] = -torch.inf
        table[rows] = ids[alike.argsort(dim=1, descending=True, stable=True)[:, :k]]
    return Candidates(table)


@dataclass(frozen=True)
class Swaps:
    """At most so many tokens of a text changed, each for one of its candidates. Special tokens and padding
    stay.

    Args:
        eps: m, tokens that may change; of a fraction, as scaling a threat makes it, the whole part counts.
        k: candidates of each token: the nearest of the victim's own embedding table.
        candidates: None until the attack is fitted to a victim.

    Raises:
        ValueError: m below 0, or k below 1.
    """

    eps: float = 2
    k: int = 8
    candidates: Candidates | None = None
    norm: ClassVar[Literal["swaps"]] = "swaps"
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"a budget of swaps is a number of tokens, at least 0, got {self.eps!r}")
        if self.k < 1:
            raise ValueError(f"each token needs at least 1 candidate, got {self.k}")

    @property
    def count(self) -> int:
        """Tokens that may change."""
        return int(self.eps + 1e-9)

    def allowed(self, origin: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, k) candidates.

        Raises:
            ValueError: texts that are no token ids, or an attack that was not fitted.
        """
        if origin.ndim != 2 or origin.dtype != torch.int64:
            raise ValueError(
                f"token swaps need texts as (B, L) int64 token ids, got {origin.dtype} {tuple(origin.shape)}; "
                "set texts: tokens for the data, or use 'text-edits' on bags of words"
            )
        if self.candidates is None:
            raise ValueError(
                "the candidates of each token are not known yet; fit the attack to the victim first"
            )
        return self.candidates.of(origin)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """What is no candidate goes back; of the rest the first m of each text stay."""
        fine = (x != origin) & (self.allowed(origin) == x[:, :, None]).any(2)
        return torch.where(fine & (fine.cumsum(1) <= self.count), x, origin)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """m tokens that have candidates changed for one of them, drawn by item."""
        allowed = self.allowed(origin)
        free = (allowed != origin[:, :, None]).any(2)
        places = draws.uniform(ids, (origin.shape[1],)).masked_fill(~free, 2.0)
        order = places.argsort(dim=1, stable=True)[:, : self.count]
        chosen = torch.zeros_like(free).scatter_(1, order, True) & free
        pick = (draws.within("candidate").uniform(ids, (origin.shape[1],)) * allowed.shape[2]).long()
        return torch.where(chosen, allowed.gather(2, pick[:, :, None])[:, :, 0], origin)

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        raise ValueError("a budget of swaps has no steepest step; use the search 'greedy-swaps'")

    def details(self) -> dict[str, Any]:
        """What beside norm and eps makes it."""
        return {"k": self.k, "candidates": None if self.candidates is None else self.candidates.digest}

    def size(self, delta: Tensor) -> Tensor:
        """(B,) number of tokens that differ."""
        return (delta != 0).flatten(1).sum(1).float()

    def check(self, x: Tensor, origin: Tensor) -> None:
        """Raise where a token was changed for one that is no candidate of it."""
        strange = (x != origin) & ~(self.allowed(origin) == x[:, :, None]).any(2)
        if strange.any():
            row, place = torch.nonzero(strange)[0].tolist()
            raise ValueError(
                f"the attacked text {row} has token {int(x[row, place])} at place {place}, which is no candidate of "
                f"{int(origin[row, place])}"
            )
