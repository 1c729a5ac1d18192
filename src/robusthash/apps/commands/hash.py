from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, MaxPixels, Workers
from robusthash.apps.commands.terminal import note, one_row, progress_bars, reply

_NAMED = 10  # images whose hash says little, on a terminal

HashBits = Annotated[int, Option(help="64, 128 or 256; a shorter hash is the beginning of a longer one.")]


def hash(
    files: Annotated[list[Path], Argument(help="Image files, and folders of them.")],
    bits: HashBits = 256,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
    proof: Annotated[
        bool,
        Option(
            "--proof",
            help="Also say by how many of 255 levels (0 to 16) values of the image's square of 64 px may "
            "change, in any way, while it provably still counts as a copy.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hashes of images by which their copies are found, as hex lines: hash, path. No training, no labels.

    The central square is hashed. Hashes of copies (saved again, smaller, cut, re-lit, written on) differ in
    few bits, also where somebody changed the copy so that nobody sees it; `duplicates` compares those of a
    folder.
    """
    from robusthash.apps.image_hash.duplicate_groups import hash_files
    from robusthash.data.image_files import path_text
    from robusthash.data.pixel_conversion import MAX_PIXELS

    with progress_bars() as progress:
        hashed = hash_files(files, bits, workers, max_pixels or MAX_PIXELS, progress, proof)
    for skipped in hashed.skipped:
        note(f"passed over: {skipped}")
    names = [path_text(path) for path in hashed.paths]
    plain = [name for name, one in zip(names, hashed.hashes, strict=True) if one.plain]
    for name in plain[:_NAMED]:
        note(f"of one colour, one fine texture or little contrast, its hash says little: {name}")
    if len(plain) > _NAMED:
        note(f"and so {len(plain) - _NAMED} more")
    if as_json and len(set(names)) < len(names):
        note(f"{len(names) - len(set(names))} paths are written like another, whose entry they replace")
    codes = [str(one) for one in hashed.hashes]
    entries: dict[str, Any] = dict(zip(names, codes, strict=True))
    lines = [f"{code}  {one_row(name)}" for name, code in zip(names, codes, strict=True)]
    if proof:
        rows = list(zip(names, hashed.hashes, hashed.proved, strict=True))
        entries = {
            name: {"hash": str(one), "plain": one.plain, "proved_level": level} for name, one, level in rows
        }
        lines = [f"{one}  {level:2}  {one_row(name)}" for name, one, level in rows]
    passed = [asdict(one) for one in hashed.skipped]
    facts = {"schema": "robusthash.hashes/1", "images": len(names), "passed_over": len(passed)}
    reply(as_json, {**facts, "hashes": entries, "skipped": passed}, lines)
