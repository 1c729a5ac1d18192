"""Arguments and options that several verbs share, each defined once."""

import re
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option

RunPath = Annotated[Path, Argument(help="Run directory, as `train` and `run` print it.")]
RunPaths = Annotated[list[Path], Argument(help="Run directories.")]
Recipe = Annotated[Path, Argument(help="Recipe file (YAML).")]
Sets = Annotated[list[str] | None, Option("--set", help="Override: training.epochs=2. Repeatable.")]
ResumeFrom = Annotated[
    Path | None, Option(help="Go on from this run of the same recipe, which has fewer epochs.")
]
RunsFolder = Annotated[Path, Option("--runs", help="Folder of all runs.")]
AsJson = Annotated[bool, Option("--json", help="Machine-readable output on stdout.")]


def _computes_on(context: Context, name: str | None) -> str | None:
    if name is not None:
        from robusthash.core.runtime import computing_on

        context.with_resource(computing_on(name))  # until the verb ends
    return name


Device = Annotated[
    str | None, Option(callback=_computes_on, help="cpu, cuda, cuda:1, ...; by default as the run says.")
]
"""Of every verb that computes; the option alone is enough, the verb need not pass it on."""

Threat = Annotated[str | None, Option(help="Budget by name: img-linf-8 (of 255), img-l2-0.5, txt-bow-3.")]
Eps = Annotated[str | None, Option(help="Budget in units of the range: 8/255. Short for --threat.")]
Norm = Annotated[Literal["linf", "l2", "l1"] | None, Option(help="Norm of the budget, linf by default.")]

_queries = Option("--queries", min=1, help="Number of queries, chosen by content.")
Queries = Annotated[int, _queries]
AnyQueries = Annotated[int | None, _queries]
Direction = Annotated[
    Literal["I2I", "I2T", "T2I", "T2T"] | None, Option(help="Modality of query, then database.")
]
AttackName = Annotated[str, Argument(help="Attack, as YAML or by name: mainstay, '{name: hag, steps: 50}'.")]
Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of everything that is drawn at random.")]
Figure = Annotated[bool, Option("--figure/--no-figure", help="Draw it too (needs the extra `figures`).")]
FiguresFolder = Annotated[Path, Option("--out", help="Folder of the figures.")]

Workers = Annotated[int | None, Option(min=1, help="Threads that decode images; a core each, at most 8.")]
MaxPixels = Annotated[
    int | None, Option(min=1, help="Largest image that is read, as width x height; 50000000 by default.")
]
Where = Annotated[
    str | None, Option(help="Filter by payload, as YAML: '{labels: cat}', '{labels: [cat, dog]}'.")
]
Index = Annotated[
    str,
    Argument(
        help="Directory of the index, or milvus://HOST:PORT/COLLECTION, or "
        "postgresql://USER@HOST/DATABASE?collection=NAME."
    ),
]
ModelSource = Annotated[
    str,
    Option("--run", help="Run, saved model, id of a registry entry, or copy-hash, which needs no training."),
]
IndexRun = Annotated[
    str | None,
    Option("--run", help="Run or other model that encodes; by default the one that built the index."),
]


def check_page(html: Path | None) -> None:
    """Refuse a page that cannot be written, or whose name may be that of another file, before the work."""
    if html is None:
        return
    if html.suffix.lower() not in (".html", ".htm") or (html.exists() and not html.is_file()):
        raise ValueError(f"--html takes the name of a file such as found.html, got {str(html)!r}")
    if not html.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {html.absolute().parent} for the page {html.name}")


def shard_of(text: str) -> tuple[int, int]:
    """The (i, n) of ``--shard i/n``."""
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or int(parts[1]) >= int(parts[2]):
        raise ValueError(f"--shard takes I/N with I from 0 to N - 1, as 0/2 and 1/2; got {text!r}")
    return int(parts[1]), int(parts[2])
