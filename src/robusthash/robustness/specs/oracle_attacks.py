"""Black-box attacks of a suite: noise, and searches by oracle queries alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import SearchResult
from robusthash.attacks.oracle import QueryOracle, QueryScore, ids_lost
from robusthash.attacks.query_search import (
    NES,
    GreedyWords,
    QuerySearch,
    RandomPoints,
    Square,
    search_by_queries,
)
from robusthash.attacks.threat_model import Edits, Threat
from robusthash.core.embeddings import Embeddings, Searched, nearest, paired_distances
from robusthash.core.identity import changes
from robusthash.core.labels import relevant
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Batch, Codes, Inputs
from robusthash.evaluation.attack_block import AttackedBlock, finish
from robusthash.evaluation.attack_spec import Kind
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.runner import BlockRunner, BlockStore, NoStore, pass_progress
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.robustness_measures import topk_disruption
from robusthash.robustness.specs.transfer_attacks import keyed

Shows = Literal["codes", "distances", "coarse", "ids"]
Judge = Literal["ap", "overlap", "rank", "moved"]
_JUDGES: dict[str, tuple[str, ...]] = {
    "codes": ("ap", "overlap", "moved"),
    "distances": ("ap", "overlap"),
    "coarse": ("ap", "overlap"),
    "ids": ("overlap", "rank"),
}


@dataclass(frozen=True)
class OracleAttack:
    """Search by queries to the victim's search service, and nothing else.

    The attacker uses, by ``shows`` and ``judge``:

    * ``codes``, ``ap`` (B2): the returned code, and the database's codes and labels: exact expected AP.
    * ``distances``, ``ap`` (B2): the returned distances to every item and the items' labels: the same AP.
    * ``coarse``, ``ap`` (B2): the same from distances rounded down to multiples of ``step`` bits.
    * ``codes``, ``distances`` or ``coarse``, ``overlap`` (B2): no labels; the share of the clean top k that
      was replaced, exact under ties from codes, by (distance, id) from distances.
    * ``codes``, ``moved`` (B2): the share of bits that differ from the clean query's code, of vectors the
      distance; neither labels nor database. AP stays flat while the right item is still first, and this does
      not.
    * ``ids``, ``rank`` or ``overlap`` (B1): the ordered ids alone, compared with those of the clean query.

    The returned input is the best by this score, which at B1 need not be the one of lowest AP. The clean
    query is the first of the budget.

    Args:
        attacked: threat of one modality, the query's; its knowledge is set by ``shows``.
        budget: oracle queries of each query.
        k: ids that the service returns, and ranks that ``overlap`` counts.
        step: bits between the distances that ``coarse`` tells apart.
        marks: rising numbers of oracle queries; the results are then the clean query and the best inputs
            after each of them, in the places of targets.

    Raises:
        ValueError: a judge that needs more than is shown, or a budget below 1.
    """

    name: str
    search: QuerySearch
    attacked: Threat
    shows: Shows = "codes"
    judge: Judge = "ap"
    budget: int = 1000
    k: int = 100
    restarts: int = 1
    kind: Kind = "black-box"
    marks: tuple[int, ...] = ()
    step: int = 4

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"coarse distances have steps of at least 1 bit, got {self.step}")
        if self.judge not in _JUDGES.get(self.shows, ()):
            known = "; ".join(f"{shows}: {', '.join(judges)}" for shows, judges in _JUDGES.items())
            raise ValueError(f"{self.judge!r} cannot be judged from {self.shows!r}; there is {known}")
        if self.budget < 1:
            raise ValueError(f"the attack {self.name!r} needs at least 1 oracle query, got {self.budget}")
        if len(self.attacked.balls) != 1:
            raise ValueError(f"oracle queries search one modality at a time, not {self.attacked.name}")

    @property
    def knowledge(self) -> Literal["B1", "B2"]:
        """The knowledge of the attacker: ranked ids (B1), or distances or codes too (B2)."""
        return "B1" if self.shows == "ids" else "B2"

    @cached_property
    def threat(self) -> Threat:
        return replace(self.attacked, knowledge=self.knowledge)

    @property
    def targeted(self) -> bool:
        return False

    def settings(self) -> dict[str, Any]:
        own = changes(self, skip=("name", "attacked", "restarts", "kind", "marks"))
        return {**own, "threat": self.threat.settings()}

    def fitted(self, context: EvaluationContext) -> OracleAttack:
        """Itself; refused where the threat attacks the database or another modality than the queries'."""
        if self.threat.side != "query":
            raise ValueError(f"{self.threat.name} changes the database, not queries: robusthash poison RUN")
        if context.direction[0] not in self.threat.balls:
            raise ValueError(f"{self.threat.name} does not attack the {context.direction[0]} queries")
        return self

    def at(self, threat: Threat) -> OracleAttack:
        return replace(self, attacked=threat)

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> AttackedBlock:
        began = time.perf_counter()
        batch, answered = self.answered(context, block, restart, start)
        results, oracle_queries = [answered.inputs], answered.oracle_queries
        if self.marks:
            clean = {name: batch.inputs[name] for name in self.threat.balls}
            results, oracle_queries = (
                [clean, *(answered.best_after[mark] for mark in self.marks)],
                sum(self.marks),
            )
        seconds = time.perf_counter() - began
        return finish(context, self.threat, batch, results, seconds, passes=(0, 0, oracle_queries))

    def answered(
        self, context: EvaluationContext, block: int, restart: int = 0, start: Inputs | None = None
    ) -> tuple[Batch, SearchResult]:
        """The clean block and the result of its search."""
        batch = context.batch(block)
        oracle = QueryOracle(context.victim, context.database, self.budget, self.knowledge, self.k)
        ask, draws = self.query_score(context, batch, oracle), keyed(context, "questions", restart)
        return batch, search_by_queries(
            self.search, ask, batch, self.threat, draws, self.budget, start, self.marks
        )

    def query_score(self, context: EvaluationContext, batch: Batch, oracle: QueryOracle) -> QueryScore:
        """One oracle query for each query, and the score of its answer."""
        scorer: Any = self._code_score if self.shows == "codes" else self._list_score
        score = scorer(context, batch)
        answers: dict[str, Callable[[Batch], Any]] = {
            "codes": oracle.codes,
            "distances": oracle.distances,
            "coarse": lambda inputs: oracle.distances(inputs) // self.step * self.step,
            "ids": oracle.rank,
        }
        answer = answers[self.shows]
        return lambda inputs: score(answer(batch.with_inputs(inputs))).to(batch.ids.device)

    def _code_score(self, context: EvaluationContext, batch: Batch) -> Callable[[Searched], Tensor]:
        if self.judge == "ap":
            select = context.select(_labels(batch), -1)
            return lambda codes: select(codes.rows())
        first: list[Searched] = []  # of the clean query, which is the first

        def changed(codes: Searched) -> Tensor:
            first.extend([codes][len(first) :])
            if self.judge == "moved":
                bits = codes.bits if isinstance(codes, Codes) else 1
                return (paired_distances(first[0], codes) / bits).float()
            if isinstance(codes, Codes) and isinstance(first[0], Codes):
                return topk_disruption(first[0], codes, context.codes, self.k)
            lists = [nearest(each, context.database, self.k)[0] for each in (first[0], codes)]
            return ids_lost(lists[0], lists[1], weighted=False)

        return changed

    def _list_score(self, context: EvaluationContext, batch: Batch) -> Callable[[Tensor], Tensor]:
        """From distances or ids."""
        if self.judge == "ap":
            if isinstance(context.database, Embeddings):
                raise ValueError("AP from float distances alone is not measured; use shows='codes'")
            relevance = relevant(_labels(batch).cpu(), context.database_labels)
            return lambda distances: -_expected_ap(distances, relevance, context.database.bits)
        first: list[Tensor] = []

        def lost(answer: Tensor) -> Tensor:
            ids = answer if self.shows == "ids" else _nearest(answer, self.k)
            first.extend([ids][len(first) :])
            return ids_lost(first[0], ids, weighted=self.judge == "rank")

        return lost


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise ValueError("AP needs labelled queries; use the judge 'overlap' without labels")
    return batch.labels


def _expected_ap(distances: Tensor, relevance: Tensor, bits: int) -> Tensor:
    """(B, N) distances and relevance -> (B,) exact expected AP over the whole database."""
    places = distances.to(torch.int64)
    empty = torch.zeros(len(places), bits + 1, dtype=torch.int64)
    items = empty.scatter_add(1, places, torch.ones_like(places))
    return average_precision(items, empty.scatter_add(1, places, relevance.to(torch.int64)))


def _nearest(distances: Tensor, k: int) -> Tensor:
    """(B, k) positions of the nearest items, by (distance, position)."""
    count = distances.shape[1]
    key = distances.to(torch.int64) * count + torch.arange(count)
    return key.topk(min(k, count), dim=1, largest=False).indices


def oracle_attacks(threat: Threat, budget: int = 1000, k: int = 100) -> list[OracleAttack]:
    """The customary searches by oracle queries, from codes (B2, by AP) and from ordered ids (B1).

    Norm balls: square attack on both, NES on codes; in L1, for which the square attack has no pattern, NES on
    both. Bags of words: greedy trial of words on both, and random edits of the same number of words. Of token
    swaps none: nearness is that of the victim's own embeddings, which no black-box attacker has.
    """
    if any(ball.norm == "swaps" for ball in threat.balls.values()):
        return []

    def by_codes(name: str, search: QuerySearch) -> OracleAttack:
        return OracleAttack(f"{name}, codes", search, threat, "codes", "ap", budget, k)

    def by_ids(name: str, search: QuerySearch) -> OracleAttack:
        return OracleAttack(f"{name}, ids", search, threat, "ids", "rank", budget, k)

    if threat.edits:
        greedy = GreedyWords()
        words = [by_codes("greedy words", greedy), by_ids("greedy words", greedy)]
        return [*words, by_codes("random words", RandomPoints())]
    if any(ball.norm == "l1" for ball in threat.balls.values()):
        return [by_codes("nes", NES()), by_ids("nes", NES())]
    return [by_codes("square", Square()), by_ids("square", Square()), by_codes("nes", NES())]


def noise(
    name: str, threat: Threat, draws: int = 100, shape: Literal["uniform", "corner"] = "uniform"
) -> OracleAttack:
    """The worst of ``draws`` random points of the budget for each query, by exact AP; no search at all.

    A lower bar than any attack. The clean query takes part, so its cost is ``draws + 1`` oracle queries.

    Raises:
        ValueError: fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"noise needs at least 1 draw, got {draws}")
    return OracleAttack(name, RandomPoints(shape), threat, "codes", "ap", draws + 1, kind="noise")


def noise_attacks(threat: Threat, draws: int = 100) -> list[OracleAttack]:
    """Uniform and corner noise; of words random edits of exactly m; of token swaps none."""
    if any(ball.norm == "swaps" for ball in threat.balls.values()):
        return []
    if all(isinstance(ball, Edits) for ball in threat.balls.values()):
        return [noise("random edits", threat, draws)]
    return [noise("uniform noise", threat, draws), noise("corner noise", threat, draws, "corner")]


@dataclass(frozen=True)
class OracleCurve:
    """The worst AP of each query by number of oracle queries."""

    budgets: tuple[int, ...]
    clean: Tensor  # (Q,) float64 exact expected AP over the whole database
    ap: Tensor  # (Q, G) float64 the lowest of the clean query and of the best inputs up to each budget

    @property
    def means(self) -> Tensor:
        """(G,) wMAP over the whole database; never rises."""
        return self.ap.mean(0)


def oracle_curve(
    context: EvaluationContext,
    spec: OracleAttack,
    budgets: Sequence[int] = (100, 1000, 5000),
    progress: Progress = silent,
    store: BlockStore = NoStore(),
) -> OracleCurve:
    """Run ``spec`` once and score its best inputs after each number of oracle queries.

    The schedule of a search follows its whole budget, so a search of fewer oracle queries may be better at
    its end than a longer one is at that point.

    Args:
        budgets: rising, the last at most ``spec.budget``.
        store: of these budgets alone: its blocks hold the codes after each of them.

    Raises:
        ValueError: budgets that do not rise or exceed that of the attack, or a randomised victim, whose
            lowest AP over budgets would be that of its luckiest noise.
        MemoryError: one query at a time does not fit.
    """
    marks = tuple(budgets)
    if not marks or sorted(set(marks)) != list(marks) or marks[-1] > spec.budget:
        raise ValueError(f"budgets must rise and end at most at the attack's {spec.budget}: {list(marks)}")
    if context.randomised:
        raise ValueError("a curve of a randomised victim is not built: assess it, which averages noise")
    with pass_progress(context.victim, progress, spec.name, spec.budget * context.blocks):
        attacked = BlockRunner(context, store).queries(replace(spec, marks=marks), progress=progress)
    ap = context.select(context.query_labels, 1)
    lowest = torch.stack([ap(signs) for signs in attacked.signs.unbind(1)], 1).cummin(1).values
    return OracleCurve(marks, lowest[:, 0], lowest[:, 1:])
