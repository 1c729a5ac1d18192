"""The verbs of ``robusthash index``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from robusthash.apps.commands.terminal import AsJson, console, print_json, print_table, progress_bars

app = typer.Typer(help="Build and search an index of binary codes.", no_args_is_help=True)

Index = Annotated[Path, typer.Argument(help="Directory of the index.")]


@app.command("build")
def index_build(
    directory: Index,
    run: Annotated[
        Path,
        typer.Option(help="Trained run whose database split is indexed, or whose hasher encodes --images."),
    ],
    images: Annotated[
        Path | None, typer.Option(help="Index this folder of images instead of the run's database.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="faiss (exact), numpy (exact, slow), faiss-ivf (approximate).")
    ] = "faiss",
    as_json: AsJson = False,
) -> None:
    """Make an index of a run's database split, or of a folder of images encoded by the run's hasher."""
    from robusthash.apps.experiment import index_run as indexing

    with progress_bars() as progress:
        info = indexing.build_index(directory, run, images, engine, progress)
    _show_info(info, as_json)


@app.command("add")
def index_add(
    directory: Index,
    images: Annotated[Path, typer.Argument(help="Image file or folder of images.")],
    run: Annotated[Path, typer.Option(help="The run that made the index's codes.")],
    as_json: AsJson = False,
) -> None:
    """Add images to an index; acknowledged only once they are safe on disk."""
    from robusthash.apps.experiment import index_run as indexing

    with progress_bars() as progress:
        info = indexing.add_images(directory, images, run, progress)
    _show_info(info, as_json)


@app.command("search")
def index_search(
    directory: Index,
    image: Annotated[Path, typer.Argument(help="Image file to search with.")],
    run: Annotated[Path, typer.Option(help="The run that made the index's codes.")],
    k: Annotated[int, typer.Option(min=1, max=10_000, help="How many results.")] = 10,
    where: Annotated[str | None, typer.Option(help="Filter by payload, as YAML: '{label: cat}'.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search an index by image file."""
    from robusthash.apps.experiment import index_run as indexing

    hits = indexing.search_image(directory, image, run, k, where)
    if as_json:
        print_json(hits)
        return
    rows = [[hit["id"], hit["distance"], json.dumps(hit["payload"])] for hit in hits]
    print_table(f"nearest to {image}", ["id", "distance", "payload"], rows)


@app.command("remove")
def index_remove(
    directory: Index,
    ids: Annotated[list[int], typer.Argument(help="Ids to remove.")],
    as_json: AsJson = False,
) -> None:
    """Remove items by id."""
    from robusthash.index import open_index

    with open_index(f"file:{directory}", create=False) as index:
        removed = index.remove(ids)
        left = index.count()
    if as_json:
        print_json({"removed": removed, "items": left})
        return
    console.print(f"removed {removed} of {len(ids)}, {left} left")


@app.command("info")
def index_info(directory: Index, as_json: AsJson = False) -> None:
    """Bits, items, engine and origin of an index."""
    from robusthash.index import open_index

    with open_index(f"file:{directory}", create=False) as index:
        info = dict(index.info())
    _show_info(info, as_json)


def _show_info(info: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    print_table("index", ["", "value"], [[name, str(value)] for name, value in info.items()])
