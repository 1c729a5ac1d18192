"""Arguments and options that several verbs share, each defined once, and groups of options as dataclasses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from typer import Argument, Context, Option

from robusthash.apps.commands.terminal import note

if TYPE_CHECKING:
    from robusthash.apps.experiment.config import Component
    from robusthash.apps.experiment.run_directory import Run


def with_option_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer takes it: each field of a parameter that is a dataclass is an option of its own."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[Parameter] = []
    for name, parameter in signature(verb).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        options = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            option = Parameter(
                field.name, parameter.kind, default=field.default, annotation=options[field.name]
            )
            parameters.append(option)

    @wraps(verb)
    def with_single_options(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    with_single_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_single_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_single_options


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

Eps = Annotated[str | None, Option(help="Budget in units of the range: 8/255. Short for --threat.")]
Norm = Annotated[Literal["linf", "l2", "l1"] | None, Option(help="Norm of the budget, linf by default.")]

Threat = Annotated[str | None, Option(help="Budget by name: img-linf-8 (of 255), img-l2-0.5, txt-bow-3.")]


@dataclass(frozen=True)
class BudgetOptions:
    """The budget of an attack: by its name, or by size and norm."""

    threat: Threat = None
    eps: Eps = None
    norm: Norm = None

    def name(self) -> str:
        """The threat that the options name, on images by default."""
        from robusthash.apps.experiment.threat_options import threat_name

        return threat_name(self.threat, self.eps, self.norm)

    def name_for(self, run: Run, direction: str | None) -> str:
        """The threat that the options name, on the queries of a run in a direction by default."""
        from robusthash.apps.experiment.threat_options import query_modality, threat_name

        return threat_name(self.threat, self.eps, self.norm, query_modality(run, direction))

    def attack(self, text: str) -> Component:
        """Settings of an attack, as YAML or by name, under this budget where one is given."""
        from robusthash.apps.experiment.threat_options import attack_under

        return attack_under(text, self.threat, self.eps, self.norm)


_queries = Option("--queries", min=1, help="Number of queries, chosen by content.")
Queries = Annotated[int, _queries]
AnyQueries = Annotated[int | None, _queries]
Direction = Annotated[
    Literal["I2I", "I2T", "T2I", "T2T"] | None, Option(help="Modality of query, then database.")
]
Relevance = Annotated[str, Option(help="Labels that say what is relevant, as class; own: those of the data.")]
AttackName = Annotated[str, Argument(help="Attack, as YAML or by name: mainstay, '{name: hag, steps: 50}'.")]
Seed = Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of everything that is drawn at random.")]
Figure = Annotated[bool, Option("--figure/--no-figure", help="Draw it too (needs the extra `figures`).")]
Markdown = Annotated[bool, Option("--markdown", help="The table in Markdown on stdout.")]
FiguresFolder = Annotated[Path, Option("--out", help="Folder of the figures.")]

MaxPixels = Annotated[
    int | None, Option(min=1, help="Largest image that is read, as width x height; 50000000 by default.")
]


@dataclass(frozen=True)
class DecodingOptions:
    """Options of reading image files."""

    workers: Annotated[
        int | None, Option(min=1, help="Threads that decode images; a core each, at most 8.")
    ] = None
    max_pixels: MaxPixels = None


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


def runs_with_results(has: Callable[[Run], bool], paths: list[Path]) -> list[Run]:
    """The runs of ``run_selection.runs_with``; those without results, and damaged ones, are named in notes.

    Raises:
        RunError: all that could be taken is damaged.
    """
    from robusthash.apps.experiment.run_directory import RunError
    from robusthash.apps.experiment.run_selection import runs_with

    runs, waiting, damaged = runs_with(has, paths)
    for run in waiting:
        note(f"{run.path} has no results yet and is left out")
    for text in damaged:
        note(f"passed over: {text}")
    if damaged and not runs:
        raise RunError("no run of these folders has results that can be read; the lines above say what to do")
    return runs


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
