"""The verb ``search``, which is ``index search`` too."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, Index, IndexRun
from robusthash.apps.commands.terminal import print_json, print_table


def search(
    directory: Index,
    image: Annotated[Path, Argument(help="Image file to search with.")],
    k: Annotated[int, Option("-k", "--k", min=1, max=10_000, help="Number of results.")] = 10,
    run: IndexRun = None,
    where: Annotated[str | None, Option(help="Filter by payload, as YAML: '{label: cat}'.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Search an index by image file: the nearest items with their distances."""
    from robusthash.apps.experiment.index_run import search_image

    hits = search_image(directory, image, run, k, where)
    if as_json:
        print_json(hits)
        return
    rows = [[hit["id"], hit["distance"], json.dumps(hit["payload"])] for hit in hits]
    print_table(f"nearest to {image}", ["id", "distance", "payload"], rows)
