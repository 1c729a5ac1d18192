from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, DecodingOptions, Device, shard_of, with_option_groups
from robusthash.apps.commands.terminal import (
    SHOWN,
    note,
    note_some,
    one_row,
    print_json,
    progress_bars,
    reply,
    warn,
)
from robusthash.core.words import some_names


@dataclass(frozen=True)
class CollectionOptions:
    """Options of a collection that is encoded part by part."""

    shard: Annotated[
        str | None, Option(help="With --images, I/N: the parts I, I + N, ... for one of N processes.")
    ] = None
    processes: Annotated[
        int | None, Option(min=0, help="With --images: processes that decode; a core each but one.")
    ] = None
    batch_size: Annotated[int | None, Option(min=1, help="With --images: images at a time; 64.")] = None
    part_size: Annotated[
        int | None, Option(min=1, help="With --images: images a part; 4096. A tar is a part.")
    ] = None
    items: Annotated[
        str | None, Option(help="With --images: jsonl (default) or parquet, of ids, names and payload.")
    ] = None
    ray: Annotated[
        int | None, Option(min=1, help="With --images: workers on a Ray cluster (RAY_ADDRESS, or here).")
    ] = None
    index: Annotated[str | None, Option(help="With --ray: address of an index to add to as well.")] = None


@with_option_groups
def encode(
    run: Annotated[
        str | None, Argument(help="Run, saved model, id of a registry entry, or copy-hash.")
    ] = None,
    files: Annotated[
        list[Path] | None, Argument(metavar="[IMAGES]...", help="Image files and folders of them.")
    ] = None,
    named_run: Annotated[str | None, Option("--run", help="The same, with --images.")] = None,
    images: Annotated[
        str | None,
        Option(help="A collection: folder, manifest (.csv, .jsonl, .parquet) or tars: shards-{000..099}.tar"),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Write the codes here: .npz; of a collection, a folder of its own.")
    ] = None,
    collection: CollectionOptions = CollectionOptions(),
    decoding: DecodingOptions = DecodingOptions(),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Codes of images as hex lines (code, path) or .npz; without images, of every split of the run as .npz.

    The first bit of a code is the highest of its first hex digit; zeros pad the end. Files that are passed
    over are named on stderr.

    With --images a collection of any size goes part by part into the folder --out. Repeat the command after
    an interruption: what is done is passed over, and parts that failed are tried again.
    """
    given = {name: value for name, value in vars(collection).items() if value is not None}
    source = _one_run(run, named_run)
    if images is not None:
        if files or decoding.workers is not None:
            more = " ".join(map(str, files or []))
            what = more if decoding.workers is None else "--workers; a collection is decoded by --processes"
            raise ValueError(f"--images names what is encoded, and does not go with {what}")
        return _encode_collection(source, images, out, {**given, "max_pixels": decoding.max_pixels}, as_json)
    if given:
        raise ValueError(
            f"--{next(iter(given)).replace('_', '-')} is for collections; name one with --images"
        )
    _encode_files(source, files, out, decoding, as_json)


def _one_run(run: str | None, named: str | None) -> str:
    if (run is None) == (named is None):
        raise ValueError("name the run once: encode RUN ..., or --run RUN")
    return run if run is not None else named  # type: ignore[return-value]


def _encode_files(
    run: str, images: list[Path] | None, out: Path | None, decoding: DecodingOptions, as_json: bool
) -> None:
    from robusthash.apps.experiment import index_run, model_stages
    from robusthash.apps.experiment.search_model import load, run_of
    from robusthash.data.image_files import Skipped, path_text

    if out is not None and (not images or out.suffix != ".npz"):
        raise ValueError(f"--out takes a path that ends in .npz, for the codes of images, got {str(out)!r}")
    if not images:
        trained = run_of(run)
        if trained is None:
            raise ValueError(f"{run} brings no data; name the images: encode {run} IMAGES")
        with progress_bars() as progress:
            files = {name: str(path) for name, path in model_stages.encode(trained, progress).items()}
        return reply(as_json, files, files.values())
    model, skipped = load(run, None), list[Skipped]()
    reading = index_run.Reading.of(decoding.workers, decoding.max_pixels)
    with progress_bars() as progress:
        pieces = index_run.encode_images(model, images, progress, reading, skipped)
        rows = [row for codes, paths in pieces for row in zip(paths, codes.packed.tolist(), strict=True)]
    for one in skipped:
        note(f"passed over: {one}")
    codes = {path_text(path): bytes(row) for path, row in rows}
    passed = {"passed_over": len(skipped), "skipped": [asdict(one) for one in skipped]}
    if out is not None:
        index_run.save_codes(out, model.bits, codes)
        return reply(as_json, {"codes": str(out), **passed}, [out])
    hexes = {path: code.hex() for path, code in codes.items()}
    lines = (f"{code}  {one_row(path)}" for path, code in hexes.items())
    return reply(as_json, {"codes": hexes, **passed}, lines)


def _encode_collection(
    run: str, images: str, out: Path | None, options: dict[str, Any], as_json: bool
) -> None:
    if out is None:
        raise ValueError("--images needs --out, the folder that the codes go to")
    options = {name: value for name, value in options.items() if value is not None}
    workers = options.pop("ray", None)
    if "shard" in options:
        options["shard"] = shard_of(options["shard"])
    if workers is None and "index" in options:
        raise ValueError(
            f"--index goes with --ray; without, add the codes by 'index build INDEX --codes {out}'"
        )
    if workers is not None and "shard" in options:
        raise ValueError("Ray divides the work among its workers by itself; leave --shard out")
    with progress_bars() as progress:
        if workers is None:
            from robusthash.apps.collection.collection_run import encode_collection

            report = encode_collection(run, images, out, progress=progress, **options)
        else:
            from robusthash.apps.collection.on_ray import encode_on_ray

            report = encode_on_ray(run, images, out, workers=workers, progress=progress, **options)
    if as_json:
        print_json(report)
    else:
        _note_report(report)
        reply(False, None, [out])
    for name, reason in list(report["failed"].items())[:SHOWN]:
        warn("failed", f"{name}: {reason}")
    if report["failed"]:
        note(f"{len(report['failed'])} parts failed; the same command tries them again")
    if report["in_use"]:
        held = some_names(report["in_use"])
        note(f"in use by other processes: {held}; repeat the command when they have ended")
    if report["stale"]:
        remedy = "the same command without --shard encodes them again, or with the shards that have them"
        parts = some_names(report["stale"])
        warn("stale", f"the collection has changed since {parts} were encoded; {remedy}")
    if report["failed"] or report["in_use"] or report["stale"]:
        raise typer.Exit(1)


def _note_report(report: dict[str, Any]) -> None:
    """Some lines on the collection, and on what was passed over."""
    skipped = [f"{one['file']} ({one['reason']})" for one in report["skipped"]]
    note_some("passed over", skipped, "report.json names all")
    parts = "1 part" if report["encoded"] == 1 else f"{report['encoded']} parts"
    note(f"{parts} encoded, {report['unchanged']} done before")
    whole = f"{report['items']} images encoded, {len(skipped)} files passed over"
    note(f"in all {report['done']} of {report['parts']} parts: {whole}")
    if report["missing"]:
        note(f"not encoded yet, as of other shards: {some_names(report['missing'])}")
