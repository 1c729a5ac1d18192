"""The verbs of ``index``, and ``search``, which is ``index search`` too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.cells import cell_len
from typer import Argument, Option, Typer

from robusthash.apps.commands.options import (
    AsJson,
    DecodingOptions,
    Device,
    Index,
    IndexRun,
    MaxPixels,
    ModelSource,
    Where,
    check_page,
    with_option_groups,
)
from robusthash.apps.commands.terminal import (
    answers,
    note,
    note_some,
    one_row,
    print_json,
    print_lines,
    print_table,
    printable,
    progress_bars,
)

app = Typer(help="Build and search an index of binary codes.", no_args_is_help=True)

Payload = Annotated[
    Path | None, Option(help="CSV or JSON lines with a column 'file'; the other columns are kept as payload.")
]
Codes = Annotated[
    Path | None, Option(help="Codes that 'robusthash encode --images' wrote; images is then their folder.")
]
OnDuplicate = Annotated[
    str, Option(help="A path that is held: update (if the file changed), skip, or error.")
]


@app.command("build")
@with_option_groups
def build(
    directory: Index,
    run: ModelSource,
    images: Annotated[
        Path | None, Option(help="Folder of images to index; by default a run's database split.")
    ] = None,
    engine: Annotated[
        str | None,
        Option(
            help="faiss, numpy (slow), faiss-ivf (approximate); in Milvus bin-flat, bin-ivf-flat "
            "(approximate); in PostgreSQL scan, hnsw (approximate). By default the exact one."
        ),
    ] = None,
    codes: Codes = None,
    payload: Payload = None,
    on_duplicate: OnDuplicate = "update",
    decoding: DecodingOptions = DecodingOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make an index of a folder of images, of a run's database split, or of codes that `encode` wrote.

    `--run copy-hash --images DIR` finds copies, and needs no training.
    An interrupted build goes on when it is repeated.
    """
    from robusthash.apps.experiment.index_run import Adding, Reading, build_index

    adding = Adding(on_duplicate, payload, Reading.of(decoding.workers, decoding.max_pixels), codes)
    with progress_bars() as progress:
        info = build_index(directory, run, images, engine, progress, adding)
    _print_info(info, as_json)


@app.command("add")
@with_option_groups
def add(
    directory: Index,
    images: Annotated[Path | None, Argument(help="Image file or folder of images.")] = None,
    run: IndexRun = None,
    codes: Codes = None,
    payload: Payload = None,
    on_duplicate: OnDuplicate = "update",
    decoding: DecodingOptions = DecodingOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Add images to an index, each once by its path; acknowledged only once they are safe on disk.

    Repeat it after an interruption, or to take up files that are new or have changed.
    """
    from robusthash.apps.experiment.index_run import Adding, Reading, add_images

    adding = Adding(on_duplicate, payload, Reading.of(decoding.workers, decoding.max_pixels), codes)
    with progress_bars() as progress:
        info = add_images(directory, images, run, progress, adding)
    _print_info(info, as_json)


@app.command("search")
def search(
    directory: Index,
    image: Annotated[Path | None, Argument(help="Image file to search with.")] = None,
    text: Annotated[
        str | None, Option(help="Search with this sentence instead, by a model of texts.")
    ] = None,
    k: Annotated[int, Option("-k", "--k", min=1, max=10_000, help="Number of results.")] = 10,
    run: IndexRun = None,
    where: Where = None,
    html: Annotated[Path | None, Option(help="Write the results with their pictures to this page.")] = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Search an index by image file, or by a sentence: the nearest items with their distances."""
    from robusthash.apps.experiment.index_filters import values_of
    from robusthash.apps.experiment.index_run import Reading, search_by

    check_page(html)
    query = image if text is None else text
    if query is None or (image is not None and text is not None):
        raise ValueError("search with one of the two: an image file, or --text 'a sentence'")
    limit = Reading.of(None, max_pixels).max_pixels
    hits = search_by(directory, query, run, k, where, limit)
    if where and not hits:
        note(values_of(directory, where))
    if html is not None:
        from robusthash.apps.reports.picture_pages import write_search_page
        from robusthash.index.index_address import address_without_password

        write_search_page(html, query, hits, address_without_password(directory), where, limit)
    if as_json:
        print_json(hits)
        return
    _print_hits(f"nearest to {query}", hits)
    if html is not None:
        print_lines([html])


@app.command("remove")
def remove(
    directory: Index,
    ids: Annotated[list[int] | None, Argument(help="Ids to remove.")] = None,
    path: Annotated[
        list[Path] | None, Option(help="Remove this file, or all below this folder. Repeatable.")
    ] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Remove items by id, by path or by filter."""
    from robusthash.apps.experiment.index_filters import remove_items

    done = remove_items(directory, ids or [], path or [], where)
    if as_json:
        missing = {"missing": done.missing} if done.missing else {}
        print_json({"removed": done.removed, "items": done.left, **missing})
        return
    if done.missing:
        note(f"not in the index: {', '.join(map(str, done.missing))}")
    note(f"removed {done.removed}{f' of {len(ids)}' if ids else ''}, {done.left} left")


@app.command("info")
def info(directory: Index, as_json: AsJson = False) -> None:
    """Bits, items, engine and origin of an index."""
    from robusthash.index import address_of, open_index

    with open_index(address_of(directory), create=False) as index:
        _print_info(dict(index.info()), as_json)


def _print_info(info: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    lists = {name: value for name, value in info.items() if isinstance(value, list)}
    rows = [[name, str(len(value) if name in lists else value)] for name, value in info.items()]
    print_table("index", ["", "value"], rows)
    if "distinct_codes" in info:
        count, distinct = info["encoded"], info["distinct_codes"]
        note(
            f"{count} images have {distinct} different code{'s' * (distinct > 1)}, so many are equally near: "
            "see random_rows of csq, or take another objective or more bits"
        )
    for name, value in lists.items():
        texts = [f"{one['file']} ({one['reason']})" if isinstance(one, dict) else one for one in value]
        note_some(name.replace("_", " "), texts)


_COPY = {True: "copy", False: "no copy"}


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
