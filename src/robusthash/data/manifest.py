"""Which image files there are and what is written about them: folders of classes, manifests, plain tar
archives."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from robusthash.data.transforms import SUFFIXES, ImageFile

LabelField = Literal["labels", "class"]

_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "query", "database"})


@dataclass(frozen=True)
class Entry:
    """One image file with what is known of it."""

    file: ImageFile
    labels: tuple[str, ...]
    split: str = ""
    captions: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # labels of the other label column


def entries_of_folder(root: Path) -> list[Entry]:
    """Every image below the class folders of ``root``, which give the labels. Hidden files are left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: nothing in it, images beside the class folders, a class folder without images, or folders
            that are named like splits.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root.absolute()}; it should hold one folder of images for each class"
        )
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    loose = [path for path in visible if _is_image(path)]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie in {root} itself and have no label (first: {loose[0].name}); "
            "move each into a folder named like its class, or give a manifest"
        )
    classes = [path for path in visible if path.is_dir()]
    if not classes:
        raise ValueError(f"{root} is empty: it holds neither class folders nor images")
    if {path.name.lower() for path in classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"the folders of {root} are named like splits ({', '.join(path.name for path in classes)}), which would "
            "become labels; give a manifest with the columns file, labels and split"
        )
    entries: list[Entry] = []
    empty: list[str] = []
    for folder in classes:
        files = sorted(path for path in folder.rglob("*") if _is_image(path))
        entries += [Entry(ImageFile(path), (folder.name,)) for path in files]
        empty += [] if files else [folder.name]
    if empty:
        raise ValueError(
            f"{len(empty)} class folders of {root} hold no image: {_some(empty)}; remove or fill them"
        )
    return entries


def entries_of_manifest(
    manifest: Path, root: Path | None, archive: Path | None, label_field: LabelField, captions: bool
) -> list[Entry]:
    """The rows of a CSV or JSON-lines manifest, their files found in a folder or in a plain tar.

    Columns: ``file`` (path below ``root`` or name in ``archive``), ``labels`` (a list, or text with ``;``
    between) or ``class`` as ``label_field`` says, and optionally the other one of these two, ``captions`` (a
    list or one text), ``split`` and ``id``. A row may have no label, as in published lists; such an item is
    similar to nothing.

    Raises:
        FileNotFoundError: no manifest, no archive, or files of the manifest that are not there, counted and
            named.
        ValueError: a broken row (its line is named), a missing column, no label in any row, repeated files or
            ids.
    """
    rows = _rows(manifest)
    needed = ("file", label_field, "captions") if captions else ("file", label_field)
    for column in needed:
        lacking = [line for line, row in rows if column not in row]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(rows)} rows of {manifest} have no column {column!r} (first: line "
                f"{lacking[0]}); the columns of the first row are {', '.join(rows[0][1])}"
            )
    _unique([str(PurePosixPath(str(row["file"]))) for _, row in rows], "file", manifest)
    _unique([str(row["id"]) for _, row in rows if row.get("id") not in (None, "")], "id", manifest)
    if not any(_texts(row[label_field]) for _, row in rows):
        raise ValueError(
            f"no row of {manifest} has a label in the column {label_field!r}; fill it, or set label_field to "
            f"{other_field(label_field)!r} where the labels stand there"
        )
    members = _members(archive) if archive is not None else None
    files = [_locate(str(row["file"]), root, archive, members) for _, row in rows]
    missing = [str(row["file"]) for (_, row), file in zip(rows, files, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} files of {manifest} are not in {archive or root}: {_some(missing)}"
        )
    return [
        Entry(
            file,
            tuple(sorted(set(_texts(row[label_field])))),
            str(row.get("split") or ""),
            tuple(_texts(row.get("captions"), separator="")),
            tuple(sorted(set(_texts(row.get(other_field(label_field)))))),
        )
        for (_, row), file in zip(rows, files, strict=True)
        if file is not None
    ]


def other_field(label_field: LabelField) -> LabelField:
    """The label column that ``label_field`` is not."""
    return "class" if label_field == "labels" else "labels"


def _rows(manifest: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of every row."""
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest {manifest.absolute()}")
    try:
        text = manifest.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8 text: {error}") from error
    rows = list(
        _csv_rows(manifest, text) if manifest.suffix.lower() == ".csv" else _json_rows(manifest, text)
    )
    if not rows:
        raise ValueError(f"{manifest} has no rows")
    return rows


def _csv_rows(manifest: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{manifest}, line {reader.line_num} has not as many fields as the header")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{manifest}, after line {reader.line_num}: not CSV, {error}") from error


def _json_rows(manifest: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):  # not splitlines, which also cuts inside texts
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{manifest}, line {line} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{manifest}, line {line} is not a JSON object")
        yield line, row


def _texts(value: Any, separator: str = ";") -> list[str]:
    """A list of texts, or one text with separators -> its non-empty parts."""
    if value is None:
        return []
    if isinstance(value, str):
        parts: list[Any] = value.split(separator) if separator else [value]
    else:
        parts = value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts if str(part).strip()]


def _unique(values: Iterable[str], column: str, manifest: Path) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} values of the column {column!r} occur twice in {manifest}: {_some(twice)}"
        )


def _members(archive: Path) -> dict[str, ImageFile]:
    """Regular files of a plain tar, by name, to be read in place."""
    if not archive.is_file():
        raise FileNotFoundError(f"no archive {archive.absolute()}")
    try:
        with tarfile.open(archive, "r:") as opened:
            return {
                member.name.removeprefix("./"): ImageFile(
                    archive, member.name, member.offset_data, member.size
                )
                for member in opened
                if member.isreg() and not member.issparse()
            }
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a plain tar ({error}); uncompress it first") from error


def _locate(
    name: str, root: Path | None, archive: Path | None, members: dict[str, ImageFile] | None
) -> ImageFile | None:
    if members is not None:
        return members.get(name.removeprefix("./"))
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"the manifest names {name!r}; files must lie below {root}")
    path = (root or Path()) / relative
    return ImageFile(path) if path.is_file() else None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
