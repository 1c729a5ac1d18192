"""The verbs ``demo`` and ``quickstart``."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, Seed, Sets
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars

PLAN = """\
The demo trains a photo search on twenty embedded photographs (no download), attacks it, hardens it by
SAAT, attacks it again, and writes {out}/report.html. It takes a few minutes on two free cores. Stopped and
called again, it goes on where it was."""


def demo(
    out: Annotated[Path, Option(help="Folder of the report and all else.")] = Path("demo"),
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The whole story on real photographs: a search that works, broken, hardened, measured. A few minutes."""
    note(PLAN.format(out=out))
    from robusthash.apps.experiment.demo_run import run_demo, summary_rows

    with progress_bars() as progress:
        summary = run_demo(out, progress, seed=seed)
    if as_json:
        print_json(summary)
        return
    print_table("MAP on photos, attacks at 8/255", *summary_rows(summary))
    note(f"report: {out / 'report.html'}")
    folder = "" if out == Path("demo") else f" {shlex.quote(str(out))}"
    note(f"To search and attack both models in a browser: robusthash serve{folder} --demo")


def quickstart(
    folder: Annotated[Path, Argument(help="Folder of images, in subfolders or not.")],
    out: Annotated[Path, Option(help="Folder of the runs and all else.")] = Path("quickstart"),
    labels: Annotated[
        Literal["auto", "none", "folders", "manifest"],
        Option(help="Where labels come from; auto looks at the folder, none trains without."),
    ] = "auto",
    manifest: Annotated[Path | None, Option(help="CSV or JSON-lines manifest with labels.")] = None,
    seed: Seed = 0,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """From a folder of images, labelled or not, to a searched index: train, measure, index, search. Minutes.

    Stopped and called again, it goes on where it was. Without labels each image is a class of its own, and
    its copies (cropped, smaller, brighter, compressed) are what the search finds.
    """
    _require_files(folder)
    note(f"Makes a search over the images of {folder}: trains, measures, indexes, in {out}.")
    from robusthash.apps.experiment import quickstart_run

    plan = quickstart_run.plan(folder, labels, manifest)
    note(f"{len(plan.images)} images: {plan.words}")
    took = quickstart_run.duration(len(plan.images), plan.recipe)
    note(f"The usual training takes {took} on two free cores; what is done already is not done again.")
    with progress_bars() as progress, _reported_once():
        summary = quickstart_run.quickstart(
            folder, out, labels=labels, manifest=manifest, seed=seed, sets=sets or (), progress=progress
        )
    if as_json:
        print_json(summary)
    else:
        _print(summary)


def _require_files(folder: Path) -> None:
    """Refuse a folder that cannot do before seconds of imports."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute()}; it should hold images")
    walk = (name for _, _, files in os.walk(folder) for name in files)
    count = len(list(itertools.islice(walk, 2)))
    if count == 0:
        raise ValueError(f"{folder} holds no image: add some, better 100 or more")
    if count == 1:
        raise ValueError(f"{folder} holds 1 file, and training needs at least 10 images; add images")


@contextmanager
def _reported_once() -> Iterator[None]:
    """Each warning is printed once: training and index both name the files that they skip."""
    reported: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(reported)
        reported.add(record.getMessage())
        return len(reported) > before

    logger = logging.getLogger("robusthash.data.image_files")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def _print(summary: dict[str, Any]) -> None:
    """Print the summary, and the paths of what was made."""
    if summary["copies"]:
        rows = summary["copies"]
        title = "copies that find their image (files changed at four times the model's size, then reduced)"
        print_table(title, list(rows[0]), [list(row.values()) for row in rows])
    else:
        rows = [[name, *next(iter(one.items())), one["chance"]] for name, one in summary["headline"].items()]
        print_table("results", ["queries", "measure", "value", "chance"], rows)
    example = summary["example"]
    hits = [[hit["distance"], hit["payload"].get("path", hit["id"])] for hit in example["hits"]]
    note(f"Searched with a copy of {example['copy of']}: {example['change']}.")
    print_table("nearest", ["distance", "image"], hits, False)
    note("\nnext:")
    for verb, command in summary["next"].items():
        note(f"  {verb:8}{command}")
    print_lines([f"{name}: {summary[name]}" for name in ("run", "index", "report")])
