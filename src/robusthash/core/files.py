"""Writing files so that a crash, a kill or a full disk leaves the old file whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Write ``path`` by way of a temporary file beside it: flushed to disk, then renamed over it.

    The block receives the temporary path, which keeps the suffix of ``path``, and writes it. When the block ends, the
    file is flushed (fsync), renamed over ``path``, and the folder is flushed. When it raises, the temporary file is
    removed and ``path`` is as it was.

    Raises:
        OSError: naming ``path``, where the disk is full or the folder cannot be written; ``path`` is untouched.
        FileNotFoundError: the folder does not exist, or the block wrote nothing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with write_aside(folder / "note.txt") as aside:
        ...     _ = aside.write_text("kept")
        >>> (folder / "note.txt").read_text()
        'kept'
    """
    with write_all_aside([path]) as asides:
        yield asides[0]


@contextlib.contextmanager
def write_all_aside(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """``write_aside`` for files that belong together: all are on disk before the first is renamed."""
    targets = [Path(path) for path in paths]
    for target in targets:
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    token = secrets.token_hex(6)
    asides = [target.with_name(f".{target.stem}.{token}.part{target.suffix}") for target in targets]
    try:
        yield asides
        for target, aside in zip(targets, asides, strict=True):
            if not aside.exists():
                raise FileNotFoundError(f"cannot write {target}: nothing was written to {aside.name}")
            flush(aside)
        for target, aside in zip(targets, asides, strict=True):
            os.replace(aside, target)
        for folder in {target.parent for target in targets}:
            flush(folder)
    except OSError as error:
        elsewhere = error.filename is not None and Path(error.filename) not in asides
        if error.errno is None or elsewhere:  # our own message, or another file that the block touched
            raise
        names = ", ".join(str(target) for target in targets)
        raise OSError(
            error.errno, f"cannot write {names}: {os.strerror(error.errno)}; what was there before is unchanged"
        ) from error
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
