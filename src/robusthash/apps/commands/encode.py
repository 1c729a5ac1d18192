from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, RunPath
from robusthash.apps.commands.terminal import progress_bars, reply


def encode(
    run: RunPath,
    images: Annotated[list[Path] | None, Argument(help="Image files and folders of them.")] = None,
    out: Annotated[Path | None, Option(help="Write the codes of the images here (.npz).")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Codes of images as hex lines (code, path) or .npz; without images, of every split of the run as .npz.

    The first bit of a code is the highest of its first hex digit; zeros pad the end.
    """
    from robusthash.apps.experiment import index_run, model_stages
    from robusthash.apps.experiment.run_directory import load_run

    if out is not None and (not images or out.suffix != ".npz"):
        raise ValueError(f"--out takes a path that ends in .npz, for the codes of images, got {str(out)!r}")
    encoder = load_run(run)
    with progress_bars() as progress:
        if not images:
            files = {name: str(path) for name, path in model_stages.encode(encoder, progress).items()}
            return reply(as_json, files, files.values())
        pieces = index_run.encode_images(encoder, images, progress)
        rows = [row for codes, paths in pieces for row in zip(paths, codes.packed.tolist(), strict=True)]
    codes = {path: bytes(row) for path, row in rows}
    if out is not None:
        index_run.save_codes(out, encoder.card()["bits"], codes)
        return reply(as_json, {"codes": str(out)}, [out])
    hexes = {str(path): code.hex() for path, code in codes.items()}
    return reply(as_json, hexes, (f"{code}  {path}" for path, code in hexes.items()))
