"""Tables of docs/methods/copy-hash.md from the measurements of scripts/measure_copy_hash.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = Path("results/copy-hash.json")


def show_changes() -> None:
    """Recall after everyday changes within the radius of 1 false match in 100,000 pairs (in 10,000)."""
    rows = list(_rows().values())
    _table(
        ["change", *(f"{row['title']}, {row['bits']} bits" for row in rows)],
        [[change, *(_both(row["changes"][change]) for row in rows)] for change in next(iter(rows))["changes"]]
        + [
            ["radius in bits", *(f"{_radius(row, '1e-5')} ({_radius(row, '1e-4')})" for row in rows)],
            ["milliseconds", *(f"{row['milliseconds']:.1f}" for row in rows)],
        ],
    )


def show_attacks() -> None:
    """Recall and collisions under attack within the radius of 1 false match in 100,000 pairs."""
    heads = ["hash", "of 255", "recall, white box", "that, saved as JPEG 95", "recall, 1,000 queries"]
    heads.append("taken for another")
    lines = []
    for row in _rows().values():
        title = f"{row['title']}, {row['bits']} bits"
        for name, results in ((title, row["attacked"]), (_THROUGH, row.get("through resizing", {}))):
            for level, found in results.items():
                queries = f"{found['1,000 queries']:.2f}" if "1,000 queries" in found else ""
                cells = [found[key] for key in ("white box", "saved as JPEG 95")]
                numbers = [f"{cell:.2f}" for cell in cells]
                lines.append([name, level, *numbers, queries, f"{found['collisions']:.2f}"])
    _table(heads, lines)


def show_proofs() -> None:
    """Share of the photographs that provably stay within the radius, next to what attacks left."""
    lines = []
    for row in _rows().values():
        if "certified" in row:
            title = f"{row['title']}, {row['bits']} bits"
            lines.append([title, "proved", *(f"{share:.3f}" for share in row["certified"].values())])
            results = [row["attacked"].get(level) for level in row["certified"]]
            attacked = (f"{each['white box']:.2f}" if each else "" for each in results)
            lines.append([title, "attacked", *attacked])
    _table(["hash", "", *(f"{level} of 255" for level in next(iter(_rows().values()))["certified"])], lines)


_THROUGH = "copy-hash, 256 px files attacked through the resizing"


def _rows() -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(MEASURED.read_text())
    return rows


def _radius(row: dict[str, Any], rate: str) -> str:
    """In bits; none where more pairs than that share their very hash."""
    radius = row["radius"][rate]
    return "none" if radius < 0 else str(radius)


def _both(recall: dict[str, float]) -> str:
    return f"{recall['1e-5']:.3f} ({recall['1e-4']:.3f})"


def _table(heads: list[str], rows: list[list[str]]) -> None:
    import cog  # made again by every run of cog

    for line in [heads, ["---"] * len(heads), *rows]:
        cog.outl(f"| {' | '.join(line)} |")
