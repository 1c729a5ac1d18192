"""The evaluation context: all that is fixed while a victim is attacked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Select
from robusthash.attacks.embedding_attacks import on_embeddings
from robusthash.core.embeddings import Embeddings, Searched
from robusthash.core.labels import has_relevant
from robusthash.core.out_of_memory import halving, out_of_memory, warn
from robusthash.core.runtime import Draws, Progress, silent
from robusthash.core.types import Batch, Codes, Reference
from robusthash.data.base import RetrievalData, Split
from robusthash.data.splits import stable_subset
from robusthash.evaluation.logit_scale import MEASURED, LogitScale, logit_scale
from robusthash.metrics.average_precision import average_precision
from robusthash.metrics.distance_histogram import Prepared, prepare, prepared_counts
from robusthash.metrics.embedding_measures import embedding_ap
from robusthash.metrics.protocol import Protocol, load_protocol
from robusthash.models.encoding import encode_by, encode_searched, encode_signs
from robusthash.models.external.wrap import require_hasher
from robusthash.models.hasher import Hasher
from robusthash.models.surrogate_gradients import keyed_noise

NOISE_SAMPLES = 20  # draws of a randomised victim's noise over which an AP is averaged


@dataclass(frozen=True)
class EvaluationContext:
    """A victim on a data set under a protocol, in one direction; every attack is scored against it.

    The database is clean and encoded once, by ``victim.for_database()``, before any attack, unless learned
    codes are given. Queries that share no label with any item are counted, and under ``empty: skip`` of the
    protocol left out.
    """

    victim: Hasher
    data: RetrievalData
    protocol: Protocol
    direction: tuple[str, str]  # modality of the queries, modality of the database
    queries: Split
    query: Searched  # clean
    database: Searched
    seed: int
    batch_size: int
    encoded_by: int = 0  # items at a time, the same for all splits; 0 is ``encoding_batch`` of the batch size
    notes: tuple[str, ...] = ()  # of memory that was too small
    chosen: str = "all"  # how the queries were chosen from those of the data set
    left_out: int = 0  # queries without a relevant item, where the protocol skips them

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.codes, self.database_labels)

    @property
    def codes(self) -> Codes:
        """The database as binary codes, and ``query_codes`` the queries.

        Raises:
            ValueError: they are searched by the distance of float vectors, which have none.
        """
        return self._binary(self.database)

    @property
    def query_codes(self) -> Codes:
        return self._binary(self.query)

    def _binary(self, searched: Searched) -> Codes:
        if isinstance(searched, Codes):
            return searched
        raise ValueError(
            f"this works on bits, and the victim is searched by the {self.victim.distance} distance of its "
            "numbers; wrap it with output='signs' where its users take their signs"
        )

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
        """The context with only these queries, in this order."""
        queries, query = self.queries.take(positions), self.query.take(positions)
        return replace(self, queries=queries, query=query, chosen=chosen)

    def some(self, count: int) -> EvaluationContext:
        """``count`` of the queries, chosen by ``stable_subset``; itself where it has no more."""
        positions = stable_subset(self.queries, count)
        return self if count >= len(self.queries) else self.at(positions, by_content(count, self.data.query))

    @cached_property
    def scale(self) -> LogitScale:
        """The size of the victim's logits on some of the queries, by noise of its own where it draws."""
        try:
            return self._measured(min(4, self.batch_size))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        return self._measured(1)

    def _measured(self, size: int) -> LogitScale:
        batches = map(self.queries.batch, torch.arange(min(MEASURED, len(self.queries))).split(size))
        inputs = (b.only(self.victim.modalities).to(self.victim.device).inputs for b in batches)
        with keyed_noise(Draws(self.seed, ("scale",)).key(), self.victim.device):
            return logit_scale(self.victim, inputs)

    @cached_property
    def differentiated(self) -> Hasher:
        """The victim as attacks see it: itself, or by logits of an ordinary size, with the same codes."""
        return self.scale.applied(self.victim)

    @cached_property
    def _training(self) -> Reference:
        return self._encoded(self.data.train, self.direction[1:])

    @cached_property
    def _training_pairs(self) -> Reference:
        return self._encoded(self.data.train, self.victim.modalities)

    @cached_property
    def _searched(self) -> Reference:
        rows = self.database.rows().float()
        return Reference({self.direction[1]: rows}, self.database_labels).to(self.victim.device)

    @cached_property
    def _searched_pairs(self) -> Reference:
        others = [name for name in self.victim.modalities if name != self.direction[1]]
        encoded = self._encoded(self.data.database, others)
        codes = {**encoded.codes, **self._searched.codes}
        return Reference({name: codes[name] for name in self.victim.modalities}, encoded.labels)

    def _encoded(self, split: Split, modalities: Collection[str]) -> Reference:
        """Encoded as the database is, so that the pair of a joint attack is the same in every direction."""
        hasher, size = self.victim.for_database(), self.encoded_by or encoding_batch(self.batch_size)
        codes = {m: encode_searched(hasher, split, batch_size=size, modality=m)[m] for m in modalities}
        rows = {m: c.rows().float() for m, c in codes.items()}
        return Reference(rows, split.labels).to(self.victim.device)

    def known(self, attack: Attack, pairs: bool = False) -> Reference | None:
        """Codes that the attacker knows: of the database (W2), of training items (W1) or none (W0).

        They are those of the searched modality. A joint attack knows those of both modalities (so does any
        with ``pairs``), and finds one and the same pair of image and text, whichever direction it is then
        scored in.
        """
        knowledge, both = attack.threat.knowledge, pairs or attack.guide.pairs or len(attack.threat.balls) > 1
        if knowledge == "W0" or attack.guide.substitutes:
            return None
        if knowledge == "W1":
            return self._training_pairs if both else self._training
        if knowledge == "W2":
            return self._searched_pairs if both else self._searched
        raise ValueError(f"a {knowledge} attacker holds no weights; {attack.name!r} needs W0, W1 or W2")

    def fitted(self, attack: Attack, pairs: bool = False) -> Attack:
        """The attack with its learning parts trained on this victim: once, before the first block.

        On a victim that is searched by float vectors it is the form of the attack that moves those.

        Raises:
            ValueError: an attack on bits that has no such form.
        """
        if self.victim.distance != "hamming":
            attack = on_embeddings(attack)
        return attack.fit(self.victim, self.data, self.known(attack, pairs), draws=Draws(self.seed, ("fit",)))

    def select(self, labels: Tensor, sign: int) -> Select:
        """Exact expected AP over the database from the adversary's side, for points of one batch."""
        labels = labels.cpu()

        def metric(rows: Tensor) -> Tensor:
            return sign * self.expected_ap(rows, labels).to(rows.device)

        return metric

    def expected_ap(self, rows: Tensor, labels: Tensor) -> Tensor:
        """(B,) exact expected AP of (B, K) signs, or float vectors, for (B, C) labels."""
        if isinstance(self.database, Embeddings):
            return embedding_ap(self.database.of(rows), labels, self.database, self.database_labels)
        return average_precision(*prepared_counts(self.database.of(rows), labels, self.prepared))

    def batch(self, block: int, modalities: Collection[str] = ()) -> Batch:
        """Block number ``block`` of the queries, on the victim's device; ids are query positions.

        Args:
            modalities: besides that of the query, as where both are attacked together.
        """
        positions = torch.arange(len(self.queries)).split(self.batch_size)[block]
        return self.queries.batch(positions).only({self.direction[0], *modalities}).to(self.victim.device)

    @property
    def blocks(self) -> int:
        return -(-len(self.queries) // self.batch_size)

    @property
    def randomised(self) -> bool:
        """The victim declares that its codes are random."""
        return self.victim.declared == "randomised"

    def noise_codes(self, name: str, restart: int, block: int, inputs: Tensor) -> Tensor:
        """(2, S, B, K) int8 codes of inputs of a block under two separate sets of keyed noise draws.

        Of a randomised victim: one set chooses the worst case of each query, the other scores it.
        """
        sets = []
        for purpose in ("choose", "score"):
            draws, codes = Draws(self.seed, ("looks", purpose, name, str(restart), str(block))), []
            for sample in range(NOISE_SAMPLES):
                with keyed_noise(draws.within(sample).key(), self.victim.device):
                    codes.append(encode_signs(self.victim, self.direction[0], inputs, self.batch_size))
            sets.append(torch.stack(codes))
        return torch.stack(sets)

    def noise_of_all(self, name: str, inputs: Tensor, restart: int = 0) -> Tensor:
        """(2, S, Q, K) ``noise_codes`` of inputs of all queries, in their order."""
        blocks = enumerate(inputs.split(self.batch_size))
        return torch.cat([self.noise_codes(name, restart, block, part) for block, part in blocks], 2)

    @cached_property
    def clean_noise(self) -> Tensor:
        """(2, S, Q, K) ``noise_codes`` of the clean queries."""
        batches = ((block, self.batch(block).inputs[self.direction[0]]) for block in range(self.blocks))
        return torch.cat([self.noise_codes("clean", 0, block, inputs) for block, inputs in batches], 2)


def by_content(count: int, split: Split) -> str:
    """The words by which results report that ``stable_subset`` chose ``count`` queries of a split."""
    return f"{count} of {len(split)} by content"


def encoding_batch(batch_size: int) -> int:
    """Items encoded at a time, the same for all splits: a code may depend on how many share a batch."""
    return max(batch_size, 256)


def _labels(split: Split) -> Tensor:
    if split.labels is None:
        raise ValueError(f"the {split.name} split has no labels, and evaluation needs them")
    return split.labels


def _scored_queries(queries: Split, database: Split, protocol: Protocol) -> tuple[Split, int]:
    """The queries that a protocol scores, and the number of those that it skips."""
    if protocol.empty != "skip":
        return queries, 0
    answerable = has_relevant(_labels(queries), _labels(database))
    if not answerable.any():
        raise ValueError(
            f"none of the {len(queries)} queries has a relevant item in the database, and the protocol skips "
            "such queries; look at the labels of both ('robusthash data check')"
        )
    left_out = int((~answerable).sum())
    return (queries.take(torch.nonzero(answerable).flatten()) if left_out else queries), left_out


def make_context(
    victim: Hasher,
    data: RetrievalData,
    protocol: str | Mapping[str, Any] | Protocol = "house",
    *,
    direction: tuple[str, str] | None = None,
    database: Searched | None = None,
    queries: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    progress: Progress = silent,
) -> EvaluationContext:
    """Encode queries and database once, both by one batch size.

    Where either does not fit into memory, both are encoded by a smaller one; a warning and the notes of the
    context say so.

    Args:
        direction: (query modality, database modality); the victim's first modality both ways by default.
        database: learned database codes (ADSH, DSARH); by default the clean split is encoded.
        queries: number of queries, chosen by ``stable_subset`` as a suite chooses them; all by default.
        seed: of every attack's draws.
        batch_size: queries attacked at a time; results of a deterministic victim depend on it by float
            rounding alone, the draws of a randomised one are keyed by the block.

    Raises:
        ValueError: a direction of a modality that the victim lacks, queries below 1.
        MemoryError: single items do not fit.
    """
    require_hasher(victim)
    if not any(part.labels is not None and part.labels.any() for part in (data.query, data.database)):
        raise ValueError(
            f"no item of {data.name} has a label, so no search of it can be scored: label queries and "
            "database, or stop at the trained model ('robusthash train'), which searches without labels"
        )
    protocol = load_protocol(protocol)
    direction = direction or (victim.modalities[0], victim.modalities[0])
    for missing in (modality for modality in direction if modality not in victim.modalities):
        wanted, has = "2".join(part[0].upper() for part in direction), "s and ".join(victim.modalities)
        raise ValueError(
            f"the direction {wanted} needs codes of {missing}s, and this hasher reads {has}s alone"
        )
    split, chosen = data.query, "all"
    if queries is not None:
        positions = stable_subset(split, queries)
        if queries < len(split):
            split, chosen = split.take(positions), by_content(queries, data.query)
    split, left_out = _scored_queries(split, data.database, protocol)
    chosen += f", {left_out} without a relevant item left out" * bool(left_out)
    notes: list[str] = []

    def encoded(hasher: Hasher, split: Split, modality: str, size: int, title: str) -> Searched:
        def titled(done: int, total: int) -> None:
            progress(done, total, title)

        return encode_by(hasher, split, batch_size=size, modality=modality, progress=titled)[modality]

    def both(size: int) -> tuple[Searched, Searched]:
        codes, by = database, victim.for_database()
        if codes is None:
            codes = encoded(by, data.database, direction[1], size, "encoding the database")
        return codes, encoded(victim, split, direction[0], size, "encoding the queries")

    (codes, query), size = halving(both, encoding_batch(batch_size), "items", "encoded", notes.append)
    for note in notes:
        warn(note)
    fixed = (split, query, codes, seed, batch_size, size, tuple(notes), chosen, left_out)
    return EvaluationContext(victim, data, protocol, direction, *fixed)
