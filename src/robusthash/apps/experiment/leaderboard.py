"""Run directories -> leaderboards, one a setting, with intervals, flags and best-known values.

Only results that ``Setting.differs`` finds alike share a leaderboard. Three training seeds of a recipe make
one row, a claim about the method; fewer stay rows of single checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment.certify_run import COLUMN, certified_intervals, certified_text
from robusthash.apps.experiment.evidence_run import accepted, lowered
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.tables import Cell, cell_of, require_distinct_seeds
from robusthash.apps.reports import pages
from robusthash.apps.reports.cell_text import markdown_cell
from robusthash.core.runtime import digest
from robusthash.metrics.comparison import METHOD_SEEDS, Claim, ComparedModel, claim_of, compare_all
from robusthash.metrics.results import EvalResult, Flag, Setting, by_direction
from robusthash.metrics.robustness_measures import hrs
from robusthash.metrics.statistics import hierarchical_interval
from robusthash.robustness.checks.base import OF_A_SUITE


@dataclass(frozen=True)
class Checkpoint:
    """One trained model in one setting."""

    run: Run
    own: EvalResult  # our own worst case
    known: EvalResult  # the same, lowered by accepted bundles
    clean: EvalResult | None  # of the same queries; a suite's own choice of queries may have none
    parts: Mapping[str, EvalResult]  # single attacks, where they are stored
    red: tuple[Flag, ...]  # red flags of the model itself, by ``check`` or by any suite of the same direction


@dataclass(frozen=True)
class RankedModel:
    """One row of a leaderboard: a method, or a checkpoint."""

    name: str
    claim: Claim
    records: tuple[Checkpoint, ...]  # training seeds
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
    certified: dict[str, tuple[float, float | None]]  # and attacked MAP by method and budget, of ``certify``
    flags: tuple[Flag, ...]  # amber and red
    checked: bool  # any sanity check was run
    aggregate: dict[str, ComparedModel] = field(
        default_factory=dict
    )  # by column; empty where it is not ranked

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
class Leaderboard:
    """The models of one setting, best-known value first, the unreliable ones last."""

    setting: Setting
    measure: str
    rows: tuple[RankedModel, ...]

    @property
    def data(self) -> str:
        return self.setting.data.name

    @property
    def id(self) -> str:
        """Identity of the setting: the same for leaderboards that ``Setting.differs`` finds alike."""
        return digest(_shared(self.setting), 6)

    @property
    def title(self) -> str:
        setting, count = self.setting, len(self.setting.attacks)
        direction = f", {setting.direction}" if setting.direction else ""
        tier = f", {setting.tier} tier" if setting.tier else ""
        attacks = f"{count} attack{'s' if count != 1 else ''}"
        return f"{self.data}{direction}, {setting.threat}{tier}, {attacks} ({self.id})"

    @property
    def methods(self) -> bool:
        return any(row.claim == "method" for row in self.rows)


def _shared(setting: Setting) -> dict[str, Any]:
    """The fields that all rows of a leaderboard share; the text of a budget only without its digest."""
    plain = {**setting.comparable(), "chosen": setting.chosen}
    return {name: value for name, value in plain.items() if name != "budget" or name not in setting.digests}


def make_leaderboards(paths: Sequence[Path]) -> list[Leaderboard]:
    """Leaderboards of all evaluated runs, ordered by data, threat and number of rows.

    Raises:
        RunError: a directory that is no evaluated run.
        ValueError: a run given twice, no run with a worst case, or two runs of one recipe with the same
            training seed.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise ValueError("a run directory is given twice")
    groups: list[list[Checkpoint]] = []
    for checkpoint in [checkpoint for path in paths for checkpoint in _checkpoints(load_run(path))]:
        alike = [group for group in groups if not group[0].own.setting.differs(checkpoint.own.setting)]
        if alike:
            alike[0].append(checkpoint)
        else:
            groups.append([checkpoint])
    if not groups:
        raise ValueError(
            "none of these runs was attacked; give evaluation.attacks, or run 'robusthash assess'"
        )
    boards = [_board(group) for group in groups]
    return sorted(boards, key=lambda b: (b.data, b.setting.direction, b.setting.threat, -len(b.rows)))


def _checkpoints(run: Run) -> list[Checkpoint]:
    """Every worst case of a run: of its evaluation by direction and relevance, and of every suite."""
    assessed, bundles = run.assessed(), accepted(run)
    evaluated = {} if assessed and not run.was_evaluated else run.evaluated()
    groups = list(by_direction(evaluated).values())
    worst = [(group["worst"], group) for group in groups if "worst" in group]
    for own in assessed.values():
        alike = [group["clean"] for group in groups if _same_queries(group["clean"].setting, own.setting)]
        if own.setting.key.name("worst") in own.values:
            worst.append((own, {"clean": alike[0]} if alike else {}))
    checkpoints = []
    for own, group in worst:
        parts = {name: result for name, result in group.items() if name not in ("clean", "worst")}
        suites = [r for r in assessed.values() if r.setting.direction == own.setting.direction]
        flags = [*run.checked(), *(flag for result in suites for flag in result.flags)]
        red = tuple(flag for flag in flags if flag.level == "red" and flag.id not in OF_A_SUITE)
        checkpoints.append(Checkpoint(run, own, lowered(own, bundles), group.get("clean"), parts, red))
    return checkpoints


def _same_queries(one: Setting, other: Setting) -> bool:
    """The same but for what was attacked, and how."""
    return not set(one.differs(other)) - {"threat", "attacks", "budget", "seeds"}


def _board(checkpoints: Sequence[Checkpoint]) -> Leaderboard:
    setting, recipes = checkpoints[0].own.setting, dict[str, list[Checkpoint]]()
    for checkpoint in checkpoints:
        recipes.setdefault(f"{checkpoint.run.recipe} {checkpoint.own.setting.bits}", []).append(checkpoint)
    groups = []
    for seeds in recipes.values():
        require_distinct_seeds([checkpoint.run for checkpoint in seeds])
        groups += [seeds] if len(seeds) >= METHOD_SEEDS else [[checkpoint] for checkpoint in seeds]
    names = [group[0].run.config.name for group in groups]
    rows = []
    for name, group in zip(names, groups, strict=True):
        unique = len(group) >= METHOD_SEEDS and names.count(name) == 1
        rows.append(_row(name if unique else f"{name}/{group[0].run.id}", group))
    rows = sorted(_ranked(rows, setting), key=lambda row: (row.unreliable, -row.known.value, row.name))
    return Leaderboard(setting, setting.headline, tuple(rows))


def _row(name: str, checkpoints: Sequence[Checkpoint]) -> RankedModel:
    key = checkpoints[0].own.setting.key
    measure, low, target = str(key), key.name("worst"), key.name("targeted")
    own, known = [c.own for c in checkpoints], [c.known for c in checkpoints]
    cleans = [c.clean for c in checkpoints if c.clean is not None]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(known)

    worst, chance = cell_of(own, low), mean([result.reference["chance"] for result in known])
    clean, clean_interval = mean([result.reference["clean"] for result in known]), None
    hrs = mean([result["HRS"] for result in known])
    hrs_interval = known[0].interval.get("HRS") if len(known) == 1 else None
    if len(cleans) == len(checkpoints):
        cell = cell_of(cleans, measure)
        clean, clean_interval = cell.value, cell.interval
        if len(checkpoints) > 1:
            lowest = torch.stack([result.per_query[low] for result in known])
            hrs, hrs_interval = _hrs(torch.stack([r.per_query[measure] for r in cleans]), lowest, chance)
    shared = [a for a in known[0].attacks if all(measure in r.attacks.get(a, {}) for r in known)]
    reached = [values[target] for r in known for values in r.attacks.values() if target in values]
    flags = [flag for c in checkpoints for r in (c.own, *c.parts.values()) for flag in r.flags]
    flags += [flag for c in checkpoints for flag in c.red]
    raised = {(flag.id, flag.level): flag for flag in flags if flag.level != "pass"}
    return RankedModel(
        name=name,
        claim=claim_of(len(checkpoints)),
        records=tuple(checkpoints),
        clean=clean,
        clean_interval=clean_interval,
        worst=worst,
        known=worst if known == own else cell_of(known, low),
        sources=("own", *sorted({w for r in known for w in r.winner if w.startswith("evidence ")})),
        hrs=hrs,
        hrs_interval=hrs_interval,
        chance=chance,
        targeted=max(reached, default=None),
        attacks={attack: mean([r.attacks[attack][measure] for r in known]) for attack in shared},
        certified=certified_intervals([c.run for c in checkpoints], own[0].setting),
        flags=tuple(raised[key] for key in sorted(raised)),
        checked=bool(flags) or any(c.run.checked() for c in checkpoints),
    )


def _hrs(clean: Tensor, worst: Tensor, chance: float) -> tuple[float, tuple[float, float]]:
    """Harmonic robustness score of (S, Q) values of S seeds, and its interval over seeds and queries."""
    columns = torch.stack([clean, worst, torch.full_like(clean, chance)], 2)
    columns = columns[:, ~columns.isnan().any(2).any(0)]

    def score(means: Tensor) -> Tensor:
        return hrs(means[:, 0], means[:, 1], means[:, 2])

    return float(score(columns.mean((0, 1))[None])[0]), hierarchical_interval(columns, statistic=score)


def _ranked(rows: Sequence[RankedModel], setting: Setting) -> list[RankedModel]:
    """The rows compared with the best of each column; unreliable ones take no part."""
    sound = {row.name: row for row in rows if not row.unreliable}
    if not sound:
        return list(rows)
    table = {setting.key.name("worst"): {name: [c.known for c in row.records] for name, row in sound.items()}}
    cleans = {name: [c.clean for c in row.records if c.clean is not None] for name, row in sound.items()}
    if all(len(cleans[name]) == len(row.records) for name, row in sound.items()):
        table[setting.headline] = cleans
    rankings = compare_all(table)
    return [
        replace(row, aggregate={c: rankings[c][row.name] for c in rankings}) if row.name in sound else row
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------- text


def remark(row: RankedModel) -> str:
    """The flags of a row, which must be seen before its number."""
    return pages.remark(row.flags, row.checked)


def claim_text(row: RankedModel) -> str:
    """``method, 3 seeds`` or ``checkpoint``."""
    return f"method, {len(row.records)} seeds" if row.claim == "method" else "checkpoint"


def source_text(row: RankedModel) -> str:
    """The sources of the best-known value."""
    return " and ".join(row.sources)


def as_markdown(boards: Sequence[Leaderboard]) -> str:
    """One table a leaderboard, its setting below. Bold: not significantly different from the best at 5 %."""
    parts = ["# Leaderboard\n"]
    for board in boards:
        columns = _columns(board)
        lines = [
            f"## {markdown_cell(board.title)}",
            "",
            f"|  | {' | '.join(columns)} |",
            "|" + " --- |" * (len(columns) + 1),
        ]
        for rank, row in enumerate(board.rows, 1):
            lines.append(f"| {rank} | {' | '.join(cell(row) for cell in columns.values())} |")
        facts = "\n".join(f"* {name}: {markdown_cell(text)}" for name, text in setting_pairs(board, boards))
        parts.append("\n".join(lines) + f"\n\n{facts}\n")
    parts.append(legend(boards) + "\n")
    return "\n".join(parts)


def _columns(board: Leaderboard) -> dict[str, Callable[[RankedModel], str]]:
    """The cells of a row by the head of their column."""
    key, measure = board.setting.key, board.measure
    low = key.name("worst")
    columns: dict[str, Callable[[RankedModel], str]] = {
        "model": lambda row: f"{'**UNRELIABLE** ' * row.unreliable}{markdown_cell(row.name)}",
        "claim": claim_text,
        "bits": lambda row: str(row.setting.bits),
        "defense": lambda row: markdown_cell(row.setting.defense),
        f"clean {measure}": lambda row: _bold(_number(row.clean, row.clean_interval), row.bold(measure)),
        low: lambda row: row.worst.text(),
        f"best-known {low}": lambda row: _bold(row.known.text(), row.bold(low)),
        "by": lambda row: markdown_cell(source_text(row)),
    }
    if any(row.certified for row in board.rows):
        columns["certified to attacked"] = lambda row: certified_text(row.certified)
    columns["HRS"] = lambda row: _number(row.hrs, row.hrs_interval)
    if any(row.targeted is not None for row in board.rows):
        columns[f"highest {key.name('targeted')}"] = lambda row: (
            "-" if row.targeted is None else f"{row.targeted:.3f}"
        )
    return {**columns, "checks": lambda row: markdown_cell(remark(row))}


def _number(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def legend(boards: Sequence[Leaderboard]) -> str:
    """Explain the tables: of their columns and rows what some of them have."""
    text = (
        f"{pages.WORST_CASE} Best-known values count accepted evidence bundles too, "
        "which can only lower them. Bold: not significantly different from the best of the column at 5 % "
        "(paired, Holm over the table); unreliable models are not ranked. Intervals are 95 %"
    )
    if any(board.methods for board in boards):
        text += ": over training seeds and queries for a method, over queries for a checkpoint."
    else:
        text += ", over queries; each row is one checkpoint."
    return f"{text} {COLUMN}" if any(row.certified for board in boards for row in board.rows) else text


def setting_pairs(board: Leaderboard, boards: Sequence[Leaderboard] = ()) -> list[tuple[str, str]]:
    """Everything that the numbers depend on, and the fields that differ from others of this data and
    threat."""
    setting = board.setting
    alike = [
        b for b in boards if (b.data, b.setting.threat) == (board.data, setting.threat) and b is not board
    ]
    apart = "; ".join(f"{b.id} in {setting.difference(b.setting)}" for b in alike)
    rules = {key: value for key, value in setting.protocol.items() if key not in ("measures", "directions")}
    chances = sorted({round(row.chance, 3) for row in board.rows})
    return [
        ("queries", setting.query_description),
        ("database", setting.database),
        ("threat", setting.threat),
        ("attacks", ", ".join(setting.attacks)),
        ("budget", setting.budget),
        ("protocol", ", ".join(f"{key} {value}" for key, value in rules.items())),
        ("chance", " to ".join(f"{value:.3f}" for value in dict.fromkeys((chances[0], chances[-1])))),
        ("evaluation seeds", ", ".join(map(str, setting.seeds))),
        ("digests", ", ".join(f"{n} {v}" for n, v in setting.comparable()["digests"].items())),
        *([("not comparable with", apart)] if apart else []),
    ]


def as_plain(boards: Sequence[Leaderboard]) -> dict[str, Any]:
    """Everything as JSON takes it."""
    plain = [
        {
            "id": board.id,
            "title": board.title,
            "measure": board.measure,
            "setting": _shared(board.setting),
            "rows": [{"rank": rank, **_plain(row)} for rank, row in enumerate(board.rows, 1)],
        }
        for board in boards
    ]
    return {"schema": "robusthash.leaderboard/1", "boards": plain}


def _plain(row: RankedModel) -> dict[str, Any]:
    setting = row.setting
    return {
        "name": row.name,
        "claim": row.claim,
        "models": [checkpoint.own.setting.model for checkpoint in row.records],
        "bits": setting.bits,
        "objective": setting.objective,
        "defense": setting.defense,
        "training_attack": setting.training_attack,
        "clean": {"value": row.clean, "interval": row.clean_interval},
        "worst": asdict(row.worst),
        "best_known": {**asdict(row.known), "sources": row.sources},
        "HRS": {"value": row.hrs, "interval": row.hrs_interval},
        "chance": row.chance,
        "highest_targeted": row.targeted,
        "attacks": row.attacks,
        "certified": row.certified,
        "flags": [asdict(flag) for flag in row.flags],
        "checked": row.checked,
        "unreliable": row.unreliable,
        "standing": {column: asdict(ranking) for column, ranking in row.aggregate.items()},
    }
