"""Run directories -> boards: the models of one setting beside each other, with intervals, doubts and
best-known values.

Only results that ``Setting.differs`` finds alike share a board. Three training seeds of a recipe make one
row, a claim about the method; fewer stay rows of single checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from robusthash.apps.experiment.evidence_run import accepted, lowered
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.tables import Cell, cell_of
from robusthash.core.runtime import digest
from robusthash.metrics.comparison import METHOD_SEEDS, Claim, Standing, claim_of, compare_all
from robusthash.metrics.results import EvalResult, Flag, Setting, by_direction
from robusthash.metrics.robustness_measures import hrs_of
from robusthash.metrics.statistics import hierarchical_interval
from robusthash.robustness.checks.base import OF_A_SUITE


@dataclass(frozen=True)
class Record:
    """One checkpoint in one setting."""

    run: Run
    own: EvalResult  # our own worst case
    known: EvalResult  # the same, lowered by accepted bundles
    clean: EvalResult | None  # of the same queries; a suite's own choice of queries may have none
    parts: Mapping[str, EvalResult]  # single attacks, where they are kept
    said: tuple[
        Flag, ...
    ]  # what was seen of the same model elsewhere: by ``check``, by other suites of its direction

    @property
    def recipe(self) -> str:
        """What seeds of one recipe have in common, and no other recipe."""
        return f"{self.run.recipe} {self.own.setting.bits}"


@dataclass(frozen=True)
class Row:
    """One line of a board: a method, or a checkpoint."""

    name: str
    claim: Claim
    records: tuple[Record, ...]  # training seeds
    clean: float
    clean_interval: tuple[float, float] | None
    worst: Cell  # our own
    known: Cell  # best known
    sources: tuple[str, ...]  # of the best-known value: "own", and bundles that lowered it
    hrs: float
    hrs_interval: tuple[float, float] | None
    chance: float
    targeted: float | None  # highest t-MAP of the attacks that have a target
    attacks: dict[str, float]  # MAP under each, mean over seeds
    flags: tuple[Flag, ...]  # amber and red
    checked: bool  # any sanity check was run
    aggregate: dict[str, Standing] = field(default_factory=dict)  # by column; empty where it is not ranked

    @property
    def unreliable(self) -> bool:
        return any(flag.level == "red" for flag in self.flags)

    @property
    def setting(self) -> Setting:
        return self.records[0].own.setting

    def bold(self, column: str) -> bool:
        """Not significantly different from the best of the column."""
        return column in self.aggregate and self.aggregate[column].bold


@dataclass(frozen=True)
class Board:
    """The rows of one setting, best-known value first, the unreliable ones last."""

    setting: Setting
    measure: str
    rows: tuple[Row, ...]

    @property
    def data(self) -> str:
        return self.setting.database.partition(":")[0]

    @property
    def id(self) -> str:
        """Of the setting: the same for boards that ``Setting.differs`` finds alike."""
        return digest(comparable(self.setting), 6)

    @property
    def title(self) -> str:
        direction = f", {self.setting.direction}" if self.setting.direction else ""
        count, suite = len(self.setting.attacks), self.setting.budget.partition(",")[0]
        tier = f", {suite.removeprefix('suite ')} tier" if suite.startswith("suite ") else ""
        attacks = f"{count} attack{'s' if count != 1 else ''}"
        return f"{self.data}{direction}, {self.setting.threat}{tier}, {attacks} ({self.id})"

    @property
    def methods(self) -> bool:
        return any(row.claim == "method" for row in self.rows)


def comparable(setting: Setting) -> dict[str, object]:
    """The fields of a setting that all rows of a board share, as plain data."""
    plain = asdict(setting)
    for name in ("model", "bits", "objective", "defense", "training_attack", "software"):
        del plain[name]
    if "budget" in setting.digests:
        del plain["budget"]  # text that says the same
    plain["digests"] = {
        name: value for name, value in plain["digests"].items() if name not in ("model", "codes")
    }
    return plain


def make_boards(paths: Sequence[Path]) -> list[Board]:
    """Boards of all evaluated runs, ordered by data, threat and number of rows.

    Raises:
        RunError: a directory that is no evaluated run.
        ValueError: a run given twice, no run with a worst case, or two runs of one recipe with the same
            training seed.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise ValueError("a run directory is given twice")
    boards: list[list[Record]] = []
    for path in paths:
        for record in _records(load_run(path)):
            fitting = (held for held in boards if not held[0].own.setting.differs(record.own.setting))
            held = next(fitting, None)
            if held is None:
                boards.append([record])
            else:
                held.append(record)
    if not boards:
        raise ValueError(
            "none of these runs was attacked; give evaluation.attacks, or run 'robusthash assess'"
        )
    made = [_board(records) for records in boards]
    return sorted(
        made, key=lambda board: (board.data, board.setting.direction, board.setting.threat, -len(board.rows))
    )


def _records(run: Run) -> list[Record]:
    """Every worst case of a run: of its evaluation by direction and relevance, and of every tier of the
    suite."""
    assessed = list(run.assessed().values())
    evaluated = {} if assessed and not run.was_evaluated else run.evaluated()
    bundles, cleans, found = (
        accepted(run),
        [r for r in assessed if r.setting.threat == "none"],
        list[Record](),
    )
    for group in by_direction(evaluated).values():
        cleans.append(group["clean"])
        if "worst" in group:
            parts = {name: result for name, result in group.items() if name not in ("clean", "worst")}
            own = group["worst"]
            found.append(Record(run, own, lowered(own, bundles), group["clean"], parts, _said(run, own)))
    for own in assessed:
        if f"w{own.setting.headline}" in own.values:
            clean = next((c for c in cleans if _same_queries(c.setting, own.setting)), None)
            found.append(Record(run, own, lowered(own, bundles), clean, {}, _said(run, own)))
    return found


def _said(run: Run, own: EvalResult) -> tuple[Flag, ...]:
    """Red checks of the model itself, by ``check`` and by suites in this direction: they stand against any
    number."""
    alike = [
        result for result in run.assessed().values() if result.setting.direction == own.setting.direction
    ]
    found = [*run.checked(), *(flag for result in alike for flag in result.flags)]
    return tuple(flag for flag in found if flag.level == "red" and flag.id not in OF_A_SUITE)


def _same_queries(one: Setting, other: Setting) -> bool:
    """The same but for what was attacked, and how."""
    return not set(one.differs(other)) - {"threat", "attacks", "budget", "seeds"}


def _board(records: Sequence[Record]) -> Board:
    measure = records[0].own.setting.headline
    recipes: dict[str, list[Record]] = {}
    for record in records:
        recipes.setdefault(record.recipe, []).append(record)
    groups = []
    for seeds in recipes.values():
        trained = [record.run.config.runtime.seed for record in seeds]
        if len(set(trained)) != len(trained):
            where = ", ".join(str(record.run.path) for record in seeds)
            raise ValueError(f"training seeds {trained} of one recipe repeat ({where}); give each seed once")
        groups += [seeds] if len(seeds) >= METHOD_SEEDS else [[record] for record in seeds]
    names = _names(groups)
    rows = [_row(name, group, measure) for name, group in zip(names, groups, strict=True)]
    rows = _ranked(rows, measure)
    rows.sort(key=lambda row: (row.unreliable, -row.known.value, row.name))
    return Board(records[0].own.setting, measure, tuple(rows))


def _names(groups: Sequence[Sequence[Record]]) -> list[str]:
    """The recipe's name; with the id of the run where that is a checkpoint, or two recipes share a name."""
    plain = [group[0].run.config.name for group in groups]
    return [
        name if len(group) >= METHOD_SEEDS and plain.count(name) == 1 else f"{name}/{group[0].run.id}"
        for name, group in zip(plain, groups, strict=True)
    ]


def _row(name: str, records: Sequence[Record], measure: str) -> Row:
    low = f"w{measure}"
    own, known = [record.own for record in records], [record.known for record in records]
    worst = cell_of(own, low)
    best = worst if all(one is other for one, other in zip(own, known, strict=True)) else cell_of(known, low)
    cleans = [record.clean for record in records if record.clean is not None]
    chance = sum(result.reference["chance"] for result in known) / len(known)
    hrs = sum(result.values["HRS"] for result in known) / len(known)
    hrs_interval = known[0].interval.get("HRS") if len(known) == 1 else None
    clean: float = sum(result.reference["clean"] for result in known) / len(known)
    clean_interval: tuple[float, float] | None = None
    if len(cleans) == len(records):
        cell = cell_of(cleans, measure)
        clean, clean_interval = cell.value, cell.interval
        if len(records) > 1:
            lowest = torch.stack([result.per_query[low] for result in known])
            hrs, hrs_interval = _hrs(torch.stack([r.per_query[measure] for r in cleans]), lowest, chance)
    attacks = {
        attack: sum(result.attacks[attack][measure] for result in known) / len(known)
        for attack in known[0].attacks
        if all(measure in result.attacks.get(attack, {}) for result in known)
    }
    reached = [
        v for r in known for part in r.attacks.values() for n, v in part.items() if n == f"t-{measure}"
    ]
    lowering = {winner for r in known for winner in r.winner if winner.startswith("evidence ")}
    own_flags = [
        flag for record in records for result in (record.own, *record.parts.values()) for flag in result.flags
    ]
    flags = [*own_flags, *(flag for record in records for flag in record.said)]
    raised = {(flag.id, flag.level): flag for flag in flags if flag.level != "pass"}
    return Row(
        name=name,
        claim=claim_of(len(records)),
        records=tuple(records),
        clean=clean,
        clean_interval=clean_interval,
        worst=worst,
        known=best,
        sources=("own", *sorted(lowering)),
        hrs=hrs,
        hrs_interval=hrs_interval,
        chance=chance,
        targeted=max(reached) if reached else None,
        attacks=attacks,
        flags=tuple(raised[key] for key in sorted(raised)),
        checked=bool(flags) or any(record.run.checked() for record in records),
    )


def _hrs(clean: Tensor, worst: Tensor, chance: float) -> tuple[float, tuple[float, float]]:
    """Harmonic robustness score of (S, Q) values of S seeds, and its interval over seeds and queries."""
    columns = torch.stack([clean, worst, torch.full_like(clean, chance)], 2)
    columns = columns[:, ~columns.isnan().any(2).any(0)]

    def score(means: Tensor) -> Tensor:
        return hrs_of(means[:, 0], means[:, 1], means[:, 2])

    return float(score(columns.mean((0, 1))[None])[0]), hierarchical_interval(columns, statistic=score)


def _ranked(rows: Sequence[Row], measure: str) -> list[Row]:
    """The rows with their standing beside the best of each column; unreliable ones stand beside nobody."""
    sound = {row.name: row for row in rows if not row.unreliable}
    if not sound:
        return list(rows)
    table: dict[str, dict[str, list[EvalResult]]] = {
        f"w{measure}": {name: [record.known for record in row.records] for name, row in sound.items()}
    }
    cleans = {name: [r.clean for r in row.records if r.clean is not None] for name, row in sound.items()}
    if all(len(cleans[name]) == len(row.records) for name, row in sound.items()):
        table[measure] = cleans
    found = compare_all(table)
    standings = {name: {column: found[column][name] for column in found} for name in sound}
    return [replace(row, aggregate=standings.get(row.name, {})) for row in rows]
