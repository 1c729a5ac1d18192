"""The expensive part of a suite: every line, restart and block of queries, kept as it comes, run again by
nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import Attacked, encode_signs
from robusthash.evaluation.attack_spec import AttackSpec, RefinedAttack
from robusthash.evaluation.context import EvaluationContext, Progress, in_parts, silent
from robusthash.evaluation.evaluate import ap_alone, ap_names, as_codes, measure_codes
from robusthash.models.surrogate_gradients import keyed_noise

LOOKS = 20  # draws of a randomised victim's noise under which a candidate is scored


class BlockStore(Protocol):
    """Where attacked blocks are kept, so that an interrupted suite goes on and shards meet."""

    def load(self, spec: AttackSpec, restart: int, block: int) -> Attacked | None:
        """What was kept of this very line (its ``settings()``), or None."""

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: Attacked) -> None:
        """Keep a block; it is complete or not there, whatever happens."""

    def within(self, name: str) -> BlockStore:
        """A keep of its own inside this one, for blocks of other queries or other starts."""


class NoStore:
    """Keeps nothing."""

    def load(self, spec: AttackSpec, restart: int, block: int) -> Attacked | None:
        return None

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: Attacked) -> None:
        return None

    def within(self, name: str) -> NoStore:
        return self


@dataclass(frozen=True)
class RestartResult:
    """One restart of one line over all queries. The attacked inputs are not held: a keep has them."""

    attacked: Attacked
    looks: Tensor | None = (
        None  # (2, L, Q, K) int8 codes of a randomised victim under noise: to choose by, to score by
    )


@dataclass(frozen=True)
class AttackRuns:
    """All that the lines of a suite came back with."""

    specs: tuple[AttackSpec, ...]
    found: dict[str, tuple[RestartResult, ...]]  # by line, one for each restart
    clean: Tensor | None  # (2, L, Q, K) the clean queries of a randomised victim under noise
    notes: tuple[str, ...] = ()

    def signs(self, spec: str) -> Tensor:
        """(R, Q, T, K) int8 attacked codes of a line."""
        return torch.stack([restart_result.attacked.signs for restart_result in self.found[spec]])


def corner_start(threat: Threat, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
    """A random corner of the ball for each item: the farthest start (an edit budget: all edits spent at
    random)."""
    if threat.edits:
        return threat.random_start(origin, ids, draws)
    drawn = {
        name: draws.within("corner", name).uniform(ids, origin[name].shape[1:]).to(origin[name].dtype)
        for name in threat.balls
    }
    steps = threat.corner(drawn)
    return threat.project(
        {name: origin[name] + threat.balls[name].eps * step for name, step in steps.items()}, origin
    )


@dataclass
class Attacker:
    """Runs blocks, takes what is kept, and halves the batch where memory does not suffice (which it
    notes)."""

    context: EvaluationContext
    store: BlockStore = field(default_factory=NoStore)
    notes: list[str] = field(default_factory=list)
    parts: EvaluationContext = field(init=False)  # of the batch size that fits
    fitted: dict[tuple[str, str], AttackSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = self.context

    def block(self, spec: AttackSpec, restart: int, block: int, start: Inputs | None = None) -> Attacked:
        """One block: as it was kept, or run now and kept.

        Args:
            start: inputs to start from. By default restart 0 starts where the line does, 1 and other odd ones
                anywhere in the ball, 2 and other even ones in a corner.
        """
        found = self.store.load(spec, restart, block)
        if found is not None:
            return found
        key = (spec.name, spec.threat.name)
        if key not in self.fitted:
            self.fitted[key] = spec.fitted(self.context)
        if start is None and restart and restart % 2 == 0:
            batch = self.context.batch(block, spec.threat.balls)
            draws = Draws(self.context.seed, ("start", spec.name, str(restart)))
            start = corner_start(spec.threat, batch.inputs, batch.ids, draws)
        draws = Draws(self.context.seed, ("run", *map(str, (spec.name, restart, block))))
        with keyed_noise(draws.key(), self._device):
            found = self._run(self.fitted[key], restart, block, start)
        self.store.save(spec, restart, block, found)
        return found

    @property
    def _device(self) -> torch.device:
        return self.context.victim.device

    def _run(self, spec: AttackSpec, restart: int, block: int, start: Inputs | None) -> Attacked:
        def part(parts: EvaluationContext, number: int, rows: slice) -> Attacked:
            own = None if start is None else {name: value[rows] for name, value in start.items()}
            return spec.run(parts, number, restart, own)

        found, self.parts = in_parts(self.context, self.parts, block, part, self.notes.append)
        return Attacked.join(found)

    def looks(self, name: str, restart: int, block: int, inputs: Tensor) -> Tensor:
        """(2, L, B, K) int8 codes of inputs of a block under two separate sets of keyed noise draws."""
        victim, modality = self.context.victim, self.context.direction[0]
        sets = []
        for purpose in ("choose", "score"):
            draws = Draws(self.context.seed, ("looks", purpose, *map(str, (name, restart, block))))
            codes = []
            for look in range(LOOKS):
                with keyed_noise(draws.within(look).key(), self._device):
                    parts = inputs.to(self._device).split(self.parts.batch_size)
                    codes.append(torch.cat([encode_signs(victim, modality, part) for part in parts]))
            sets.append(torch.stack(codes))
        return torch.stack(sets)


def randomised(context: EvaluationContext) -> bool:
    """Whether the victim says that its codes are random."""
    return context.victim.declared == "randomised"


def run_attacks(
    context: EvaluationContext,
    specs: Sequence[AttackSpec],
    store: BlockStore | None = None,
    progress: Progress = silent,
    shard: tuple[int, int] = (0, 1),
) -> AttackRuns | None:
    """Attack every block with every restart of every line.

    Args:
        shard: (i, n) runs only the blocks i, i + n, ...; several processes that share a keep divide the work
            so.

    Returns:
        What was found; None for a shard of several, whose blocks are in the keep.

    Raises:
        ValueError: a shard that is not there, or one of several without a keep; two lines of one name.
    """
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"there is no shard {number} of {shards}; they are counted from 0")
    if shards > 1 and store is None:
        raise ValueError(
            f"shard {number} of {shards} needs a keep that all shards share, or its work is lost"
        )
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two lines are called {sorted(twice)[0]!r}; what is kept goes by name")
    attacker = Attacker(context, store or NoStore())
    blocks = range(number, context.blocks, shards)
    done: dict[tuple[str, int], list[RestartResult]] = {
        (spec.name, n): [] for spec in specs for n in range(spec.restarts)
    }
    for place, block in enumerate(blocks):
        worst = _Worst(context, block) if any(isinstance(spec, RefinedAttack) for spec in specs) else None
        for spec, restart in _in_order(specs):
            start = worst.inputs if worst is not None and isinstance(spec, RefinedAttack) else None
            attacked = attacker.block(spec, restart, block, start)
            if worst is not None and not spec.targeted:
                worst.offer(attacked)
            looked = randomised(context) and not spec.targeted and shards == 1
            looks = attacker.looks(spec.name, restart, block, attacked.inputs) if looked else None
            # inputs of all lines at once would fill the memory
            done[spec.name, restart].append(
                RestartResult(replace(attacked, inputs=attacked.inputs[:, :0]), looks)
            )
            progress(place * spec.restarts + restart + 1, spec.restarts * len(blocks), spec.name)
    if shards > 1:
        return None
    found = {spec.name: tuple(_joined(done[spec.name, n]) for n in range(spec.restarts)) for spec in specs}
    clean = _clean_looks(context, attacker) if randomised(context) else None
    return AttackRuns(tuple(specs), found, clean, (*context.notes, *attacker.notes))


def _in_order(specs: Sequence[AttackSpec]) -> Iterator[tuple[AttackSpec, int]]:
    """Each line and restart; those that refine know what they follow."""
    before: list[AttackSpec] = []
    for spec in specs:
        settled = spec.following(before) if isinstance(spec, RefinedAttack) else spec
        yield from ((settled, restart) for restart in range(spec.restarts))
        if not spec.targeted:
            before.append(settled)


def _joined(parts: Sequence[RestartResult]) -> RestartResult:
    looks = [part.looks for part in parts if part.looks is not None]
    return RestartResult(
        Attacked.join([part.attacked for part in parts]), torch.cat(looks, 2) if looks else None
    )


class _Worst:
    """Of each query of a block, the inputs of lowest AP so far; at first the clean ones."""

    def __init__(self, context: EvaluationContext, block: int) -> None:
        batch = context.batch(block)
        self._modality = context.direction[0]
        self._held = batch.inputs[self._modality].clone()
        self._metric = context.select(context.query_labels[batch.ids.cpu()], -1)
        self._value = self._metric(context.query.signs()[batch.ids.cpu()])

    @property
    def inputs(self) -> Inputs:
        return {self._modality: self._held.clone()}

    def offer(self, attacked: Attacked) -> None:
        """Take what is lower; of equals the first stays."""
        value = self._metric(attacked.signs[:, 0])
        lower = value > self._value
        self._value = torch.where(lower, value, self._value)
        self._held[lower.to(self._held.device)] = attacked.inputs[lower].to(self._held)


def _clean_looks(context: EvaluationContext, attacker: Attacker) -> Tensor:
    parts = [
        attacker.looks("clean", 0, block, context.batch(block).inputs[context.direction[0]])
        for block in range(context.blocks)
    ]
    return torch.cat(parts, 2)


def mean_ap(context: EvaluationContext, looks: Tensor) -> dict[str, Tensor]:
    """(Q,) each AP of the protocol, averaged over (L, Q, K) codes under noise. Never the lowest of them."""
    context = ap_alone(context)
    measured = [measure_codes(context, as_codes(codes), context.query_labels).per_query for codes in looks]
    return {
        name: torch.stack([values[name] for values in measured]).mean(0) for name in ap_names(measured[0])
    }
