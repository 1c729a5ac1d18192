"""The expensive part of a suite: every line, restart and block of queries, kept as it comes, run again by nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from robusthash.attacks.threat import Threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.evaluation.attacked import Attacked, encode_signs
from robusthash.evaluation.bench import Bench, Progress, in_parts, silent
from robusthash.evaluation.evaluate import ap_alone, ap_names, as_codes, measure_codes
from robusthash.evaluation.lines import Line, Refined
from robusthash.models.views import keyed_noise

LOOKS = 20  # draws of a randomised victim's noise under which a candidate is scored


class Keep(Protocol):
    """Where attacked blocks are kept, so that an interrupted suite goes on and shards meet."""

    def load(self, line: Line, restart: int, block: int) -> Attacked | None:
        """What was kept of this very line (its ``settings()``), or None."""

    def save(self, line: Line, restart: int, block: int, attacked: Attacked) -> None:
        """Keep a block; it is complete or not there, whatever happens."""

    def within(self, name: str) -> Keep:
        """A keep of its own inside this one, for blocks of other queries or other starts."""


class Forget:
    """Keeps nothing."""

    def load(self, line: Line, restart: int, block: int) -> Attacked | None:
        return None

    def save(self, line: Line, restart: int, block: int, attacked: Attacked) -> None:
        return None

    def within(self, name: str) -> Forget:
        return self


@dataclass(frozen=True)
class Attempt:
    """One restart of one line over all queries. The attacked inputs are not held: a keep has them."""

    attacked: Attacked
    looks: Tensor | None = None  # (2, L, Q, K) int8 codes of a randomised victim under noise: to choose by, to score by


@dataclass(frozen=True)
class Attempts:
    """All that the lines of a suite came back with."""

    lines: tuple[Line, ...]
    found: dict[str, tuple[Attempt, ...]]  # by line, one for each restart
    clean: Tensor | None  # (2, L, Q, K) the clean queries of a randomised victim under noise
    notes: tuple[str, ...] = ()

    def signs(self, line: str) -> Tensor:
        """(R, Q, T, K) int8 attacked codes of a line."""
        return torch.stack([attempt.attacked.signs for attempt in self.found[line]])


def corner_start(threat: Threat, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
    """A random corner of the ball for each item: the farthest start (an edit budget: all edits spent at random)."""
    if threat.edits:
        return threat.random_start(origin, ids, draws)
    drawn = {
        name: draws.within("corner", name).uniform(ids, origin[name].shape[1:]).to(origin[name].dtype)
        for name in threat.balls
    }
    steps = threat.corner(drawn)
    return threat.project({name: origin[name] + threat.balls[name].eps * step for name, step in steps.items()}, origin)


@dataclass
class Attacker:
    """Runs blocks, takes what is kept, and halves the batch where memory does not suffice (which it notes)."""

    bench: Bench
    keep: Keep = field(default_factory=Forget)
    notes: list[str] = field(default_factory=list)
    parts: Bench = field(init=False)  # of the batch size that fits
    fitted: dict[tuple[str, str], Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = self.bench

    def block(self, line: Line, restart: int, block: int, start: Inputs | None = None) -> Attacked:
        """One block: as it was kept, or run now and kept.

        Args:
            start: inputs to start from. By default restart 0 starts where the line does, 1 and other odd ones anywhere
                in the ball, 2 and other even ones in a corner.
        """
        found = self.keep.load(line, restart, block)
        if found is not None:
            return found
        key = (line.name, line.threat.name)
        if key not in self.fitted:
            self.fitted[key] = line.fitted(self.bench)
        if start is None and restart and restart % 2 == 0:
            batch = self.bench.batch(block, line.threat.balls)
            draws = Draws(self.bench.seed, ("start", line.name, str(restart)))
            start = corner_start(line.threat, batch.inputs, batch.ids, draws)
        draws = Draws(self.bench.seed, ("run", *map(str, (line.name, restart, block))))
        with keyed_noise(draws.key(), self._device):
            found = self._run(self.fitted[key], restart, block, start)
        self.keep.save(line, restart, block, found)
        return found

    @property
    def _device(self) -> torch.device:
        return self.bench.victim.device

    def _run(self, line: Line, restart: int, block: int, start: Inputs | None) -> Attacked:
        def part(parts: Bench, number: int, rows: slice) -> Attacked:
            own = None if start is None else {name: value[rows] for name, value in start.items()}
            return line.run(parts, number, restart, own)

        found, self.parts = in_parts(self.bench, self.parts, block, part, self.notes.append)
        return Attacked.join(found)

    def looks(self, name: str, restart: int, block: int, inputs: Tensor) -> Tensor:
        """(2, L, B, K) int8 codes of inputs of a block under two separate sets of keyed noise draws."""
        victim, modality = self.bench.victim, self.bench.direction[0]
        sets = []
        for purpose in ("choose", "score"):
            draws = Draws(self.bench.seed, ("looks", purpose, *map(str, (name, restart, block))))
            codes = []
            for look in range(LOOKS):
                with keyed_noise(draws.within(look).key(), self._device):
                    parts = inputs.to(self._device).split(self.parts.batch_size)
                    codes.append(torch.cat([encode_signs(victim, modality, part) for part in parts]))
            sets.append(torch.stack(codes))
        return torch.stack(sets)


def randomised(bench: Bench) -> bool:
    """Whether the victim says that its codes are random."""
    return bench.victim.declared == "randomised"


def run_lines(
    bench: Bench,
    lines: Sequence[Line],
    keep: Keep | None = None,
    progress: Progress = silent,
    shard: tuple[int, int] = (0, 1),
) -> Attempts | None:
    """Attack every block with every restart of every line.

    Args:
        shard: (i, n) runs only the blocks i, i + n, ...; several processes that share a keep divide the work so.

    Returns:
        What was found; None for a shard of several, whose blocks are in the keep.

    Raises:
        ValueError: a shard that is not there, or one of several without a keep; two lines of one name.
    """
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"there is no shard {number} of {shards}; they are counted from 0")
    if shards > 1 and keep is None:
        raise ValueError(f"shard {number} of {shards} needs a keep that all shards share, or its work is lost")
    names = [line.name for line in lines]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two lines are called {sorted(twice)[0]!r}; what is kept goes by name")
    attacker = Attacker(bench, keep or Forget())
    blocks = range(number, bench.blocks, shards)
    done: dict[tuple[str, int], list[Attempt]] = {(line.name, n): [] for line in lines for n in range(line.restarts)}
    for place, block in enumerate(blocks):
        worst = _Worst(bench, block) if any(isinstance(line, Refined) for line in lines) else None
        for line, restart in _in_order(lines):
            start = worst.inputs if worst is not None and isinstance(line, Refined) else None
            attacked = attacker.block(line, restart, block, start)
            if worst is not None and not line.targeted:
                worst.offer(attacked)
            looked = randomised(bench) and not line.targeted and shards == 1
            looks = attacker.looks(line.name, restart, block, attacked.inputs) if looked else None
            # inputs of all lines at once would fill the memory
            done[line.name, restart].append(Attempt(replace(attacked, inputs=attacked.inputs[:, :0]), looks))
            progress(place * line.restarts + restart + 1, line.restarts * len(blocks), line.name)
    if shards > 1:
        return None
    found = {line.name: tuple(_joined(done[line.name, n]) for n in range(line.restarts)) for line in lines}
    clean = _clean_looks(bench, attacker) if randomised(bench) else None
    return Attempts(tuple(lines), found, clean, (*bench.notes, *attacker.notes))


def _in_order(lines: Sequence[Line]) -> Iterator[tuple[Line, int]]:
    """Each line and restart; those that refine know what they follow."""
    before: list[Line] = []
    for line in lines:
        settled = line.following(before) if isinstance(line, Refined) else line
        yield from ((settled, restart) for restart in range(line.restarts))
        if not line.targeted:
            before.append(settled)


def _joined(parts: Sequence[Attempt]) -> Attempt:
    looks = [part.looks for part in parts if part.looks is not None]
    return Attempt(Attacked.join([part.attacked for part in parts]), torch.cat(looks, 2) if looks else None)


class _Worst:
    """Of each query of a block, the inputs of lowest AP so far; at first the clean ones."""

    def __init__(self, bench: Bench, block: int) -> None:
        batch = bench.batch(block)
        self._modality = bench.direction[0]
        self._held = batch.inputs[self._modality].clone()
        self._metric = bench.select(bench.query_labels[batch.ids.cpu()], -1)
        self._value = self._metric(bench.query.signs()[batch.ids.cpu()])

    @property
    def inputs(self) -> Inputs:
        return {self._modality: self._held.clone()}

    def offer(self, attacked: Attacked) -> None:
        """Take what is lower; of equals the first stays."""
        value = self._metric(attacked.signs[:, 0])
        lower = value > self._value
        self._value = torch.where(lower, value, self._value)
        self._held[lower.to(self._held.device)] = attacked.inputs[lower].to(self._held)


def _clean_looks(bench: Bench, attacker: Attacker) -> Tensor:
    parts = [
        attacker.looks("clean", 0, block, bench.batch(block).inputs[bench.direction[0]])
        for block in range(bench.blocks)
    ]
    return torch.cat(parts, 2)


def mean_ap(bench: Bench, looks: Tensor) -> dict[str, Tensor]:
    """(Q,) each AP of the protocol, averaged over (L, Q, K) codes under noise. Never the lowest of them."""
    bench = ap_alone(bench)
    measured = [measure_codes(bench, as_codes(codes), bench.query_labels).per_query for codes in looks]
    return {name: torch.stack([values[name] for values in measured]).mean(0) for name in ap_names(measured[0])}
