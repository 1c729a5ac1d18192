from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, RunPath
from robusthash.apps.commands.terminal import print_json, print_lines, progress_bars


def encode(
    run: RunPath,
    images: Annotated[list[Path] | None, Argument(help="Image files and folders of them.")] = None,
    out: Annotated[Path | None, Option(help="Write the codes of the images here (.npz).")] = None,
    as_json: AsJson = False,
) -> None:
    """Codes of images as hex lines (code, path) or .npz; without images, packed codes of every split of the run.

    The first bit of a code is the highest of its first hex digit; zeros pad the end.
    """
    from robusthash.apps.experiment import stages
    from robusthash.apps.experiment.index_run import encode_images, encode_to_file
    from robusthash.apps.experiment.run_directory import load_run

    if out is not None and (not images or out.suffix != ".npz"):
        raise ValueError(f"--out takes a path that ends in .npz, for the codes of images, got {str(out)!r}")
    with progress_bars() as progress:
        if not images:
            files = stages.encode(load_run(run), progress)
            answer = {name: str(path) for name, path in files.items()}
        elif out is not None:
            answer = {"codes": str(out)}
            encode_to_file(load_run(run), images, out, progress)
        else:
            pieces = [
                zip(paths, codes.packed, strict=True)
                for codes, paths in encode_images(load_run(run), images, progress)
            ]
            answer = {str(path): bytes(row.tolist()).hex() for piece in pieces for path, row in piece}
    if as_json:
        print_json(answer)
    elif images and out is None:
        print_lines(f"{code}  {path}" for path, code in answer.items())
    else:
        print_lines(answer.values())
