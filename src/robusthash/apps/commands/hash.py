"""The verbs of the hash for copies: ``hash`` and ``duplicates``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, DecodingOptions, check_page, with_option_groups
from robusthash.apps.commands.terminal import (
    SHOWN,
    note,
    note_some,
    one_row,
    print_json,
    print_lines,
    progress_bars,
    reply,
)

HashBits = Annotated[int, Option(help="64, 128 or 256; a shorter hash is the beginning of a longer one.")]


@with_option_groups
def hash(
    files: Annotated[list[Path], Argument(help="Image files, and folders of them.")],
    bits: HashBits = 256,
    decoding: DecodingOptions = DecodingOptions(),
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
        hashed = hash_files(files, bits, decoding.workers, decoding.max_pixels or MAX_PIXELS, progress, proof)
    for skipped in hashed.skipped:
        note(f"passed over: {skipped}")
    names = [path_text(path) for path in hashed.paths]
    plain = [name for name, one in zip(names, hashed.hashes, strict=True) if one.plain]
    for name in plain[:SHOWN]:
        note(f"of one colour, one fine texture or little contrast, its hash says little: {name}")
    if len(plain) > SHOWN:
        note(f"and so {len(plain) - SHOWN} more")
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


@with_option_groups
def duplicates(
    places: Annotated[list[Path], Argument(help="Folders of images, with their subfolders, and files.")],
    html: Annotated[
        Path | None, Option(help="Write the groups with their pictures to this page (.html).")
    ] = None,
    bits: HashBits = 256,
    radius: Annotated[
        int | None, Option(help="Bits by which copies may differ; by default 1 false match in 100,000 pairs.")
    ] = None,
    decoding: DecodingOptions = DecodingOptions(),
    as_json: AsJson = False,
) -> None:
    """Groups of copies in a folder: the same picture saved again, smaller, cut, re-lit, written on.

    Prints a line for each image: number of its group, bits by which it differs from the first, path. Of each
    picture the central square is compared. No image is moved, changed or deleted.
    """
    from robusthash.apps.image_hash.duplicate_groups import find_duplicates
    from robusthash.data.pixel_conversion import MAX_PIXELS

    check_page(html)
    with progress_bars() as progress:
        result = find_duplicates(
            places, bits, radius, decoding.workers, decoding.max_pixels or MAX_PIXELS, progress
        )
    if as_json:
        print_json(result.as_json())
    else:
        note_some("passed over", result.skipped)
        if result.plain:
            plain = f"{len(result.plain)} images are of one colour or one fine texture"
            note(f"{plain}: only those of equal pixels are grouped")
        copies = sum(map(len, result.groups))
        note(f"{result.images} images, groups of copies: {len(result.groups)}, with {copies} of them")
        print_lines(
            f"{number}  {copy.distance:>3}  {one_row(copy.path)}"
            for number, group in enumerate(result.groups, start=1)
            for copy in group
        )
    if html is not None:
        from robusthash.apps.reports.picture_pages import write_duplicates_page

        write_duplicates_page(html, result, decoding.max_pixels or MAX_PIXELS)
        note(f"page: {html}")
