"""The runner: every attack, restart and block of queries, stored as it comes and never run twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.out_of_memory import halving, warn
from robusthash.core.processes import rank, wait_for_others, world
from robusthash.core.runtime import Draws, Progress, shown_by, silent
from robusthash.core.types import Inputs
from robusthash.evaluation.attack_block import AttackedBlock
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, RefinedAttack
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.hasher import Hasher
from robusthash.models.surrogate_gradients import keyed_noise


class BlockStore(Protocol):
    """A store of attacked blocks, by which an interrupted run goes on and shards meet."""

    def load(self, spec: AttackSpec, restart: int, block: int) -> AttackedBlock | None:
        """The block stored for a spec of the same ``settings()``, or None."""

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: AttackedBlock) -> None:
        """Store a block; it is complete or not there, whatever happens."""

    def name(self, spec: AttackSpec, restart: int, block: int) -> str:
        """The place of a block, for messages."""

    def within(self, name: str) -> BlockStore:
        """A store of its own inside this one, for blocks of other queries or other starts."""


@dataclass(frozen=True)
class NoStore:
    """Stores nothing."""

    def load(self, spec: AttackSpec, restart: int, block: int) -> AttackedBlock | None:
        return None

    def save(self, spec: AttackSpec, restart: int, block: int, attacked: AttackedBlock) -> None:
        return None

    def name(self, spec: AttackSpec, restart: int, block: int) -> str:
        return f"{spec.name}/{restart}/{block}"

    def within(self, name: str) -> NoStore:
        return self


@contextmanager
def pass_progress(victim: Hasher, progress: Progress, title: str, total: int = 0) -> Iterator[None]:
    """Show the forward passes of a victim as the progress of what calls it inside.

    Args:
        total: passes that are expected; 0 where nobody knows.
    """
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        progress(min(done, total) if total else done, total, f"{title}: forward passes")

    hook = victim.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def shared(store: BlockStore) -> bool:
    """True where several processes work together and divide the blocks of a store."""
    return world() > 1 and not isinstance(store, NoStore)


@dataclass(frozen=True)
class AttackRuns:
    """All results of the attacks of a suite. Attacked inputs are left out: the store has them.

    ``noise`` holds (2, S, Q, K) int8 codes of a randomised victim under S draws of its noise: one set to
    choose the worst case by, one to score it by; of each "attack/restart".
    """

    specs: tuple[AttackSpec, ...]
    blocks: dict[str, tuple[AttackedBlock, ...]]  # by attack, all queries of each restart
    noise: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def signs(self, spec: str) -> Tensor:
        """(R, Q, T, K) int8 attacked codes of an attack."""
        return torch.stack([attacked.signs for attacked in self.blocks[spec]])


@dataclass
class BlockRunner:
    """Runs attacks on blocks, takes those that are stored, and halves the batch where memory is too small.

    Args:
        warn: takes a line on every size that did not fit.
    """

    context: EvaluationContext
    store: BlockStore = NoStore()
    warn: Callable[[str], None] = warn
    narrow: EvaluationContext = field(init=False)  # the context by the batch size that fits
    fitted: dict[tuple[str, str], AttackSpec] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.narrow = self.context

    def queries(self, spec: AttackSpec, restart: int = 0, progress: Progress = silent) -> AttackedBlock:
        """Every block of queries under one attack, joined."""
        blocks = []
        with shown_by(progress):
            self.divided(lambda block: self.block(spec, restart, block), progress, spec.name)
            for block in range(self.context.blocks):
                blocks.append(self.block(spec, restart, block))
                progress(block + 1, self.context.blocks, spec.name)
        return AttackedBlock.join(blocks)

    def divided(self, work: Callable[[int], object], progress: Progress, title: str) -> None:
        """Do the work of each block in one of the processes of ``torchrun``; then the store has all of it.

        Nothing where there is one process, or no store that all share.
        """
        if shared(self.store):
            own = range(rank(), self.context.blocks, world())
            for place, block in enumerate(own):
                work(block)
                progress(place + 1, len(own), title)
            wait_for_others()

    def block(self, spec: AttackSpec, restart: int, block: int, start: Inputs | None = None) -> AttackedBlock:
        """One block: as it is stored, or run now and stored. The attack is fitted before its first block.

        Args:
            start: inputs to start from. By default restart 0 starts where the attack does, 1 and other odd
                ones anywhere in the ball, 2 and other even ones in a corner.

        Raises:
            ValueError: a stored block of other queries or codes; it is named.
        """
        attacked = self.store.load(spec, restart, block)
        if attacked is not None:
            size = self.context.batch_size
            rows = min(size, len(self.context.queries) - block * size)
            shape, expected = tuple(attacked.signs[:, 0].shape), (rows, self.context.victim.bits)
            if shape != expected:
                place, codes = self.store.name(spec, restart, block), "{} codes of {} bits".format
                remedy = "delete it to attack them again"
                raise ValueError(f"{place} holds {codes(*shape)} in place of {codes(*expected)}; {remedy}")
            return attacked
        key = (spec.name, spec.threat.name)
        if key not in self.fitted:
            self.fitted[key] = spec.fitted(self.context)
        if start is None and restart and restart % 2 == 0:
            batch = self.context.batch(block, spec.threat.balls)
            draws = Draws(self.context.seed, ("start", spec.name, str(restart)))
            start = corner_start(spec.threat, batch.inputs, batch.ids, draws)
        draws = Draws(self.context.seed, ("run", *map(str, (spec.name, restart, block))))
        with keyed_noise(draws.key(), self.context.victim.device):
            attacked = self._run(self.fitted[key], restart, block, start)
        self.store.save(spec, restart, block, attacked)
        return attacked

    def _run(self, spec: AttackSpec, restart: int, block: int, start: Inputs | None) -> AttackedBlock:
        """The block, at as many queries at a time as fit into memory: a divisor of the batch size."""

        def attacked(size: int) -> tuple[AttackedBlock, EvaluationContext]:
            same = size == self.narrow.batch_size
            narrow = self.narrow if same else replace(self.context, batch_size=size)
            count, parts = self.context.batch_size // size, []
            first = block * count
            for part in range(first, min(first + count, narrow.blocks)):
                rows = slice((part - first) * size, (part - first + 1) * size)
                begin = None if start is None else {name: value[rows] for name, value in start.items()}
                parts.append(spec.run(narrow, part, restart, begin))
            return AttackedBlock.join(parts), narrow

        (result, self.narrow), _ = halving(attacked, self.narrow.batch_size, "queries", "attacked", self.warn)
        return result


def run_attacks(
    context: EvaluationContext,
    specs: Sequence[AttackSpec],
    store: BlockStore = NoStore(),
    progress: Progress = silent,
    shard: tuple[int, int] = (0, 1),
) -> AttackRuns | None:
    """Attack every block with every restart of every attack; the processes of ``torchrun`` divide them.

    Args:
        shard: (i, n) runs only the blocks i, i + n, ...; processes that share a store divide the work so.

    Returns:
        The results; None of a shard of several, whose blocks are in the store.

    Raises:
        ValueError: a shard that is not there, or one of several without a store; two attacks of one name.
    """
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"there is no shard {number} of {shards}; they are counted from 0")
    if shards > 1 and isinstance(store, NoStore):
        raise ValueError(f"shard {number} of {shards} needs a store that all share, or its work is lost")
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two attacks are called {sorted(twice)[0]!r}; blocks are stored by name")
    if shards == 1 and shared(store):
        run_attacks(context, specs, store, progress, (rank(), world()))
        wait_for_others()
    notes: list[str] = []
    runner, blocks = BlockRunner(context, store, notes.append), range(number, context.blocks, shards)
    refines = any(isinstance(spec, RefinedAttack) for spec in specs)
    results: dict[str, list[list[AttackedBlock]]] = {s.name: [[] for _ in range(s.restarts)] for s in specs}
    noise: dict[str, list[Tensor]] = {}
    for place, block in enumerate(blocks):
        worst = _WorstInputs(context, block) if refines else None
        for spec, restart in _in_order(specs):
            start = worst.inputs if worst is not None and isinstance(spec, RefinedAttack) else None
            with shown_by(progress):
                attacked = runner.block(spec, restart, block, start)
            if worst is not None and not spec.targeted:
                worst.update(attacked)
            if context.randomised and not spec.targeted and shards == 1:
                codes = runner.narrow.noise_codes(spec.name, restart, block, attacked.inputs)
                noise.setdefault(f"{spec.name}/{restart}", []).append(codes)
            # inputs of all attacks at once would fill the memory
            results[spec.name][restart].append(replace(attacked, inputs=attacked.inputs[:, :0]))
            progress(place * spec.restarts + restart + 1, spec.restarts * len(blocks), spec.name)
    if shards > 1:
        return None
    joined = {name: tuple(AttackedBlock.join(parts) for parts in runs) for name, runs in results.items()}
    samples = {name: torch.cat(parts, 2) for name, parts in noise.items()}
    if any(isinstance(spec, GradientAttack) for spec in specs) and context.scale.note:
        notes.append(context.scale.note)
    return AttackRuns(tuple(specs), joined, samples, (*context.notes, *notes))


def _in_order(specs: Sequence[AttackSpec]) -> Iterator[tuple[AttackSpec, int]]:
    """Each attack and restart; those that refine are identified by the attacks before them."""
    before: list[AttackSpec] = []
    for spec in specs:
        settled = spec.following(before) if isinstance(spec, RefinedAttack) else spec
        yield from ((settled, restart) for restart in range(spec.restarts))
        if not spec.targeted:
            before.append(settled)


class _WorstInputs:
    """The inputs of lowest AP so far of each query of a block; at first the clean ones."""

    def __init__(self, context: EvaluationContext, block: int) -> None:
        batch = context.batch(block)
        rows = batch.ids.cpu()
        self._modality = context.direction[0]
        self._inputs = batch.inputs[self._modality].clone()
        self._metric = context.select(context.query_labels[rows], -1)
        self._value = self._metric(context.query.rows()[rows])

    @property
    def inputs(self) -> Inputs:
        return {self._modality: self._inputs.clone()}

    def update(self, attacked: AttackedBlock) -> None:
        """Take those of lower AP; of equals the first stays."""
        value = self._metric(attacked.signs[:, 0])
        lower = value > self._value
        self._value = torch.where(lower, value, self._value)
        self._inputs[lower.to(self._inputs.device)] = attacked.inputs[lower].to(self._inputs)


def corner_start(threat: Threat, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
    """A random corner of the ball for each item: the farthest start (of edits: all spent at random)."""
    if threat.edits:
        return threat.random_start(origin, ids, draws)
    numbers = {
        name: draws.within("corner", name).uniform(ids, origin[name].shape[1:]).to(origin[name].dtype)
        for name in threat.balls
    }
    corner = threat.corner(numbers)
    moved = {name: origin[name] + threat.balls[name].eps * step for name, step in corner.items()}
    return threat.project(moved, origin)
