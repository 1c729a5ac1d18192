"""Black-box checks: noise, searches that only ask, and transfer from surrogates, as lines of a suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.attacks.base import SearchResult
from robusthash.attacks.oracle import Ask, QueryOracle, ids_lost
from robusthash.attacks.query_search import NES, GreedyWords, QuestionSearch, RandomPoints, Square, ask_around
from robusthash.attacks.threat_model import Edits, Threat
from robusthash.core.identity import changes
from robusthash.core.labels import relevant
from robusthash.core.out_of_memory import warn
from robusthash.core.types import Batch, Codes, Inputs
from robusthash.evaluation.attack_block import Attacked, Trial, finish
from robusthash.evaluation.attack_spec import Kind
from robusthash.evaluation.context import EvaluationContext, Progress, in_parts, silent
from robusthash.evaluation.runner import BlockStore, NoStore, randomised
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.robustness_measures import topk_disruption
from robusthash.robustness.specs.transfer_attacks import (
    Surrogate,
    Transfer,
    TransferMatrix,
    keyed,
    make_surrogate,
    transfer_attacks,
    transfer_matrix,
)

__all__ = [
    "OracleAttack",
    "QuestionCurve",
    "Surrogate",
    "Transfer",
    "TransferMatrix",
    "make_surrogate",
    "noise",
    "noise_attacks",
    "oracle_attacks",
    "question_curve",
    "transfer_attacks",
    "transfer_matrix",
]

Shows = Literal["codes", "distances", "ids"]
Judge = Literal["ap", "overlap", "rank", "moved"]
_JUDGES: dict[str, tuple[str, ...]] = {
    "codes": ("ap", "overlap", "moved"),
    "distances": ("ap", "overlap"),
    "ids": ("overlap", "rank"),
}


@dataclass(frozen=True)
class OracleAttack:
    """Search by asking the victim's search service, and nothing else.

    What the attacker uses, by ``shows`` and ``judge``:

    * ``codes``, ``ap`` (B2): the returned code, and the database's codes and labels: exact expected AP.
    * ``distances``, ``ap`` (B2): the returned distances to every item and the items' labels: the same AP.
    * ``codes`` or ``distances``, ``overlap`` (B2): no labels; the share of the clean top k that was replaced,
      exact under ties from codes, by (distance, id) from distances.
    * ``codes``, ``moved`` (B2): the share of bits that differ from the clean query's code; neither labels nor
      database. AP stays flat while the right item is still first, and this does not.
    * ``ids``, ``rank`` or ``overlap`` (B1): the ordered ids alone, compared with those that the clean query
      returned.

    The returned input is the best by this score, which at B1 need not be the one of lowest AP. The clean
    query is the first question of the budget.

    Args:
        threat: of one modality, the query's; its knowledge is set by ``shows``.
        budget: questions of each query.
        k: ids that the service returns, and ranks that ``overlap`` looks at.

    Raises:
        ValueError: a judge that needs more than is shown, or a budget below 1.
    """

    name: str
    search: QuestionSearch
    attacked: Threat
    shows: Shows = "codes"
    judge: Judge = "ap"
    budget: int = 1000
    k: int = 100
    restarts: int = 1
    kind: Kind = "black-box"

    def __post_init__(self) -> None:
        if self.judge not in _JUDGES.get(self.shows, ()):
            known = "; ".join(f"{shows}: {', '.join(judges)}" for shows, judges in _JUDGES.items())
            raise ValueError(f"{self.judge!r} cannot be judged from {self.shows!r}; there is {known}")
        if self.budget < 1:
            raise ValueError(
                f"the line {self.name!r} needs a budget of at least 1 question, got {self.budget}"
            )
        if len(self.attacked.balls) != 1:
            raise ValueError(f"questions search one modality at a time, not {self.attacked.name}")

    @cached_property
    def threat(self) -> Threat:
        return replace(self.attacked, knowledge="B1" if self.shows == "ids" else "B2")

    @property
    def targeted(self) -> bool:
        return False

    def settings(self) -> dict[str, Any]:
        return {
            **changes(self, skip=("name", "attacked", "restarts", "kind")),
            "threat": self.threat.settings(),
        }

    def fitted(self, context: EvaluationContext) -> OracleAttack:
        """Itself; refused where the threat attacks another modality than the bench asks with."""
        if context.direction[0] not in self.threat.balls:
            raise ValueError(
                f"{self.threat.name} does not attack the {context.direction[0]} queries of this bench"
            )
        return self

    def at(self, threat: Threat) -> OracleAttack:
        return replace(self, attacked=threat)

    def run(
        self, context: EvaluationContext, block: int, restart: int, start: Inputs | None = None
    ) -> Attacked:
        began = time.perf_counter()
        batch, answered = self.answered(context, block, restart, start)
        trial = Trial(
            answered.inputs, torch.empty(len(batch), 0, dtype=torch.int8), oracle=answered.oracle_queries
        )
        return finish(context, self.threat, batch, [trial], time.perf_counter() - began)

    def answered(
        self,
        context: EvaluationContext,
        block: int,
        restart: int = 0,
        start: Inputs | None = None,
        marks: tuple[int, ...] = (),
    ) -> tuple[Batch, SearchResult]:
        """The clean block and what its questions led to, with the best inputs after each of ``marks``
        questions."""
        batch = context.batch(block)
        oracle = QueryOracle(
            context.victim, context.database, self.budget, "B1" if self.shows == "ids" else "B2", self.k
        )
        ask = self._ask(context, batch, oracle)
        draws = keyed(context, "questions", restart)
        return batch, ask_around(self.search, ask, batch, self.threat, draws, self.budget, start, marks)

    def _ask(self, context: EvaluationContext, batch: Batch, oracle: QueryOracle) -> Ask:
        """One question for each query, and the score of its answer."""
        judge = self._codes_judge if self.shows == "codes" else self._lists_judge
        score = judge(context, batch)
        answer: Callable[[Batch], Any] = {
            "codes": oracle.codes,
            "distances": oracle.distances,
            "ids": oracle.rank,
        }[self.shows]
        return lambda inputs: score(answer(batch.with_inputs(inputs))).to(batch.ids.device)

    def _codes_judge(self, context: EvaluationContext, batch: Batch) -> Callable[[Codes], Tensor]:
        if self.judge == "ap":
            select = context.select(_labels(batch), -1)
            return lambda codes: select(codes.signs())
        first: list[Codes] = []  # the clean query is asked about first

        def moved(codes: Codes) -> Tensor:
            first.extend([codes][len(first) :])
            return (first[0].signs() != codes.signs()).float().mean(1)

        if self.judge == "moved":
            return moved

        def replaced(codes: Codes) -> Tensor:
            first.extend([codes][len(first) :])
            return topk_disruption(first[0], codes, context.database, self.k)

        return replaced

    def _lists_judge(self, context: EvaluationContext, batch: Batch) -> Callable[[Tensor], Tensor]:
        """From distances or ids."""
        if self.judge == "ap":
            wanted = relevant(_labels(batch).cpu(), context.database_labels)
            return lambda distances: -_expected_ap(distances, wanted, context.database.bits)
        first: list[Tensor] = []

        def lost(found: Tensor) -> Tensor:
            ids = _nearest(found, self.k) if self.shows == "distances" else found
            first.extend([ids][len(first) :])
            return ids_lost(first[0], ids, weighted=self.judge == "rank")

        return lost


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise ValueError("AP needs labelled queries; use the judge 'overlap' without labels")
    return batch.labels


def _expected_ap(distances: Tensor, wanted: Tensor, bits: int) -> Tensor:
    """(B, N) distances and relevance -> (B,) exact expected AP over the whole database."""
    places = distances.to(torch.int64)
    items = torch.zeros(len(places), bits + 1, dtype=torch.int64)
    counted = [
        items.scatter_add(1, places, part) for part in (torch.ones_like(places), wanted.to(torch.int64))
    ]
    return average_precision(counted[0], counted[1])


def _nearest(distances: Tensor, k: int) -> Tensor:
    """(B, k) positions of the nearest items, by (distance, position)."""
    count = distances.shape[1]
    key = distances.to(torch.int64) * count + torch.arange(count)
    return key.topk(min(k, count), dim=1, largest=False).indices


def oracle_attacks(threat: Threat, budget: int = 1000, k: int = 100) -> list[OracleAttack]:
    """The customary searches by questions, from codes (B2, by AP) and from ordered ids (B1).

    Norm balls: square attack on both, NES on codes; in L1, for which the square attack has no pattern, NES on
    both.
    Bags of words: greedy trial of words on both, and random edits of the same number of words. Of token swaps
    none: nearness is that of the victim's own embeddings, which no asker has.
    """
    if any(ball.norm == "swaps" for ball in threat.balls.values()):
        return []
    if threat.edits:
        return [
            OracleAttack("greedy words, codes", GreedyWords(), threat, "codes", "ap", budget, k),
            OracleAttack("greedy words, ids", GreedyWords(), threat, "ids", "rank", budget, k),
            OracleAttack("random words, codes", RandomPoints(), threat, "codes", "ap", budget, k),
        ]
    nes = OracleAttack("nes, codes", NES(), threat, "codes", "ap", budget, k)
    if any(ball.norm == "l1" for ball in threat.balls.values()):
        return [nes, OracleAttack("nes, ids", NES(), threat, "ids", "rank", budget, k)]
    return [
        OracleAttack("square, codes", Square(), threat, "codes", "ap", budget, k),
        OracleAttack("square, ids", Square(), threat, "ids", "rank", budget, k),
        nes,
    ]


def noise(
    name: str, threat: Threat, draws: int = 100, shape: Literal["uniform", "corner"] = "uniform"
) -> OracleAttack:
    """The worst of ``draws`` random points of the budget for each query, by exact AP; no search at all.

    A lower bar than any attack. The clean query takes part, so its cost is ``draws + 1`` questions.

    Raises:
        ValueError: fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"noise needs at least 1 draw, got {draws}")
    return OracleAttack(name, RandomPoints(shape), threat, "codes", "ap", draws + 1, kind="noise")


def noise_attacks(threat: Threat, draws: int = 100) -> list[OracleAttack]:
    """Uniform and corner noise; random edits of exactly m words where words are edited; of token swaps
    none."""
    if any(ball.norm == "swaps" for ball in threat.balls.values()):
        return []
    if all(isinstance(ball, Edits) for ball in threat.balls.values()):
        return [noise("random edits", threat, draws)]
    return [noise("uniform noise", threat, draws), noise("corner noise", threat, draws, "corner")]


@dataclass(frozen=True)
class QuestionCurve:
    """What questions buy: the worst AP of each query after so many of them."""

    budgets: tuple[int, ...]
    clean: Tensor  # (Q,) float64 exact expected AP over the whole database
    ap: Tensor  # (Q, G) float64 the lowest of the clean query and of what was held up to each budget

    @property
    def means(self) -> Tensor:
        """(G,) wMAP over the whole database; never rises."""
        return self.ap.mean(0)


def question_curve(
    context: EvaluationContext,
    spec: OracleAttack,
    budgets: Sequence[int] = (100, 1000, 5000),
    progress: Progress = silent,
    store: BlockStore | None = None,
) -> QuestionCurve:
    """Run ``spec`` once and look at what it held after each number of questions; the search is one, not
    several.

    The schedule of a search follows its whole budget, so a search of fewer questions may be better at its end
    than a longer one is at that point.

    Args:
        budgets: rising, the last at most ``spec.budget``.
        keep: of these budgets alone: what is kept of a block are the codes after each of them.

    Raises:
        ValueError: budgets that do not rise or exceed that of the line, or a randomised victim, whose lowest
            AP over budgets would be that of its luckiest noise.
        MemoryError: one query at a time does not fit.
    """
    marks = tuple(budgets)
    if not marks or sorted(set(marks)) != list(marks) or marks[-1] > spec.budget:
        raise ValueError(f"budgets must rise and end at most at the line's {spec.budget}, got {list(marks)}")
    if randomised(context):
        raise ValueError(
            "a curve of a randomised victim is not built: assess it, which averages over its noise"
        )
    spec, parts, store, found = spec.fitted(context), context, store or NoStore(), list[Tensor]()
    labels = context.query_labels.split(context.batch_size)

    def held(part: EvaluationContext, block: int, _: slice) -> Attacked:
        return _held(part, spec, block, marks)

    for block in range(context.blocks):
        attacked = store.load(spec, 0, block)
        if attacked is None:
            done, parts = in_parts(context, parts, block, held, warn)
            attacked = Attacked.join(done)
            store.save(spec, 0, block, attacked)
        ap = context.select(labels[block], 1)
        found.append(torch.stack([ap(signs) for signs in attacked.signs.unbind(1)], 1))
        progress(block + 1, context.blocks, spec.name)
    lowest = torch.cat(found).cummin(1).values
    return QuestionCurve(marks, lowest[:, 0], lowest[:, 1:])


def _held(context: EvaluationContext, spec: OracleAttack, block: int, marks: tuple[int, ...]) -> Attacked:
    """A block as it is, and what its search held after so many questions, in the places of goals."""
    began = time.perf_counter()
    batch, answered = spec.answered(context, block, marks=marks)
    clean = {name: batch.inputs[name] for name in spec.threat.balls}
    nowhere = torch.empty(len(batch), 0, dtype=torch.int8)
    trials = [
        Trial(clean, nowhere),
        *(Trial(answered.best_after[mark], nowhere, oracle=mark) for mark in marks),
    ]
    return finish(context, spec.threat, batch, trials, time.perf_counter() - began)
