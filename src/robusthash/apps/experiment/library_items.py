"""The image files of a library as items of an index: key, payload, and a stamp that tells a changed file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robusthash.core.runtime import digest
from robusthash.data.folder import manifest_rows
from robusthash.data.image_files import ImageFile, path_text

_LISTS = ("labels", "class", "captions")  # columns of a CSV file whose cells may hold several, with ;


@dataclass(frozen=True)
class LibraryItem:
    """One image file of a library."""

    path: Path
    key: str
    payload: dict[str, Any]
    stamp: str  # of the file's size, time and payload

    def is_done(self, held: Mapping[str, tuple[int, str]], on_duplicate: str) -> bool:
        """True where the index needs nothing of this file."""
        return self.key in held and (on_duplicate == "skip" or held[self.key][1] == self.stamp)


@dataclass
class PayloadTable:
    """The rows of a payload file by the key of their file, and what became of them."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: bool = False
    used: set[str] = field(default_factory=set)
    lacking: int = 0  # files without a row

    @classmethod
    def read(cls, file: Path | None, folder: Path) -> PayloadTable:
        """Read a ``.csv`` or JSON-lines file; its column ``file`` is relative to ``folder``, or absolute.

        Raises:
            ValueError: no such column, or a file named twice.
        """
        if file is None:
            return cls()
        rows: dict[str, dict[str, Any]] = {}
        for line, row in manifest_rows(file):
            if not isinstance(row.get("file"), str):
                raise ValueError(f"{file}, line {line} names no file: a payload file has a column 'file'")
            key = key_of(folder / row["file"])
            if key in rows:
                raise ValueError(f"{file}, line {line} names {row['file']!r} again; keep one row a file")
            rows[key] = {
                name: _value(name, cell) for name, cell in row.items() if name != "file" and cell != ""
            }
        return cls(rows, given=True)

    def of(self, key: str) -> dict[str, Any]:
        """The payload of a file; {} where there is no row."""
        if key not in self.rows:
            self.lacking += 1
            return {}
        self.used.add(key)
        return self.rows[key]

    def report(self) -> dict[str, Any]:
        """Files without a row and rows without a file; nothing where no payload file was given."""
        if not self.given:
            return {}
        return {"without_payload": self.lacking, "rows_without_file": sorted(set(self.rows) - self.used)}


def items_of(paths: Sequence[Path], table: PayloadTable) -> list[LibraryItem]:
    """The items of some files, in their order; the payload begins with the path."""
    return [_item(path, table) for path in paths]


def path_payload(file: str | Path | ImageFile) -> dict[str, Any]:
    """The absolute ``path``, links not followed, with ``:member`` inside an archive.

    Where the path is no UTF-8, ``path`` is its readable form and ``path_hex`` has the bytes that open it.
    """
    path, member = (
        (file.path, f":{file.member}" * bool(file.member)) if isinstance(file, ImageFile) else (file, "")
    )
    whole = os.path.abspath(path)
    text, written = path_text(whole), os.fsencode(whole)
    exact = text.encode() == written
    return {"path": text + member} if exact else {"path": text + member, "path_hex": written.hex()}


def key_of(file: str | Path | ImageFile) -> str:
    """The key of a file: its path, made unique where that is no UTF-8."""
    return "#".join(path_payload(file).values())


def _item(path: Path, table: PayloadTable) -> LibraryItem:
    key, own = key_of(path), path_payload(path)
    payload = {**own, **table.of(key), **own}
    try:
        state = path.stat()
    except OSError:  # gone, or a link to nothing by now: reading it says so
        return LibraryItem(path, key, payload, "")
    return LibraryItem(path, key, payload, f"{state.st_size} {state.st_mtime_ns} {digest(payload)}")


def _value(name: str, cell: Any) -> Any:
    """A cell: texts of labels with ; between become a list, all else stays as written."""
    if name in _LISTS and isinstance(cell, str) and ";" in cell:
        return [part.strip() for part in cell.split(";") if part.strip()]
    return cell
