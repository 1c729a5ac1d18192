"""Boards -> Markdown and JSON; the words that the page uses as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from robusthash.apps.experiment.leaderboard import Board, Row, comparable
from robusthash.apps.reports import pages


def remark(row: Row) -> str:
    """What the checks say of a row: what must be seen before its number."""
    return pages.remark(row.flags, row.checked)


def claim_text(row: Row) -> str:
    """``method, 3 seeds`` or ``checkpoint``."""
    return f"method, {len(row.records)} seeds" if row.claim == "method" else "checkpoint"


def source_text(row: Row) -> str:
    """Who found the best-known value."""
    return " and ".join(row.sources) if len(row.sources) > 1 else row.sources[0]


def as_markdown(boards: Sequence[Board]) -> str:
    """One table a board, its setting below. Bold: not significantly different from the best at 5 %, after
    Holm."""
    parts = ["# Leaderboard\n"]
    for board in boards:
        low, targeted = f"w{board.measure}", any(row.targeted is not None for row in board.rows)
        head = [
            "",
            "model",
            "claim",
            "bits",
            "defense",
            f"clean {board.measure}",
            low,
            f"best-known {low}",
            "by",
            "HRS",
        ]
        head += [f"highest t-{board.measure}"] * targeted + ["checks"]
        lines = [f"## {board.title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for rank, row in enumerate(board.rows, 1):
            mark = "**UNRELIABLE** " if row.unreliable else ""
            cells = [
                str(rank),
                f"{mark}{row.name}",
                claim_text(row),
                str(row.setting.bits),
                row.setting.defense,
            ]
            cells.append(_strong(_number(row.clean, row.clean_interval), row.bold(board.measure)))
            cells.append(row.worst.text())
            cells += [
                _strong(row.known.text(), row.bold(low)),
                source_text(row),
                _number(row.hrs, row.hrs_interval),
            ]
            if targeted:
                cells.append("-" if row.targeted is None else f"{row.targeted:.3f}")
            lines.append(f"| {' | '.join([*cells, remark(row)])} |")
        parts.append(
            "\n".join(lines)
            + "\n\n"
            + "\n".join(f"* {n}: {v}" for n, v in setting_pairs(board, boards))
            + "\n"
        )
    parts.append(legend(any(board.methods for board in boards)) + "\n")
    return "\n".join(parts)


def legend(methods: bool) -> str:
    """How to read the tables; what is said of methods only where there are some."""
    text = (
        f"{pages.WORST_CASE} Best-known values count accepted evidence bundles too, "
        "which can only lower them. Bold: not significantly different from the best of the column at 5 % (paired, "
        "Holm over the table); unreliable models are not ranked. Intervals are 95 %"
    )
    if methods:
        return f"{text}: over training seeds and queries for a method, over queries for a checkpoint."
    return f"{text}, over queries; each row is one checkpoint."


def setting_pairs(board: Board, boards: Sequence[Board] = ()) -> list[tuple[str, str]]:
    """What the numbers of a board are a statement about, and in what it differs from ``boards`` of the same
    threat."""
    kin = [
        b
        for b in boards
        if b is not board and (b.data, b.setting.threat) == (board.data, board.setting.threat)
    ]
    apart = [f"{b.id} in {board.setting.difference(b.setting)}" for b in kin]
    setting = board.setting
    rules = {key: value for key, value in setting.protocol.items() if key not in ("measures", "directions")}
    chance = sorted({round(row.chance, 3) for row in board.rows})
    return [
        ("queries", setting.asked),
        ("database", setting.database),
        ("threat", setting.threat),
        ("attacks", ", ".join(setting.attacks)),
        ("budget", setting.budget),
        ("protocol", ", ".join(f"{key} {value}" for key, value in rules.items())),
        (
            "chance",
            " to ".join(
                f"{value:.3f}" for value in (chance if len(chance) == 1 else (chance[0], chance[-1]))
            ),
        ),
        ("evaluation seeds", ", ".join(map(str, setting.seeds))),
        ("digests", ", ".join(f"{n} {v}" for n, v in setting.digests.items() if n not in ("model", "codes"))),
        *([("not comparable with", "; ".join(apart))] if apart else []),
    ]


def as_plain(boards: Sequence[Board]) -> dict[str, Any]:
    """Everything as JSON takes it."""
    return {"schema": "robusthash.leaderboard/1", "boards": [_plain_board(board) for board in boards]}


def _plain_board(board: Board) -> dict[str, Any]:
    rows = []
    for rank, row in enumerate(board.rows, 1):
        rows.append(
            {
                "rank": rank,
                "name": row.name,
                "claim": row.claim,
                "models": [record.own.setting.model for record in row.records],
                "bits": row.setting.bits,
                "objective": row.setting.objective,
                "defense": row.setting.defense,
                "training_attack": row.setting.training_attack,
                "clean": {"value": row.clean, "interval": row.clean_interval},
                "worst": asdict(row.worst),
                "best_known": {**asdict(row.known), "sources": row.sources},
                "HRS": {"value": row.hrs, "interval": row.hrs_interval},
                "chance": row.chance,
                "highest_targeted": row.targeted,
                "attacks": row.attacks,
                "flags": [asdict(flag) for flag in row.flags],
                "checked": row.checked,
                "unreliable": row.unreliable,
                "standing": {column: asdict(aggregate) for column, aggregate in row.aggregate.items()},
            }
        )
    setting = comparable(board.setting)
    return {"id": board.id, "title": board.title, "measure": board.measure, "setting": setting, "rows": rows}


def _number(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _strong(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text
