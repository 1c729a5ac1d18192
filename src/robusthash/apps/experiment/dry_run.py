"""Dry runs: a recipe built at its true size, one step of each of its parts, and what the whole would take.

Nothing is written. Data are read and the nets are made as they are; then one step of training, one step of
each attack and one block of the evaluation are timed on this device, and multiplied.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from robusthash.analysis.model_cost import size_of
from robusthash.apps.experiment.config import Component, Config, EvaluationSection
from robusthash.apps.experiment.config_parts import check_parts
from robusthash.apps.experiment.dry_run_parts import (
    DryRunRows,
    StepClock,
    device_words,
    peak_bytes,
    weight_bytes,
)
from robusthash.apps.experiment.evaluation_stages import attacks_of, ends_of
from robusthash.apps.experiment.model_stages import prepare_process, read_data
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.training_stages import (
    check_against_data,
    initial_hasher,
    make_recipe,
    origin_of,
    train_config,
)
from robusthash.attacks.base import Attack
from robusthash.core.hamming import pack, sign
from robusthash.core.labels import has_relevant
from robusthash.core.registry import build, check
from robusthash.core.runtime import PACKAGES, Draws, Progress, choose_device, silent
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData, Split
from robusthash.data.miniature import SPLITS, write_miniature
from robusthash.data.splits import stable_subset
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean
from robusthash.metrics.protocol import measure
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective
from robusthash.training.loop import fit
from robusthash.training.recipe import Recipe

MINIATURE_TIMES = (
    "times of a miniature say little: steps of a few generated items are scaled up; for an estimate leave "
    "--miniature and --batch out"
)

# What an attack is timed with, where it has such an option.
_LEAST = {"restarts": 1, "fit_steps": 20, "epochs": 1, "generator_epochs": 1}


@dataclass(frozen=True)
class Part:
    """One part of the whole: what was timed, in words, the seconds that it took, and those of the whole."""

    name: str
    timed: str
    seconds: float
    whole: float


@dataclass(frozen=True)
class DryRun:
    """Memory, size and time of a recipe on a device.

    Attributes:
        sizes: items of the splits of the whole.
        parameters: by modality, of encoder, head and purifier.
        macs: multiply-adds of one item, by modality.
        weight_bytes: of everything that training holds and saves, without gradients and optimisers.
        peak_bytes: most memory so far: allocated on a GPU, resident of the process on a CPU.
        step_seconds: of one step of training with the batch that was taken.
        parts: in order; their sum is the estimate.
        notes: what differs from the run that the recipe describes.
    """

    name: str
    device: str
    batch: int
    sizes: dict[str, int]
    parameters: dict[str, int]
    macs: dict[str, int]
    weight_bytes: int
    peak_bytes: int
    step_seconds: float
    parts: tuple[Part, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(part.whole for part in self.parts)


def dry_run(
    config: Config,
    base: Path = Path("."),
    *,
    miniature: bool = False,
    batch: int | None = None,
    progress: Progress = silent,
) -> DryRun:
    """Build a recipe at its true net and image size, take one step of each part, and estimate the whole.

    The runs that training starts from are part of it where they are recipes (``init_from``).

    Args:
        base: folder of the recipe, where a relative ``init_from`` is looked for first.
        miniature: generate a few items in the layout of the data set instead of reading it; see
            ``data.miniature``. The estimate is of the sizes of the set itself.
        batch: items of a step of training, of a block of queries and of database; by default those of the
            recipe. A smaller batch is quicker, and takes less memory than the run will. Parts that need
            more items than that take the fewest that they can.

    Raises:
        FileNotFoundError: data that are not there.
        ValueError: settings that do not fit together, as of a run.
    """
    if batch is not None and batch < 2:
        raise ValueError(f"batch must be at least 2, got {batch}")
    prepare_process(config)
    check_parts(config)
    notes: list[str] = []
    with TemporaryDirectory(prefix="robusthash-") as folder:
        rows = DryRunRows.of(config, batch)
        data, whole = _data(config, rows, Path(folder) if miniature else None, notes, progress)
        timings = _Timings(data, whole, rows, batch is not None, notes, progress)
        return timings.run(config, base)


def _data(
    config: Config, rows: DryRunRows, folder: Path | None, notes: list[str], progress: Progress
) -> tuple[RetrievalData, dict[str, int]]:
    """The data set, or its miniature in ``folder``, and the numbers of items of the set itself."""
    if folder is None:
        try:
            data = read_data(config, progress)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without the data: --miniature") from None
        return data, {name: len(data.splits[name]) for name in SPLITS}
    small = write_miniature(config.data, folder, max(4 * rows.train, rows.fitted), rows.query, rows.database)
    data = build("data", small.settings)
    official = ", ".join(
        f"{name} {len(data.splits[name])} for {size}" for name, size in small.official.items()
    )
    notes.append(MINIATURE_TIMES)
    notes.append(f"a generated miniature in place of {data.name}, splits scaled down: {official}")
    return data, small.official


@dataclass
class _Timings:
    """One dry run; ``parts`` and ``notes`` grow as it goes."""

    data: RetrievalData
    whole: dict[str, int]
    rows: DryRunRows
    smaller: bool  # batches than the recipe's
    notes: list[str]
    progress: Progress
    parts: list[Part] = field(default_factory=list)

    def run(self, config: Config, base: Path) -> DryRun:
        device = choose_device(config.runtime.device)
        clock = StepClock(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        recipe, objective, step = self._train(config, base, clock)
        victim = recipe.hasher
        one = {
            name: values[:1].to(device)
            for name, values in self.data.query.batch(torch.arange(1)).inputs.items()
        }
        sizes = {name: size_of(victim, {name: one[name]}) for name in victim.modalities}
        self._evaluate(config.evaluation, victim, objective, clock)
        if self.smaller:
            self.notes.append(
                f"steps and blocks of at most {self.rows.train} items, where the recipe has "
                f"{config.training.batch_size} and {config.evaluation.batch_size}: "
                "times are scaled up, memory is not"
            )
        return DryRun(
            name=config.name,
            device=device_words(device),
            batch=self.rows.train,
            sizes=self.whole,
            parameters={name: size.parameters for name, size in sizes.items()},
            macs={name: size.macs for name, size in sizes.items()},
            weight_bytes=weight_bytes(recipe),
            peak_bytes=peak_bytes(device),
            step_seconds=step,
            parts=tuple(self.parts),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _train(self, config: Config, base: Path, clock: StepClock) -> tuple[Recipe, HashObjective, float]:
        """Time a training, those that it starts from before; the recipe, its objective, seconds of a step."""
        origin, parent = origin_of(config, base), None
        if isinstance(origin, Run):
            parent = origin
        elif origin is not None:
            self._train(*origin, clock)
            self.notes.append(f"{origin[0].name} is trained first (init_from) and is part of the estimate")
        config = self._without_downloads(config)
        if config.runtime.compile:
            self.notes.append("runtime.compile is left out: compiling takes longer than a step")
        objective: HashObjective = build("objective", config.training.objective)
        check_against_data(config, self.data, objective)
        recipe = make_recipe(config, initial_hasher(config, self.data, parent), objective)
        count = 3 if clock.device.type == "cuda" else 1  # steps, of which the first warms a GPU up
        batch = min(self.rows.train, config.training.batch_size)
        epoch_size = count * batch
        share = recipe.epoch_items(epoch_size) / epoch_size  # an epoch may pass its items several times
        train = _some(self.data.train, max(self.rows.fitted, math.ceil(epoch_size / share)))
        settings = replace(train_config(config), epochs=1, batch_size=batch, compile=False)
        self.progress(0, 1, f"training {config.name}")
        clock.start()
        fit(recipe, replace(self.data, train=train), settings, clock)
        self.progress(1, 1, f"training {config.name}")
        began, first, *_, last, end = clock.times
        times = clock.steps()
        step, name = median(times[1:] or times), config.name
        with clock.timing() as seconds:
            encode_split(recipe.hasher, train, batch_size=batch)
        epochs, all_train = config.training.epochs, self.whole["train"]
        steps = epochs * math.ceil(recipe.epoch_items(all_train) / config.training.batch_size)
        scale = config.training.batch_size / batch
        setup, each = first - began, seconds() / len(train)
        self.parts += [
            Part(f"setup of {name}", f"{len(train)} items", setup, setup + each * all_train),
            Part(f"training of {name}", f"one step of {batch}", step, step * scale * steps),
            Part(f"ends of epochs of {name}", f"{len(train)} items", end - last, epochs * (end - last)),
        ]
        return recipe, objective, step

    def _without_downloads(self, config: Config) -> Config:
        """The config with new weights where a run would download some, or where the files are not here."""
        hasher = config.hasher
        parts = {name: self._offline(getattr(hasher, name)) for name in ("image", "text")}
        return config.model_copy(update={"hasher": hasher.model_copy(update=parts)})

    def _offline(self, component: Component | None) -> Component | None:
        if not isinstance(component, dict):
            return component
        changed = {
            key: self._offline(value) if isinstance(value, dict) else value
            for key, value in component.items()
        }
        weights = changed.get("weights")
        available = (
            weights is None or weights in (*PACKAGES, "package") or Path(str(weights)).expanduser().exists()
        )
        if available:
            return changed
        name, of_bert = changed.get("name"), ""
        del changed["weights"]
        if name == "transformer":
            changed["config"], of_bert = {"model_type": "bert"}, ", of the size of BERT-base"
        self.notes.append(
            f"{name} with random weights{of_bert} in place of {weights!r}, which change no cost"
        )
        return changed

    # ---------------------------------------------------------------------------------------- the evaluation

    def _evaluate(
        self, section: EvaluationSection, victim: Hasher, objective: HashObjective, clock: StepClock
    ) -> None:
        """Time one block of the evaluation in every direction, and a step of every attack on it."""
        data, again = _one_block(self.data, self.rows), len(section.relevance)
        query_count = min(section.queries or self.whole["query"], self.whole["query"])
        for direction in section.directions or (None,):
            titled, ends = f" {direction}" if direction else "", ends_of(direction)
            protocol, attacks = build("protocol", section.protocol), attacks_of(section)
            with clock.timing() as seconds:
                context = make_context(
                    victim, data, protocol, direction=ends, seed=section.seed, batch_size=len(data.query)
                )
                if attacks:
                    encode_split(victim, data.train, modality=context.direction[1])  # that attackers know
            items = len(data.query) + len(data.database) + len(data.train) * bool(attacks)
            whole = query_count + self.whole["database"] + self.whole["train"] * bool(attacks)
            took, results = seconds(), 1
            encoded = took * again * whole / items
            self.parts.append(Part(f"encoding{titled}", f"{items} items", took, encoded))
            score_clean(context)
            for name, (view, settings) in attacks.items():
                attack: Attack = build("attack", settings, objective=objective)
                if context.direction[0] in attack.threat.balls:
                    self.progress(0, 1, f"{name}{titled}")
                    context.known(attack)
                    self._attack(
                        context, name + titled, view, settings, objective, clock, query_count * again
                    )
                    results += 1
            block = min(query_count, section.batch_size)
            codes = _random_codes(context, block, self.whole["database"])
            with clock.timing() as seconds:
                measure(context.protocol, *codes)
            words, took = f"{block} queries in {self.whole['database']} items", seconds()
            self.parts.append(
                Part(f"scores{titled}", words, took, took * again * results * query_count / block)
            )

    def _attack(
        self,
        context: EvaluationContext,
        name: str,
        view: Any,
        settings: dict[str, Any],
        objective: HashObjective,
        clock: StepClock,
        query_count: int,
    ) -> None:
        """Time one step of an attack on a block, and the steps that fit it to the victim."""
        attack, full = _short(settings, objective), build("attack", settings, objective=objective)
        queries, known = len(context.queries), len(context.data.train)
        with clock.timing() as seconds:
            attacked = attack_all(context, attack, context.victim.as_seen_from(view))
        score_attack(context, attack, attacked)
        search, took, blocks = float(attacked.seconds.sum()), seconds(), query_count / queries
        steps = full.search.steps * full.restarts / (attack.search.steps * attack.restarts)
        rest = took - search
        if attacked.fitted.max():
            whole = full.guide.fit_size(self.whole["train"]) / attack.guide.fit_size(known)
            words = f"one of at most {math.ceil(whole):,} parts, on {known} items"
            self.parts.append(Part(f"fitting {name}", words, rest, rest * whole))
            rest = 0.0
        words = f"{attack.search.steps} of {full.search.steps} steps on {queries} queries"
        self.parts.append(Part(name, words, search + rest, (search * steps + rest) * blocks))


def _short(settings: dict[str, Any], objective: HashObjective) -> Attack:
    """The attack with as few steps as it takes."""
    accepted = inspect.signature(check("attack", settings)[0].make).parameters
    fewer = {name: least for name, least in _LEAST.items() if name in accepted}
    for steps in (1, 2) if "steps" in accepted else ():
        try:
            attack: Attack = build("attack", {**settings, **fewer, "steps": steps}, objective=objective)
            return attack
        except ValueError:  # APGD takes two
            continue
    attack = build("attack", {**settings, **fewer}, objective=objective)
    return attack


def _some(split: Split, count: int) -> Split:
    """``count`` items of a split, of all labels."""
    return split.take(stable_subset(split, count))


def _one_block(data: RetrievalData, rows: DryRunRows) -> RetrievalData:
    """One block of queries, of database, with an item that is relevant to a query, and of training items."""
    query = _some(data.query, rows.query)
    positions = stable_subset(data.database, rows.database)
    if query.labels is not None and data.database.labels is not None:
        relevant = torch.nonzero(has_relevant(data.database.labels, query.labels)).flatten()
        positions = torch.unique(torch.cat([relevant[:1], positions[: max(1, rows.database - 1)]]))
    train = _some(data.train, rows.database)  # of which attackers know the codes
    return replace(data, train=train, query=query, database=data.database.take(positions))


def _random_codes(
    context: EvaluationContext, queries: int, database: int
) -> tuple[Codes, Tensor, Codes, Tensor]:
    """Random codes and labels of this many queries and database items; they score as fast as true ones."""
    draws, bits = Draws(0, ("dry run",)), context.victim.bits

    def random_codes(count: int, name: str, labels: Tensor) -> tuple[Codes, Tensor]:
        ids = torch.arange(count)
        signs = sign(draws.within(name).uniform(ids, (bits,)) - 0.5)
        return Codes(pack(signs), bits, ids), labels[ids % len(labels)]

    query_codes = random_codes(queries, "query", context.query_labels)
    return *query_codes, *random_codes(database, "database", context.database_labels)
