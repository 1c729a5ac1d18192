"""A search service as an attacker meets it: it answers questions, a counted number of them, and shows nothing
else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robusthash.attacks.pgd import _Best
from robusthash.attacks.threat_model import Budget, Threat
from robusthash.core.hamming import distance, pack, sign, topk
from robusthash.core.types import Batch, Codes, Inputs
from robusthash.models.hasher import Hasher, frozen

Progress = Literal["B2", "B1"]

Ask = Callable[[Inputs], Tensor]
"""Inputs of a block of queries -> (B,) score of the answers, larger = better for the attacker; one question
each."""


class QueryOracle:
    """A victim and its database behind a counter. Each row of a batch is one question of the query with its
    id.

    Args:
        victim: encodes each question, of one modality.
        database: what is searched: N codes.
        budget: questions that each query may ask, at least 1.
        knowledge: ``B2`` answers with codes or distances; ``B1`` with the ordered ids of the top k alone.
        k: ids that ``rank`` returns.

    Raises:
        ValueError: a budget or k below 1, or another knowledge.
    """

    def __init__(
        self, victim: Hasher, database: Codes, budget: int, knowledge: Progress = "B2", k: int = 100
    ) -> None:
        if budget < 1:
            raise ValueError(f"an oracle needs a budget of at least 1 question for each query, got {budget}")
        if knowledge not in ("B2", "B1"):
            raise ValueError(f"an oracle is B2 (codes or distances) or B1 (ordered ids), not {knowledge!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self._victim, self._database, self._k = victim, database, k
        self.budget, self.knowledge = budget, knowledge
        self._asked: dict[int, int] = {}

    def asked(self, ids: Tensor) -> Tensor:
        """(B,) int64: questions that each of these queries has asked so far."""
        return torch.tensor([self._asked.get(query, 0) for query in ids.tolist()], dtype=torch.int64)

    def codes(self, batch: Batch) -> Codes:
        """B2: the code of each row.

        Raises:
            ValueError: a B1 oracle, or a query whose budget is spent; nothing is then counted.
        """
        self._only_b2("codes")
        return self._answer(batch)

    def distances(self, batch: Batch) -> Tensor:
        """B2: (B, N) int32 Hamming distances of each row to every item; errors as of ``codes``."""
        self._only_b2("distances")
        return distance(self._answer(batch).packed, self._database.packed)

    def rank(self, batch: Batch) -> Tensor:
        """(B, k) int64 ids of the nearest items, by (distance, id), and no distance: all that B1 shows; -1
        fills up.

        Raises:
            ValueError: a query whose budget is spent; nothing is then counted.
        """
        return topk(self._answer(batch).packed, self._database.packed, self._k, self._database.ids)[0]

    def _only_b2(self, what: str) -> None:
        if self.knowledge != "B2":
            raise ValueError(
                f"a {self.knowledge} oracle shows the ordered ids of the top k, no {what}; ask 'rank'"
            )

    def _answer(self, batch: Batch) -> Codes:
        values = list(batch.inputs.values())
        if len(values) != 1:
            raise ValueError(
                f"a question has one modality, these have {sorted(batch.inputs)}; use Batch.only"
            )
        after = dict(self._asked)
        for query in batch.ids.tolist():
            after[query] = after.get(query, 0) + 1
            if after[query] > self.budget:
                raise ValueError(
                    f"query {query} has asked its budget of {self.budget} questions; raise the budget, or stop there"
                )
        self._asked = after
        with frozen(self._victim), torch.no_grad():
            (output,) = self._victim(batch.inputs).values()
        return Codes(pack(sign(output.logits)), self._victim.bits, batch.ids.cpu())


def ids_lost(clean: Tensor, found: Tensor, weighted: bool = True) -> Tensor:
    """How much of the clean top k a query has lost, from ordered ids alone.

    1 - sum_i w(r_i) w(r'_i) / sum_r w(r)^2 over the items i that both lists hold, at ranks r and r'; the rank
    weight w(r) = 1 / log2(1 + r) is that of DCG, or 1 throughout, which gives the plain overlap. Ours.

    Args:
        clean: (B, k) int64 ids that the clean query returned; -1 is no item.
        found: (B, k) ids that the changed query returned.

    Returns:
        (B,) float64 in [0, 1]: 0 for an unchanged list, 1 where no item is left.
    """
    ranks = torch.arange(1, clean.shape[1] + 1, dtype=torch.float64)
    weight = 1.0 / torch.log2(1.0 + ranks) if weighted else torch.ones_like(ranks)
    real = (clean >= 0).to(torch.float64)
    kept = torch.zeros(len(clean), dtype=torch.float64)
    for place in range(clean.shape[1]):  # by rank, so that no (B, k, k) array is made
        same = (found == clean[:, place, None]).to(torch.float64) @ weight
        kept += real[:, place] * weight[place] * same
    return 1.0 - kept / (real @ weight.square()).clamp_min(1e-12)


@dataclass(frozen=True)
class Answered:
    """What questions led to, for a block of queries."""

    inputs: Inputs  # of each query, the best that was asked about, by the attacker's own score
    score: Tensor  # (B,) of them
    asked: int  # questions of each query; all queries of a block ask in step
    record: dict[int, Inputs]  # the best after so many questions, by mark


@dataclass
class Asking:
    """The attacker's notebook: asks about feasible points only, counts, and keeps the best of each query."""

    ask: Ask
    batch: Batch
    threat: Threat
    budget: int
    marks: tuple[int, ...] = ()
    asked: int = field(default=0, init=False)
    record: dict[int, Inputs] = field(default_factory=dict, init=False)
    _best: _Best | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if len(self.threat.balls) != 1:
            raise ValueError(f"questions search one modality at a time, not {self.threat.name}")
        if self.budget < 1:
            raise ValueError(f"a search by questions needs a budget of at least 1, got {self.budget}")
        if any(not 1 <= mark <= self.budget for mark in self.marks):
            raise ValueError(
                f"marks lie in 1..{self.budget}, the budget of questions, got {list(self.marks)}"
            )

    @property
    def modality(self) -> str:
        return next(iter(self.threat.balls))

    @property
    def ball(self) -> Budget:
        return self.threat.balls[self.modality]

    @property
    def origin(self) -> Tensor:
        return self.batch.inputs[self.modality]

    @property
    def left(self) -> int:
        """Questions that each query may still ask."""
        return self.budget - self.asked

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """The best point of each query so far, and its (B,) score."""
        if self._best is None:
            raise ValueError("nothing has been asked yet")
        return self._best.inputs[self.modality], self._best.value

    def __call__(self, x: Tensor) -> Tensor:
        """Ask about ``x``, once for each query; (B,) scores. ``x`` must be feasible: see ``feasible``."""
        inputs = {self.modality: x}
        value = self.ask(inputs)
        self.asked += 1
        if self._best is None:
            self._best = _Best(value, inputs)
        else:
            self._best.offer(value, inputs)
        if self.asked in self.marks:
            self.record[self.asked] = dict(self._best.inputs)
        return value

    def feasible(self, x: Tensor) -> Tensor:
        """``x`` brought back into the budget of the threat."""
        return self.ball.project(x, self.origin)

    def done(self) -> Answered:
        """What came of it. A search that ended early has its last best under every later mark."""
        x, value = self.best
        record = {mark: self.record.get(mark, {self.modality: x}) for mark in self.marks}
        return Answered({self.modality: x}, value, self.asked, record)
