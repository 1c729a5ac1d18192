"""Writing files so that a crash, a kill or a full disk leaves the old file whole, and JSON that every reader
takes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Write ``path`` by way of a temporary file beside it: flushed to disk, then renamed over it.

    The block receives the temporary path, which keeps the suffix of ``path``, and writes it. When the block
    ends, the file is flushed (fsync), renamed over ``path``, and the folder is flushed. When it raises, the
    temporary file is removed and ``path`` is as it was.

    Raises:
        OSError: naming ``path``, where the disk is full or the folder cannot be written; ``path`` is
            untouched.
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
            error.errno,
            f"cannot write {names}: {os.strerror(error.errno)}; what was there before is unchanged",
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


def json_text(value: Any, where: str = "value") -> str:
    """``value`` as strict JSON, which has no infinite numbers: they are written as "inf" and "-inf".

    Args:
        where: what ``value`` is called in an error.

    Raises:
        ValueError: a NaN, or what JSON does not hold; its place is named.

    Example:
        >>> json_text({"psnr": float("inf")}).split()
        ['{', '"psnr":', '"inf"', '}']
    """
    return json.dumps(_plain(value, where), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{where} is NaN; a measure without a value must be left out, not written")
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON does not hold")
