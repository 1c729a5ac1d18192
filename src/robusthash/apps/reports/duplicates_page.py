"""The page of the copies in a folder: groups with their pictures."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from robusthash.apps.commands.terminal import printable
from robusthash.apps.reports.pages import picture_of, render
from robusthash.core.atomic_files import write_aside

if TYPE_CHECKING:
    from robusthash.apps.image_hash.duplicate_groups import Duplicates

PICTURES = 400
"""Pictures on a page, which holds them itself; further groups are listed by their paths."""


def write_duplicates_page(file: Path, found: Duplicates, max_pixels: int) -> None:
    """Write an HTML page of the groups that opens from disk."""
    left = PICTURES
    groups = []
    for group in found.groups:
        drawn = len(group) <= left
        left -= len(group) if drawn else 0
        groups.append(
            [
                {
                    "path": printable(copy.path),
                    "distance": copy.distance,
                    "picture": picture_of(Path(copy.path), max_pixels) if drawn else None,
                    "drawn": drawn,
                }
                for copy in group
            ]
        )
    text = render(
        "duplicates.html.j2",
        title="Copies among your images",
        groups=groups,
        found=found,
        plain=[printable(path) for path in islice(found.plain, 100)],
        skipped=[printable(one) for one in found.skipped[:100]],
    )
    with write_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")
