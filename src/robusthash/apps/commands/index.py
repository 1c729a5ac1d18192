"""The verbs of ``index``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from robusthash.apps.commands.options import AsJson, Device, Index, IndexRun
from robusthash.apps.commands.search import search
from robusthash.apps.commands.terminal import console, print_json, print_table, progress_bars

app = Typer(help="Build and search an index of binary codes.", no_args_is_help=True)


@app.command("build")
def build(
    directory: Index,
    run: Annotated[Path, Option(help="Run whose database is indexed, or that encodes --images.")],
    images: Annotated[Path | None, Option(help="Folder of images to index instead.")] = None,
    engine: Annotated[str, Option(help="faiss, numpy (slow), faiss-ivf (approximate).")] = "faiss",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make an index of a run's database split, or of a folder of images encoded by the run's hasher."""
    from robusthash.apps.experiment.index_run import build_index

    with progress_bars() as progress:
        info = build_index(directory, run, images, engine, progress)
    _print_info(info, as_json)


@app.command("add")
def add(
    directory: Index,
    images: Annotated[Path, Argument(help="Image file or folder of images.")],
    run: IndexRun = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Add images to an index; acknowledged only once they are safe on disk."""
    from robusthash.apps.experiment.index_run import add_images

    with progress_bars() as progress:
        info = add_images(directory, images, run, progress)
    _print_info(info, as_json)


app.command("search")(search)


@app.command("remove")
def remove(
    directory: Index, ids: Annotated[list[int], Argument(help="Ids to remove.")], as_json: AsJson = False
) -> None:
    """Remove items by id."""
    from robusthash.index import open_index

    with open_index(f"file:{directory}", create=False) as index:
        removed, left = index.remove(ids), index.count()
    if as_json:
        print_json({"removed": removed, "items": left})
    else:
        console.print(f"removed {removed} of {len(ids)}, {left} left")


@app.command("info")
def info(directory: Index, as_json: AsJson = False) -> None:
    """Bits, items, engine and origin of an index."""
    from robusthash.index import open_index

    with open_index(f"file:{directory}", create=False) as index:
        _print_info(dict(index.info()), as_json)


def _print_info(info: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(info)
    else:
        print_table("index", ["", "value"], [[name, str(value)] for name, value in info.items()])
