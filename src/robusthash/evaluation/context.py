"""Everything that stands still while a victim is attacked: clean codes, the database, targets, what attackers
know."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Select
from robusthash.core.hamming import pack
from robusthash.core.out_of_memory import Say, halving, warn
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Codes, Reference
from robusthash.data.base import RetrievalData, Split
from robusthash.data.splits import stable_subset
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.distance_histogram import Prepared, prepare, prepared_counts
from robusthash.metrics.protocol import Protocol, load_protocol
from robusthash.models.encoding import encode_by, encode_split
from robusthash.models.hasher import Hasher

Progress = Callable[[int, int, str], None]
Part = TypeVar("Part")


def silent(done: int, total: int, text: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class EvaluationContext:
    """A victim on a data set under a protocol, in one direction. Made once; every attack is scored against
    it.

    The database is clean and encoded once, by ``victim.for_database()``, before any attack, unless learned
    codes are given. Queries without a label set that any item shares are counted, not dropped.
    """

    victim: Hasher
    data: RetrievalData
    protocol: Protocol
    direction: tuple[str, str]
    queries: Split
    query: Codes  # clean
    database: Codes
    seed: int
    batch_size: int
    encoded_by: int = 0  # items at a time, the same for all splits; 0 is ``encoding_batch`` of the batch size
    notes: tuple[str, ...] = ()  # of memory that did not suffice
    chosen: str = "all"  # how the queries were chosen from those of the data set

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.database, self.database_labels)

    @property
    def query_labels(self) -> Tensor:
        return _labels(self.queries)

    @property
    def database_labels(self) -> Tensor:
        return _labels(self.data.database)

    @cached_property
    def targets(self) -> Tensor:
        """(Q, T, C) target label sets of each query; all zero where none is possible."""
        ids = torch.arange(len(self.queries))
        return self.protocol.targets.draw(self.query_labels, ids, self.database_labels)

    def at(self, positions: Tensor, chosen: str = "given") -> EvaluationContext:
        """The bench with only these queries, in this order."""
        query = Codes(
            self.query.packed[positions], self.query.bits, torch.arange(len(positions)), self.query.origin
        )
        return replace(self, queries=self.queries.take(positions), query=query, chosen=chosen)

    def some(self, count: int) -> EvaluationContext:
        """The bench of so many of its queries, chosen by ``stable_subset``; itself where it has no more.

        Raises:
            ValueError: count below 1.
        """
        positions = stable_subset(self.queries, count)
        return self if count >= len(self.queries) else self.at(positions, by_content(count, self.data.query))

    @cached_property
    def _training(self) -> Reference:
        return self._encoded(self.data.train, self.direction[1:])

    @cached_property
    def _searched(self) -> Reference:
        signs = self.database.signs().float()
        return Reference({self.direction[1]: signs}, self.database_labels).to(self.victim.device)

    @cached_property
    def _training_pairs(self) -> Reference:
        return self._encoded(self.data.train, self.victim.modalities)

    @cached_property
    def _searched_pairs(self) -> Reference:
        others = [name for name in self.victim.modalities if name != self.direction[1]]
        encoded = self._encoded(self.data.database, others)
        codes = {**encoded.codes, **self._searched.codes}
        return Reference({name: codes[name] for name in self.victim.modalities}, encoded.labels)

    def _encoded(self, split: Split, modalities: Collection[str]) -> Reference:
        """Encoded as the database is, so that the pair of a joint attack is the same in every direction."""
        hasher, size = self.victim.for_database(), self.encoded_by or encoding_batch(self.batch_size)
        codes = {m: encode_split(hasher, split, batch_size=size, modality=m)[m] for m in modalities}
        return Reference({m: c.signs().float() for m, c in codes.items()}, split.labels).to(
            self.victim.device
        )

    def known(self, attack: Attack, pairs: bool = False) -> Reference | None:
        """What the threat lets the attacker know: database codes (W2), training codes (W1) or nothing (W0).

        They are those of the modality that is searched. A joint attack is told those of both modalities, so
        that it makes one and the same pair of image and text, whichever direction it is then scored in.

        Args:
            pairs: codes of both modalities for every attack.
        """
        knowledge = attack.threat.knowledge
        if knowledge == "W0":
            return None
        if knowledge in ("W1", "W2"):
            if pairs or len(attack.threat.balls) > 1:
                return self._training_pairs if knowledge == "W1" else self._searched_pairs
            return self._training if knowledge == "W1" else self._searched
        raise ValueError(f"a {knowledge} attacker holds no weights; {attack.name!r} needs W0, W1 or W2")

    def fitted(self, attack: Attack, pairs: bool = False) -> Attack:
        """The attack, its learning parts trained on this victim: once a bench, before the first block."""
        return attack.fit(self.victim, self.data, self.known(attack, pairs), draws=Draws(self.seed, ("fit",)))

    def select(self, labels: Tensor, sign: int) -> Select:
        """Exact expected AP over the database from the adversary's side, for points of one batch."""
        wanted = labels.cpu()

        def metric(signs: Tensor) -> Tensor:
            packed = pack(signs)
            codes = Codes(packed, self.victim.bits, torch.arange(len(packed)))
            return sign * average_precision(*prepared_counts(codes, wanted, self.prepared)).to(signs.device)

        return metric

    def batch(self, block: int, modalities: Collection[str] = ()) -> Batch:
        """Block number ``block`` of the queries, on the victim's device; ids are query positions.

        Args:
            modalities: wanted beside the query modality of the direction, as where both are attacked
                together.
        """
        positions = torch.arange(len(self.queries)).split(self.batch_size)[block]
        return self.queries.batch(positions).only({self.direction[0], *modalities}).to(self.victim.device)

    @property
    def blocks(self) -> int:
        return -(-len(self.queries) // self.batch_size)


def by_content(count: int, split: Split) -> str:
    """How results say that ``stable_subset`` chose so many queries of a split."""
    return f"{count} of {len(split)} by content"


def encoding_batch(batch_size: int) -> int:
    """Items encoded at a time: one number for all splits, since a code may depend on how many share a
    batch."""
    return max(batch_size, 256)


def in_parts(
    context: EvaluationContext,
    parts: EvaluationContext,
    block: int,
    run: Callable[[EvaluationContext, int, slice], Part],
    say: Say,
) -> tuple[list[Part], EvaluationContext]:
    """One block of a bench, at so many queries at a time as fit into memory.

    Args:
        parts: the bench by the batch size that fitted last: a divisor of its own.
        run: (bench, block number in it, rows of the block of ``context`` that these are) -> what came of that
            part.
        say: is told of every size that did not fit.

    Returns:
        What came of each part, in order, and the bench by the batch size that fitted.

    Raises:
        MemoryError: one query at a time does not fit.
    """

    def attacked(size: int) -> tuple[list[Part], EvaluationContext]:
        fitting = parts if size == parts.batch_size else replace(context, batch_size=size)
        count = context.batch_size // size
        numbers = range(block * count, min((block + 1) * count, fitting.blocks))
        return [run(fitting, n, slice(at * size, (at + 1) * size)) for at, n in enumerate(numbers)], fitting

    return halving(attacked, parts.batch_size, "queries", "attacked", say)[0]


def _labels(split: Split) -> Tensor:
    if split.labels is None:
        raise ValueError(
            f"the {split.name} split has no labels; evaluation needs them to know what is relevant"
        )
    return split.labels


def make_context(
    victim: Hasher,
    data: RetrievalData,
    protocol: str | Protocol = "house",
    *,
    direction: tuple[str, str] | None = None,
    database: Codes | None = None,
    queries: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    progress: Progress = silent,
) -> EvaluationContext:
    """Encode queries and database, once, both by one batch size: where either does not fit into memory, by a
    smaller.

    That is said by a warning and in the notes of the bench.

    Args:
        direction: (query modality, database modality); the victim's first modality both ways by default.
        database: learned database codes (ADSH, DSARH); by default the clean split is encoded.
        queries: so many of the queries, chosen by ``stable_subset`` as a suite chooses them; all by default.
        seed: of every attack's draws.
        batch_size: queries attacked at a time; results of a deterministic victim depend on it by float
            rounding alone, what a randomised one draws is keyed by the block.

    Raises:
        ValueError: a direction of a modality that the victim lacks, queries below 1.
        MemoryError: single items do not fit.
    """
    protocol = load_protocol(protocol)
    direction = direction or (victim.modalities[0], victim.modalities[0])
    if direction[0] not in victim.modalities or direction[1] not in victim.modalities:
        raise ValueError(
            f"direction {direction} needs modalities that this hasher lacks: it has {victim.modalities}"
        )
    kept, chosen = data.query, "all"
    if queries is not None:
        positions = stable_subset(kept, queries)
        if queries < len(kept):
            kept, chosen = kept.take(positions), by_content(queries, data.query)
    notes: list[str] = []

    def encoded(hasher: Hasher, split: Split, modality: str, size: int, title: str) -> Codes:
        return encode_by(
            hasher,
            split,
            batch_size=size,
            modality=modality,
            progress=lambda done, total: progress(done, total, title),
        )[modality]

    def both(size: int) -> tuple[Codes, Codes]:
        searched = database
        if searched is None:
            searched = encoded(
                victim.for_database(), data.database, direction[1], size, "encoding the database"
            )
        return searched, encoded(victim, kept, direction[0], size, "encoding the queries")

    (searched, query), size = halving(both, encoding_batch(batch_size), "items", "encoded", notes.append)
    for note in notes:
        warn(note)
    said = tuple(notes)
    return EvaluationContext(
        victim, data, protocol, direction, kept, query, searched, seed, batch_size, size, said, chosen
    )
