from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.hash import HashBits
from robusthash.apps.commands.options import AsJson, MaxPixels, Workers, check_page
from robusthash.apps.commands.terminal import note, one_row, print_json, print_lines, progress_bars

_NAMED = 10  # files passed over, on a terminal


def duplicates(
    places: Annotated[list[Path], Argument(help="Folders of images, with their subfolders, and files.")],
    html: Annotated[
        Path | None, Option(help="Write the groups with their pictures to this page (.html).")
    ] = None,
    bits: HashBits = 256,
    radius: Annotated[
        int | None, Option(help="Bits by which copies may differ; by default 1 false match in 100,000 pairs.")
    ] = None,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
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
        result = find_duplicates(places, bits, radius, workers, max_pixels or MAX_PIXELS, progress)
    if as_json:
        print_json(result.as_json())
    else:
        for one in result.skipped[:_NAMED]:
            note(f"passed over: {one}")
        if len(result.skipped) > _NAMED:
            note(f"passed over: and {len(result.skipped) - _NAMED} more; --json names all")
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
        from robusthash.apps.reports.duplicates_page import write_duplicates_page

        write_duplicates_page(html, result, max_pixels or MAX_PIXELS)
        note(f"page: {html}")
