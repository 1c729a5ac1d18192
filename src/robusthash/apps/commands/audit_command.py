"""The verb ``robusthash audit``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robusthash.apps.commands.terminal import AsJson, console, escape, print_json, print_table, progress_bars


def audit(
    target: Annotated[
        str,
        typer.Argument(
            help="A run directory, module:name, a TorchScript .pt, an .onnx file, an http(s) address, or phash, dhash, "
            "whash, pdq."
        ),
    ],
    photos: Annotated[
        Path | None, typer.Option(help="Folder of your photographs; twenty come with the package.")
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="Subfolders are kinds: measure too whether photographs of the same kind are found.",
        ),
    ] = False,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels a side; 224, or the run's own, by default.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Length of the codes, or auto.")] = "auto",
    tier: Annotated[str, typer.Option(help="smoke (seconds) or fast (minutes).")] = "fast",
    out: Annotated[Path, typer.Option(help="Folder for report.html and audit.json.")] = Path("audit"),
    eps: Annotated[float, typer.Option(help="Largest hostile change of a pixel, in levels of 255.")] = 8.0,
    radius: Annotated[
        int | None, typer.Option(help="Bits that may differ between pictures that count as same.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Photographs that ask; the tier's by default.")
    ] = None,
    attacked: Annotated[int | None, typer.Option(min=1, help="Of them, how many are attacked.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Photographs read at most.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs, the noise and the attacks.")] = 0,
    budget: Annotated[int, typer.Option(help="Endpoint: questions in all.")] = 5000,
    rate: Annotated[float, typer.Option(help="Endpoint: questions a second at most.")] = 5.0,
    timeout: Annotated[float, typer.Option(help="Endpoint: seconds to wait for an answer.")] = 10.0,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Endpoint: header 'Name: value', never written anywhere. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How fragile is a search? Any model, file, endpoint or perceptual hash, on your own photographs.

    No labels are needed; with --labels, photographs sorted into subfolders by kind say more.

    A dotted path runs the module that it names, and model files run their own graph: audit only what you
    would run anyway.
    """
    from dataclasses import replace

    from robusthash.apps.audit.measurement import run_audit
    from robusthash.apps.audit.targets import AuditOptions, EndpointLimits, tier_named

    if not bits.isdigit() and bits != "auto":
        raise ValueError(f"--bits takes a number or auto, got {bits!r}")
    chosen = tier_named(tier)
    chosen = replace(chosen, queries=queries or chosen.queries, attacked=attacked or chosen.attacked)
    if os.getcwd() not in sys.path:  # a module:name is looked for where the user stands, as python -m does
        sys.path.insert(0, os.getcwd())
    options = AuditOptions(
        labels, size, None if bits == "auto" else int(bits), chosen, eps / 255, radius, limit, seed,
        EndpointLimits(budget, rate, timeout, _headers(header or [])),
    )  # fmt: skip
    with progress_bars() as progress:
        summary = run_audit(target, out, photos, options, progress)
    if as_json:
        print_json(summary)
        return
    print_table(f"audit of {summary['title']}", *_rows(summary))
    for doubt in summary["doubts"]:
        console.print(f"[bold red]doubt:[/] {escape(doubt)}", highlight=False)
    for light in (flag for flag in summary["flags"] if flag["level"] == "red"):
        console.print(f"[bold red]{light['id']} red:[/] {escape(light['remedy'])}", highlight=False)
    if summary["kinds"] is not None:
        console.print(escape(summary["kinds"]["said"]), highlight=False)
    sys.stdout.write(f"{out / 'report.html'}\n")


def _headers(lines: list[str]) -> dict[str, str]:
    made = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise ValueError(
                "--header takes 'Name: value'; the colon is missing"
            )  # the value may be a secret
        made[name.strip()] = value.strip()
    return made


def _rows(summary: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    head = ["change", "asked", "came first", "recognised", "bits apart", "MAP"]
    kinds = summary["kinds"] is not None
    rows = [
        [
            row["name"],
            row["asked"],
            row["first"],
            "" if row["recognised"] is None else row["recognised"],
            "" if row["bits"] is None else row["bits"],
            row["map"],
            *([_of_kind(row)] if kinds else []),
        ]
        for row in summary["rows"]
    ]
    return [*head, *(["same kind / luck"] if kinds else [])], rows


def _of_kind(row: dict[str, Any]) -> str:
    return "" if row["same_kind"] is None else f"{row['same_kind']:.2f}/{row['same_kind_chance']:.2f}"
