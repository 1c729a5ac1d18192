"""Atomic writing of files, and strict JSON: a crash, a kill or a full disk leaves the old file whole."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_DISK_FULL = re.compile(r"inline_container\.cc|No space left|os error 28")


@contextlib.contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` (same suffix); it is flushed to disk and renamed over ``path``.

    Where the block raises, the temporary file is removed and ``path`` is as it was.

    Raises:
        OSError: naming ``path``, where the disk is full or the folder cannot be written.
        FileNotFoundError: the folder does not exist, or the block wrote nothing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with write_aside(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("text")
        >>> (folder / "note.txt").read_text()
        'text'
    """
    with write_all_aside([path]) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def write_all_aside(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """``write_aside`` for files that belong together: all are on disk before the first is renamed."""
    targets = [Path(path) for path in paths]
    for target in targets:
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
        if target.exists() and not target.is_file():  # a device or a pipe, whose place the file would take
            raise OSError(f"cannot write {target}: it is there and is no regular file; name another")
    temporaries = [_aside(target) for target in targets]
    try:
        yield temporaries
        for target, temporary in zip(targets, temporaries, strict=True):
            if not temporary.exists():
                raise FileNotFoundError(f"cannot write {target}: nothing was written to {temporary.name}")
            flush(temporary)
        for target, temporary in zip(targets, temporaries, strict=True):
            os.replace(temporary, target)
        for folder in {target.parent for target in targets}:
            flush(folder)
    except Exception as error:
        cause, names = _disk_error(error), ", ".join(str(target) for target in targets)
        if cause is None and _DISK_FULL.search(str(error)):  # errors that torch and safetensors have for it
            reason = f"cannot write {names}: is the disk full? What was there before is unchanged"
            raise OSError(errno.ENOSPC, reason) from error
        elsewhere = cause and cause.filename is not None and Path(cause.filename) not in temporaries
        if cause is None or cause.errno is None or elsewhere:  # our own message, or another file of the block
            raise
        reason = f"cannot write {names}: {os.strerror(cause.errno)}; what was there before is unchanged"
        raise OSError(cause.errno, reason) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8; errors as of ``write_aside``."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_arrays(path: str | Path, /, **arrays: Any) -> None:
    """Write arrays by name as ``.npz``, without pickle; errors as of ``write_aside``."""
    import numpy as np  # which the command line has no use for at its start

    with write_aside(path) as aside:
        np.savez(aside, allow_pickle=False, **arrays)


def _aside(target: Path) -> Path:
    """The name of a temporary file, with the process that writes it; see ``remove_leftovers``."""
    return target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(6)}.part{target.suffix}")


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the disk behind an error: ``torch.save`` says of a full disk "unexpected pos 768"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def remove_leftovers(folder: Path, process: int) -> None:
    """Remove the temporary files that a killed process left below ``folder``."""
    for path in folder.rglob(f".*.{process}-*.part*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def refuse_full(folder: Path) -> None:
    """Raise FileExistsError where ``folder`` is a file, or holds something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; give a folder of its own, which is new")


@contextlib.contextmanager
def write_folder_aside(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder next to ``folder``; it is flushed to disk and becomes ``folder`` at once, or not.

    Raises:
        FileExistsError: ``folder`` is there and holds something, before the block or after it.
    """
    folder = Path(folder)
    refuse_full(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        process = leftover.name.removeprefix(f".{folder.name}.").partition("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(leftover)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(6)}.part")
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            flush(path)
        os.replace(aside, folder)  # an empty folder gives way, a full one is refused
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_alive(process: int) -> bool:
    """True where a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def flush(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_text(value: Any, where: str = "value") -> str:
    """``value`` as strict JSON, which has no infinite numbers: they are written as "inf" and "-inf".

    Raises:
        ValueError: a NaN, or what JSON does not hold; its place is named, ``where`` being the whole value.
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
