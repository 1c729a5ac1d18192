from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, MaxPixels, RunPath, Workers
from robusthash.apps.commands.terminal import note, progress_bars, reply


def encode(
    run: RunPath,
    images: Annotated[list[Path] | None, Argument(help="Image files and folders of them.")] = None,
    out: Annotated[Path | None, Option(help="Write the codes of the images here (.npz).")] = None,
    workers: Workers = None,
    max_pixels: MaxPixels = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Codes of images as hex lines (code, path) or .npz; without images, of every split of the run as .npz.

    The first bit of a code is the highest of its first hex digit; zeros pad the end. Files that are passed
    over are named on stderr.
    """
    from robusthash.apps.experiment import index_run, model_stages
    from robusthash.apps.experiment.run_directory import load_run
    from robusthash.data.image_files import Skipped, path_text

    if out is not None and (not images or out.suffix != ".npz"):
        raise ValueError(f"--out takes a path that ends in .npz, for the codes of images, got {str(out)!r}")
    encoder, skipped = load_run(run), list[Skipped]()
    with progress_bars() as progress:
        if not images:
            files = {name: str(path) for name, path in model_stages.encode(encoder, progress).items()}
            return reply(as_json, files, files.values())
        reading = index_run.Reading.of(workers, max_pixels)
        pieces = index_run.encode_images(encoder, images, progress, reading, skipped)
        rows = [row for codes, paths in pieces for row in zip(paths, codes.packed.tolist(), strict=True)]
    for one in skipped:
        note(f"passed over: {one}")
    codes = {path_text(path): bytes(row) for path, row in rows}
    if out is not None:
        index_run.save_codes(out, encoder.card()["bits"], codes)
        return reply(as_json, {"codes": str(out)}, [out])
    hexes = {path: code.hex() for path, code in codes.items()}
    return reply(as_json, hexes, (f"{code}  {path}" for path, code in hexes.items()))
