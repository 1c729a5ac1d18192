"""The image files of a library as items of an index: key, payload, and a stamp that tells a changed file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robusthash.core.runtime import digest
from robusthash.core.types import Codes
from robusthash.data.folder import manifest_rows
from robusthash.data.image_files import ImageFile, path_text

OWN_KEYS = ("path", "path_hex")
"""The payload keys that an index fills in itself."""

_LISTS = ("labels", "class", "captions")  # columns of a CSV file whose cells may hold several, with ;


@dataclass(frozen=True)
class LibraryItem:
    """One image file of a library."""

    path: Path
    key: str
    payload: dict[str, Any]
    stamp: str  # of the file's size, time and payload
    described: bool = True  # by a row of a payload file; without one, what is held of it stays

    def is_done(self, held: Mapping[str, tuple[int, str]], on_duplicate: str) -> bool:
        """True where the index needs nothing of this file."""
        return self.key in held and (on_duplicate == "skip" or held[self.key][1] == self.stamp_over(held))

    def stamp_over(self, held: Mapping[str, tuple[int, str]]) -> str:
        """The stamp next to what is held: of the payload held, where there is no row for this file."""
        before = held[self.key][1] if self.key in held else ""
        if self.described or not (before and self.stamp):
            return self.stamp
        return " ".join([*self.stamp.split()[:2], before.split()[-1]])


@dataclass
class DistinctCodes:
    """The different codes among those of a build."""

    distinct: set[bytes] = field(default_factory=set)
    count: int = 0

    def see(self, codes: Codes) -> None:
        """Count codes."""
        self.distinct.update(map(bytes, codes.packed.numpy()))
        self.count += len(codes.packed)

    def report(self) -> dict[str, int]:
        """Their numbers, where fewer than half of the codes are different."""
        few = 2 * len(self.distinct) < self.count
        return {"encoded": self.count, "distinct_codes": len(self.distinct)} if few else {}


@dataclass
class PayloadTable:
    """The rows of a payload file by the key of their file, and what became of them."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    has_file: bool = False
    used: set[str] = field(default_factory=set)
    lacking: int = 0  # files without a row

    @classmethod
    def read(cls, file: Path | None, folder: Path) -> PayloadTable:
        """Read a ``.csv`` or JSON-lines file; its column ``file`` is relative to ``folder``, or absolute.

        Raises:
            ValueError: no such column, one that the index fills in itself, or a file named twice.
        """
        if file is None:
            return cls()
        rows: dict[str, dict[str, Any]] = {}
        for line, row in manifest_rows(file):
            named, payload = described_file(row, f"{file}, line {line}")
            key = key_of(folder / named)
            if key in rows:
                raise ValueError(f"{file}, line {line} names {named!r} again; keep one row a file")
            rows[key] = payload
        return cls(rows, has_file=True)

    def of(self, key: str) -> dict[str, Any]:
        """The payload of a file; {} where there is no row."""
        if key not in self.rows:
            self.lacking += 1
            return {}
        self.used.add(key)
        return self.rows[key]

    def report(self) -> dict[str, Any]:
        """Files without a row and rows without a file; nothing where no payload file was given."""
        if not self.has_file:
            return {}
        return {"without_payload": self.lacking, "rows_without_file": sorted(set(self.rows) - self.used)}


def described_file(row: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The file that a row of a manifest names, and its payload: the other columns that are not empty.

    Raises:
        ValueError: no column ``file``, or one that the index fills in itself; ``where`` is named.
    """
    if not isinstance(row.get("file"), str) or not row["file"]:
        raise ValueError(f"{where} names no file: its path goes into the column 'file'")
    if own := [name for name in OWN_KEYS if name in row]:
        raise ValueError(f"{where}: the index fills in {own[0]!r} itself; rename the column")
    return row["file"], {n: _value(n, cell) for n, cell in row.items() if n != "file" and cell != ""}


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


def named_file(text: str, written: str, begins: str = "") -> Path | None:
    """The file of a ``path_hex``; None unless it is hex that begins so, and ``text`` is its readable form.

    ``text`` may be its key too.
    """
    try:
        raw = bytes.fromhex(written)
    except ValueError:
        return None
    fits = raw.decode("utf-8", "backslashreplace") in (text, text.rpartition("#")[0])
    return Path(os.fsdecode(raw)) if fits and written.startswith(begins) else None


def _item(path: Path, table: PayloadTable) -> LibraryItem:
    key, own = key_of(path), path_payload(path)
    described, payload = key in table.rows, {**own, **table.of(key)}
    try:
        state = path.stat()
    except OSError:  # gone, or a link to nothing by now: reading it says so
        return LibraryItem(path, key, payload, "", described)
    stamp = f"{state.st_size} {state.st_mtime_ns} {digest(payload)}"
    return LibraryItem(path, key, payload, stamp, described)


def _value(name: str, cell: Any) -> Any:
    """A cell: texts of labels with ; between become a list, all else stays as written."""
    if name in _LISTS and isinstance(cell, str) and ";" in cell:
        return [part.strip() for part in cell.split(";") if part.strip()]
    return cell
