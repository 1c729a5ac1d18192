"""Pages with pictures: the query of a search and what was found, and the copies in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robusthash.apps.commands.terminal import printable
from robusthash.apps.experiment.index_items import OWN_KEYS, named_file
from robusthash.apps.reports.pages import one_line, picture_of, render
from robusthash.core.atomic_files import write_text
from robusthash.data.image_files import MAX_PIXELS, path_text

if TYPE_CHECKING:
    from robusthash.apps.image_hash.duplicate_groups import Duplicates


def write_search_page(
    file: Path,
    query: Path | str,
    hits: Sequence[Mapping[str, Any]],
    index: str | Path,
    where: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write an HTML page of one search that opens from disk; a picture that is gone is named as such.

    Args:
        query: the path of an image file, or a sentence.
    """
    results = [
        {
            "path": printable(hit["payload"].get("path", f"item {hit['id']}")),
            "distance": hit["distance"],
            "is_copy": hit.get("copy"),
            "id": hit["id"],
            "picture": picture_of(_file_of(hit["payload"]), max_pixels),
            "about": [
                (printable(key), printable(one_line(value)))
                for key, value in hit["payload"].items()
                if key not in OWN_KEYS
            ],
        }
        for hit in hits
    ]
    asked: dict[str, Any]
    if isinstance(query, str):
        asked, title = {"sentence": printable(query)}, f"Pictures for: {printable(query)}"
    else:
        asked = {"path": printable(path_text(query)), "picture": picture_of(query, max_pixels)}
        title = f"Pictures like {printable(path_text(query.name))}"
    filtered = where and printable(where)
    home = printable(path_text(index))
    text = render("search.html.j2", title=title, query=asked, hits=results, index=home, where=filtered)
    write_text(file, text)


def _file_of(payload: Mapping[str, Any]) -> Path | None:
    """The file of an item, if its payload names one; ``path_hex`` counts only as the bytes of ``path``."""
    path, written = payload.get("path"), payload.get("path_hex")
    if not isinstance(path, str):
        return None
    return (named_file(path, written) if isinstance(written, str) else None) or Path(path)


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
    write_text(file, text)
