import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from robusthash.apps.commands.options import (
    AsJson,
    BudgetOptions,
    Device,
    MaxPixels,
    Seed,
    with_option_groups,
)
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars, warn


@dataclass(frozen=True)
class PhotographOptions:
    """Options of the photographs that are searched for."""

    photos: Annotated[Path | None, Option(help="Your photographs; twenty come with the package.")] = None
    labels: Annotated[bool, Option("--labels", help="Subfolders are categories; measure those too.")] = False


@dataclass(frozen=True)
class ModelOptions:
    """Options of what the model takes and answers."""

    size: Annotated[int | None, Option(min=8, help="Pixels a side; default 224 or the run's.")] = None
    bits: Annotated[str, Option(help="Length of the codes, or auto.")] = "auto"
    output: Annotated[
        str, Option(help="Answers of the model: logits, signs, float (an embedding), or auto.")
    ] = "auto"
    metric: Annotated[str | None, Option(help="Of an embedding: cosine (the default) or euclidean.")] = None
    output_name: Annotated[
        str | None, Option(help="Of several outputs: a name, or the number of its place.")
    ] = None


@dataclass(frozen=True)
class MeasureOptions:
    """Options of what is measured, and on how many photographs."""

    radius: Annotated[float | None, Option(help="Counts as the same: within these bits (distance).")] = None
    queries: Annotated[
        int | None, Option(min=1, help="Photographs that are looked up: 200, or 20 in tier smoke.")
    ] = None
    attacked: Annotated[int | None, Option(min=1, help="Of these, attacked: 12, or 4 in tier smoke.")] = None
    replacement: Annotated[
        bool | None,
        Option(help="Measure copy-hash beside it; the default for hashes and runs that find copies."),
    ] = None
    max_pixels: MaxPixels = None
    limit: Annotated[int, Option(min=2, help="Photographs read at most.")] = 1000
    seed: Seed = 0


@dataclass(frozen=True)
class EndpointOptions:
    """Limits on the requests to an endpoint."""

    budget: Annotated[int, Option(help="Endpoint: requests in all.")] = 5000
    rate: Annotated[float, Option(help="Endpoint: requests a second at most.")] = 5.0
    timeout: Annotated[float, Option(help="Endpoint: seconds to wait for an answer.")] = 10.0
    header: Annotated[
        list[str] | None, Option(help="Endpoint: 'Name: value', never written. Repeatable.")
    ] = None


@with_option_groups
def audit(
    target: Annotated[
        str,
        Argument(
            help="A run, module:name, TorchScript .pt, .onnx, http(s), copy-hash, phash, ahash, dhash, whash "
            "or pdq."
        ),
    ],
    photographs: PhotographOptions = PhotographOptions(),
    model: ModelOptions = ModelOptions(),
    tier: Annotated[str, Option(help="smoke (seconds) or fast (minutes).")] = "fast",
    out: Annotated[Path, Option(help="Folder for report.html and audit.json.")] = Path("audit"),
    changes: BudgetOptions = BudgetOptions(),
    measures: MeasureOptions = MeasureOptions(),
    endpoint: EndpointOptions = EndpointOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Audit a search: any model, file, endpoint or perceptual hash, on your own photographs.

    No labels are needed; with --labels, photographs sorted into subfolders by category say more.

    A dotted path runs the module that it names, and model files run their own graph: audit only what you
    would run anyway.
    """
    from robusthash.apps.audit.measurement import run_audit
    from robusthash.apps.audit.targets import AuditOptions, EndpointLimits, tier_named
    from robusthash.models.external.model_answers import AnswerReading

    options = AuditOptions(
        labels=photographs.labels,
        size=model.size,
        bits=_length(model.bits),
        tier=tier_named(tier, measures.queries, measures.attacked),
        eps=_pixel_eps(changes),
        radius=measures.radius,
        limit=measures.limit,
        seed=measures.seed,
        limits=EndpointLimits(endpoint.budget, endpoint.rate, endpoint.timeout, _headers(endpoint.header)),
        max_pixels=measures.max_pixels,
        reading=AnswerReading(model.output, model.metric, model.output_name),  # type: ignore[arg-type]
        replacement=measures.replacement,
    )
    with progress_bars() as progress:
        summary = run_audit(target, out, photographs.photos, options, progress)
    if as_json:
        print_json(summary)
    else:
        _print(summary, out)


def _print(summary: dict[str, Any], out: Path) -> None:
    """The first sentences of the page, a red check before them; the table, and what was noted."""
    from robusthash.apps.audit.verdict import within

    verdict = summary["verdict"]
    if verdict["alarm"]:
        warn("warning", verdict["alarm"])
    replacement = summary["replacement"]
    for sentence in (
        verdict["first"],
        replacement and replacement["said"],
        verdict["tried"],
        verdict["untried"],
    ):
        if sentence:
            print_lines([sentence])
    if reach := within(summary):
        print_lines([f"Counts as the same: within {reach}."])
    print_lines([f"{verdict['asked']}; changed at the model's size, {summary['size']} px."])
    print_table(f"audit of {summary['title']}", *_rows(summary, imitating=False))
    columns, rows = _rows(summary, imitating=True)
    if rows:
        print_table("taken for another on purpose: shares that succeeded (lower is better)", columns, rows)
    if replacement and replacement["compared"]:
        pairs = [[each["what"], *each["texts"], each["outcome"] or ""] for each in replacement["compared"]]
        columns = [
            "on the same photographs",
            summary["title"],
            replacement["name"],
            f"{replacement['name']} is",
        ]
        print_table(f"{replacement['name']} instead of {summary['title']}", columns, pairs)
    if pairs := summary["photographs"]["pairs of copies inside the folder"]:
        print_lines([f"copies inside the folder: {pairs} pairs, which count as no accidental matches"])
    for sentence in summary["got nowhere"]:
        note(sentence)
    if summary["said"]:
        note(summary["said"][0])
    for warning in summary["doubts"]:
        warn("warning", warning)
    if summary["kinds"] is not None:
        note(summary["kinds"]["said"])
    print_lines([out / "report.html"])


def _length(bits: str) -> int | None:
    """Bits of a code; None where they are to be found out."""
    if not bits.isdigit() and bits != "auto":
        raise ValueError(f"--bits takes a number or auto, got {bits!r}")
    return None if bits == "auto" else int(bits)


def _pixel_eps(budget: BudgetOptions) -> float:
    """Largest change of a pixel in [0, 1]. A bare number from 1 on is levels of 255, an older spelling."""
    eps = budget.eps
    if eps is not None and eps.replace(".", "", 1).isdigit():
        if 0 < float(eps) < 1:
            raise ValueError(
                f"--eps {eps} meant levels of 255 here once; write {eps}/255, or {float(eps) * 255:g}/255"
            )
        budget = replace(budget, eps=f"{eps}/255")
    name = budget.name()
    level = re.fullmatch(r"img-linf-([\d.]+)", name)
    if level is None:
        raise ValueError(f"an audit changes each pixel by at most eps, as in img-linf-8; it has no {name}")
    return float(level[1]) / 255


def _headers(lines: list[str] | None) -> dict[str, str]:
    headers = {}
    for line in lines or []:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():  # the line may be a secret
            raise ValueError("--header takes 'Name: value'; the colon is missing")
        headers[name.strip()] = value.strip()
    return headers


def _rows(summary: dict[str, Any], imitating: bool) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of changes, or that of attacks that imitate another photograph."""
    measured = [row for row in summary["rows"] if row["kind"].startswith("imitate") == imitating]
    apart = "bits apart" if summary["distance"] in ("hamming", None) else f"{summary['distance']} distance"
    columns = ["change", "photographs", "came first", "counts as the same", apart, "MAP"]
    keys = ("name", "asked", "first", "recognised", "bits", "map")
    rows = [
        ["" if row[key] is None and key in ("recognised", "bits") else row[key] for key in keys]
        for row in measured
    ]
    if summary["kinds"] is not None:
        columns.append("same kind found / luck")
        for cells, row in zip(rows, measured, strict=True):
            same = row["same_kind"]
            cells.append("" if same is None else f"{same:.2f}/{row['same_kind_chance']:.2f}")
    return columns, rows
