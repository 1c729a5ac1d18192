"""A search service as an attacker meets it: a counted number of oracle queries, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from robusthash.attacks.base import SearchResult
from robusthash.attacks.pgd import Best
from robusthash.attacks.threat_model import Threat
from robusthash.core.embeddings import Searched, distances, nearest
from robusthash.core.hamming import topk
from robusthash.core.types import Batch, Codes, Inputs
from robusthash.models.hasher import Hasher, frozen

QueryScore = Callable[[Inputs], Tensor]
"""One oracle query for each item of a block -> (B,) score of the answers, larger = better for the attack."""


class QueryOracle:
    """A victim and its database behind a counter: each row of a batch is one oracle query of its item.

    Args:
        victim: encodes the rows, of one modality.
        database: N codes, or float vectors, that are searched.
        budget: oracle queries of each item, at least 1.
        knowledge: ``B2`` answers with codes or distances; ``B1`` with the ordered ids of the top k alone.
        k: ids that ``rank`` returns.
    """

    def __init__(
        self,
        victim: Hasher,
        database: Searched,
        budget: int,
        knowledge: Literal["B2", "B1"] = "B2",
        k: int = 100,
    ) -> None:
        if budget < 1:
            raise ValueError(f"a budget of at least 1 oracle query for each item is needed, got {budget}")
        if knowledge not in ("B2", "B1"):
            raise ValueError(f"an oracle is B2 (codes or distances) or B1 (ordered ids), not {knowledge!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self._victim, self._database, self._k = victim, database, k
        self.budget, self.knowledge = budget, knowledge
        self._used: Counter[int] = Counter()

    def used(self, ids: Tensor) -> Tensor:
        """(B,) int64: oracle queries of each of these items so far."""
        return torch.tensor([self._used[item] for item in ids.tolist()], dtype=torch.int64)

    def codes(self, batch: Batch) -> Searched:
        """B2: the code (or vector) of each row; refused (and not counted) at B1 or once a budget is spent."""
        self._only_b2("codes")
        return self._answer(batch)

    def distances(self, batch: Batch) -> Tensor:
        """B2: (B, N) distances of each row to every item, int32 bits or float64; errors as of ``codes``."""
        self._only_b2("distances")
        return distances(self._answer(batch), self._database)

    def rank(self, batch: Batch) -> Tensor:
        """(B, k) int64 ids of the nearest items by (distance, id), all that B1 shows; -1 fills up."""
        answer = self._answer(batch)
        if isinstance(answer, Codes) and isinstance(self._database, Codes):
            return topk(answer.packed, self._database.packed, self._k, self._database.ids)[0]
        ids = self._database.ids[nearest(answer, self._database, self._k)[0]]
        return pad(ids, (0, self._k - ids.shape[1]), value=-1)

    def _only_b2(self, answer: str) -> None:
        if self.knowledge != "B2":
            raise ValueError(
                f"a {self.knowledge} oracle shows the ordered ids alone, no {answer}; use 'rank'"
            )

    def _answer(self, batch: Batch) -> Searched:
        if len(batch.inputs) != 1:
            raise ValueError(f"an oracle query has one modality, not {sorted(batch.inputs)}; use Batch.only")
        after = self._used + Counter(batch.ids.tolist())
        for item in batch.ids.tolist():
            if after[item] > self.budget:
                raise ValueError(
                    f"query {item} has used its budget of {self.budget} oracle queries; raise the budget, or "
                    "stop there"
                )
        self._used = after
        with frozen(self._victim), torch.no_grad():
            (output,) = self._victim(batch.inputs).values()
        answer = self._database.of(self._victim.compared(output.logits))
        return replace(answer, ids=batch.ids.cpu())


def ids_lost(clean: Tensor, attacked: Tensor, weighted: bool = True) -> Tensor:
    """(B,) float64 share of the clean top k that a query has lost, from ordered ids alone.

    1 - sum_i w(r_i) w(r'_i) / sum_r w(r)^2 over the items i that both lists hold, at ranks r and r'; the rank
    weight w(r) = 1 / log2(1 + r) is that of DCG, or 1 throughout, which gives the plain overlap. Ours.

    Args:
        clean, attacked: (B, k) int64 ids that the clean and the changed query returned; -1 is no item.
    """
    ranks = torch.arange(1, clean.shape[1] + 1, dtype=torch.float64)
    weight = 1.0 / torch.log2(1.0 + ranks) if weighted else torch.ones_like(ranks)
    real = (clean >= 0).to(torch.float64)
    shared = torch.zeros(len(clean), dtype=torch.float64)
    for place in range(clean.shape[1]):  # by rank, so that no (B, k, k) array is made
        same = (attacked == clean[:, place, None]).to(torch.float64) @ weight
        shared += real[:, place] * weight[place] * same
    return 1.0 - shared / (real @ weight.square()).clamp_min(1e-12)


@dataclass
class QuerySession:
    """Oracle queries of one block, in step: feasible points alone, counted, with the best of each item."""

    ask: QueryScore
    batch: Batch
    threat: Threat
    budget: int
    marks: tuple[int, ...] = ()
    used: int = field(default=0, init=False)
    best_after: dict[int, Inputs] = field(default_factory=dict, init=False)
    _best: Best | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if len(self.threat.balls) != 1:
            raise ValueError(f"oracle queries search one modality at a time, not {self.threat.name}")
        if self.budget < 1:
            raise ValueError(f"a search by oracle queries needs a budget of at least 1, got {self.budget}")
        if any(not 1 <= mark <= self.budget for mark in self.marks):
            raise ValueError(f"marks lie in 1..{self.budget}, the budget, got {list(self.marks)}")

        ((self.modality, self.ball),) = self.threat.balls.items()
        self.origin = self.batch.inputs[self.modality]

    @property
    def left(self) -> int:
        """Oracle queries that each item may still use."""
        return self.budget - self.used

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The best point of each item so far, and its (B,) score."""
        if self._best is None:
            raise ValueError("there was no oracle query yet")
        return self._best.inputs[self.modality], self._best.value

    def __call__(self, x: Tensor) -> Tensor:
        """One oracle query for each item, at the feasible point ``x``; (B,) scores."""
        inputs = {self.modality: x}
        value = self.ask(inputs)
        self.used += 1
        if self._best is None:
            self._best = Best(value, inputs)
        else:
            self._best.offer(value, inputs)
        if self.used in self.marks:
            self.best_after[self.used] = dict(self._best.inputs)
        return value

    def feasible(self, x: Tensor) -> Tensor:
        """``x`` brought back into the budget of the threat."""
        return self.ball.project(x, self.origin)

    def result(self) -> SearchResult:
        """The outcome; a search that ended early has its last best under every later mark."""
        x, value = self.best
        inputs = {self.modality: x}
        best_after = {mark: self.best_after.get(mark, inputs) for mark in self.marks}
        return SearchResult(
            inputs, torch.empty(0), oracle_queries=self.used, best_after=best_after, score=value
        )
