"""The verb ``search``, which is ``index search`` too."""

import json
from pathlib import Path
from typing import Annotated, Any

from rich.cells import cell_len
from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, Index, IndexRun, MaxPixels, Where, check_page
from robusthash.apps.commands.terminal import (
    answers,
    note,
    one_row,
    print_json,
    print_lines,
    print_table,
    printable,
)

_COPY = {True: "copy", False: "no copy"}


def search(
    directory: Index,
    image: Annotated[Path, Argument(help="Image file to search with.")],
    k: Annotated[int, Option("-k", "--k", min=1, max=10_000, help="Number of results.")] = 10,
    run: IndexRun = None,
    where: Where = None,
    html: Annotated[Path | None, Option(help="Write the results with their pictures to this page.")] = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Search an index by image file: the nearest items with their distances."""
    from robusthash.apps.experiment.index_filters import values_of
    from robusthash.apps.experiment.index_run import Reading, search_image

    check_page(html)
    limit = Reading.of(None, max_pixels).max_pixels
    hits = search_image(directory, image, run, k, where, limit)
    if where and not hits:
        note(values_of(directory, where))
    if html is not None:
        from robusthash.apps.reports.search_page import write_search_page
        from robusthash.index.index_address import address_without_password

        write_search_page(html, image, hits, address_without_password(directory), where, limit)
    if as_json:
        print_json(hits)
        return
    _print_hits(f"nearest to {image}", hits)
    if html is not None:
        print_lines([html])


def _print_hits(title: str, hits: list[dict[str, Any]]) -> None:
    """A table, or a line for each hit where a path would be broken, so that it can be copied."""
    rows, finds_copies = [], any("copy" in hit for hit in hits)
    for hit in hits:
        rest = {key: value for key, value in hit["payload"].items() if key not in ("path", "path_hex")}
        about = json.dumps(rest, ensure_ascii=False) if rest else ""
        copy = [_COPY[hit["copy"]]] if finds_copies else []
        place = hit["payload"].get("path") or "-"  # items that others added have none
        rows.append([place, hit["distance"], *copy, hit["id"], about])
    columns = ["path", "distance", *(["copy"] if finds_copies else []), "id", "payload"]
    widths = [max([cell_len(printable(row[at])) for row in rows] + [8]) + 3 for at in range(len(columns))]
    if sum(widths) < answers.width:
        print_table(title, columns, rows)
        return
    note(f"{title}: {', '.join(columns)}")
    print_lines("  ".join(one_row(cell) for cell in row if cell != "") for row in rows)
