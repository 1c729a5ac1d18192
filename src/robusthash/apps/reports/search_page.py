"""The page of a search: the query and what was found, with their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robusthash.apps.commands.terminal import printable
from robusthash.apps.experiment.index_items import OWN_KEYS, named_file
from robusthash.apps.reports.pages import one_line, picture_of, render
from robusthash.core.atomic_files import write_aside
from robusthash.data.image_files import MAX_PIXELS, path_text


def write_search_page(
    file: Path,
    image: Path,
    hits: Sequence[Mapping[str, Any]],
    index: str | Path,
    where: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write an HTML page of one search that opens from disk; a picture that is gone is named as such."""
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
    query = {"path": printable(path_text(image)), "picture": picture_of(image, max_pixels)}
    title = f"Pictures like {printable(path_text(image.name))}"
    filtered = where and printable(where)
    home = printable(path_text(index))
    text = render("search.html.j2", title=title, query=query, hits=results, index=home, where=filtered)
    with write_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")


def _file_of(payload: Mapping[str, Any]) -> Path | None:
    """The file of an item, if its payload names one; ``path_hex`` counts only as the bytes of ``path``."""
    path, written = payload.get("path"), payload.get("path_hex")
    if not isinstance(path, str):
        return None
    return (named_file(path, written) if isinstance(written, str) else None) or Path(path)
