"""The folder of an encoded collection: codes, items and a status of each part, and a card of the whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robusthash.apps.collection.codes_card import AGAIN, CodesCard, read_status
from robusthash.apps.experiment.run_files import write_json
from robusthash.core.atomic_files import write_all_aside
from robusthash.core.directory_lock import InUse, owned
from robusthash.core.limited_files import parse_json, read_json
from robusthash.core.types import Codes
from robusthash.data.image_files import Skipped, path_text

CARD, REPORT = "collection.json", "report.json"
_PARTS = "parts"  # the subfolder of the parts
_WAIT = 30.0  # seconds for another process that writes the card


@dataclass(frozen=True)
class PartCodes:
    """The codes of one part, and what is known of its items."""

    codes: Codes  # the ids are those of the items
    names: list[str]
    payload: list[dict[str, Any]]


class CodesFolder:
    """An encoded collection on disk; any number of processes may write different parts of it."""

    def __init__(self, path: Path, card: CodesCard) -> None:
        self.path, self.card = path, card

    @classmethod
    def open(cls, path: str | Path) -> CodesFolder:
        """An encoded collection that is there.

        Raises:
            FileNotFoundError, ValueError: there is none, or one of another format.
        """
        path = Path(path)
        if not (path / CARD).is_file():
            raise FileNotFoundError(
                f"{path} holds no encoded collection; make it with 'robusthash encode --images'"
            )
        return cls(path, CodesCard.read(path / CARD))

    @classmethod
    def make(cls, path: Path, card: CodesCard) -> CodesFolder:
        """Make the folder, or check that what it holds belongs to the same collection and model.

        Tars join those that are named already; of a folder or manifest the parts are those of now, and what
        it holds of parts that are gone is removed.

        Raises:
            ValueError: the folder holds something else, or codes of something else.
        """
        if card.items == "parquet":
            parquet()
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out takes a folder for the codes of a collection")
        others = path.is_dir() and [f for f in path.iterdir() if f.suffix != ".lock" and f.name != _PARTS]
        if others and not (path / CARD).exists():
            raise ValueError(f"{path} holds other files; give the codes a folder of their own")
        with _card_of(path):
            if (path / CARD).exists():
                held = cls.open(path).card
                card.check_same(held, path)
                if card.source == "tar":
                    card = card.joined(held)
            folder = cls(path, card)
            folder._parts.mkdir(exist_ok=True)
            for gone in {file.stem for file in folder._parts.glob("*.json")} - set(card.parts):
                for file in (folder._status(gone), folder._codes(gone), folder._items(gone)):
                    file.unlink(missing_ok=True)
            write_json(path / CARD, asdict(card))
        return folder

    @property
    def _parts(self) -> Path:
        return self.path / _PARTS

    def _status(self, name: str) -> Path:
        return self._parts / f"{name}.json"

    def _codes(self, name: str) -> Path:
        return self._parts / f"{name}.npy"

    def _items(self, name: str) -> Path:
        return self._parts / f"{name}.{self.card.items}"

    def status(self, name: str) -> dict[str, Any]:
        """The status of a part; {} where there is none.

        Its ``state`` is ``done``, ``failed``, or ``stale`` where it was encoded, and the collection has come
        to list something else in it.

        Raises:
            ValueError: it cannot be read, or has a wrong field.
        """
        status = read_status(self._status(name))
        if status.get("state") == "done" and status.get("listing", "") != self.card.listing(name):
            return {**status, "state": "stale"}
        return status

    def is_done(self, name: str, state: str, listing: str = "") -> bool:
        """True where a part was encoded from images of this state, and what is listed in it."""
        try:
            status = read_status(self._status(name))
        except ValueError:
            return False
        expected = {"state": "done", "source": state, "listing": listing}
        return {**{"listing": ""}, **status}.items() >= expected.items() and not self._damaged(name, status)

    @contextlib.contextmanager
    def working_on(self, name: str, work: str = "encode") -> Iterator[None]:
        """Own one part; raises ``InUse`` where another process does."""
        with owned(self._parts, f"{work} {name}", lock=f"{name}.lock"):
            yield

    def forget_lost(self, name: str, work: str) -> None:
        """Remove the lock and the half-written files of a worker of ``work`` on a machine that is gone.

        For the one who knows that it is: that no other of this work has the part now.
        """
        lock = self._parts / f"{name}.lock"
        with contextlib.suppress(OSError, ValueError):
            owner = read_json(lock)
            if owner.get("work") == f"{work} {name}" and owner.get("host") != socket.gethostname():
                for left in self._parts.glob(f".{name}.{owner.get('pid')}-*.part*"):
                    left.unlink()
                lock.unlink()

    @contextlib.contextmanager
    def writing(self, name: str, state: str, listing: str = "") -> Iterator[PartWriter]:
        """A writer of a part, which is there whole when the block ends, or not at all."""
        self._status(name).unlink(missing_ok=True)
        with write_all_aside([self._codes(name), self._items(name)]) as (codes, items):
            with PartWriter(codes, items, self.card) as writer:
                yield writer
            written = {"codes": _sha256(codes), "items": _sha256(items)}
        status = {"state": "done", "source": state, "items": writer.count, "sha256": written}
        status |= {"skipped": [vars(one) for one in writer.skipped], "listing": listing}
        write_json(self._status(name), status)

    def fail(self, name: str, reason: str) -> None:
        """Write down why a part could not be encoded."""
        write_json(self._status(name), {"state": "failed", "reason": reason})

    def read(self, name: str) -> PartCodes:
        """The codes of a part that is done.

        Raises:
            ValueError: it is not done, or its files are not those that were written.
        """
        status = self.status(name)
        if status.get("state") not in ("done", "stale"):
            raise ValueError(f"{name} in {self.path} is not encoded")
        if file := self._damaged(name, status):
            raise ValueError(f"{file} is damaged; {AGAIN}")
        packed = torch.from_numpy(np.load(self._codes(name), allow_pickle=False))
        ids, names, payload = _read_items(self._items(name))
        codes = Codes(packed, self.card.bits, torch.tensor(ids, dtype=torch.int64), self.card.origin)
        return PartCodes(codes, names, payload)

    def _damaged(self, name: str, status: Mapping[str, Any]) -> Path | None:
        """The first file of a part that is not as it was written."""
        for kind, file in (("codes", self._codes(name)), ("items", self._items(name))):
            if not file.is_file() or _sha256(file) != status["sha256"][kind]:
                return file
        return None

    def no_codes(self) -> Codes:
        """Codes of no image, which have a length and an origin."""
        return Codes.none(self.card.bits, self.card.origin)

    def report(self) -> dict[str, Any]:
        """Parts done, failed, stale and missing, the number of items, and the files that were passed over.

        Of the card as it is by now: another process may have found another listing.
        """
        now = CodesFolder.open(self.path)
        report: dict[str, Any] = {"parts": len(now.card.parts), "done": 0, "failed": {}}
        stale, missing, items, skipped = list[str](), list[str](), 0, []
        for name in now.card.parts:
            try:
                status = now.status(name)
            except ValueError as error:
                status = {"state": "failed", "reason": str(error)}
            match status.get("state"):
                case "done":
                    report["done"] += 1
                    items += status["items"]
                    skipped += status["skipped"]
                case "failed":
                    report["failed"][name] = status["reason"]
                case "stale":
                    stale.append(name)
                case _:
                    missing.append(name)
        return {**report, "stale": stale, "missing": missing, "items": items, "skipped": skipped}

    def write_report(self) -> dict[str, Any]:
        """``report``, which is written down too."""
        report = self.report()
        write_json(self.path / REPORT, report)
        return report


class PartWriter:
    """The codes and items of one part, written as they come."""

    def __init__(self, codes: Path, items: Path, card: CodesCard) -> None:
        self._path, self._card, self._rows = codes, card, list[np.ndarray]()
        self._items = _ParquetItems(items) if card.items == "parquet" else _JsonItems(items)
        self.count, self.skipped = 0, list[Skipped]()

    def add(
        self,
        packed: np.ndarray,
        ids: Sequence[int],
        names: Sequence[str],
        payload: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add (N, bytes) packed codes with the id, name and payload of each."""
        self._rows.append(packed)
        rows = zip(ids, names, payload, strict=True)
        self._items.add([_named(name) | {"id": number, "payload": dict(one)} for number, name, one in rows])
        self.count += len(packed)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._items.close()
        if kind is None:
            none = np.zeros((0, (self._card.bits + 7) // 8), dtype=np.uint8)
            np.save(self._path, np.concatenate([none, *self._rows]))


class _JsonItems:
    """One JSON object a line: ``id``, ``name``, ``payload``; ``name_hex`` where a name is no UTF-8."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()


class _ParquetItems:
    """A table: ``id`` int64, ``name``, ``name_hex`` (null of names in UTF-8), ``payload`` as JSON text."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        texts = dict.fromkeys(("name", "name_hex", "payload"), pyarrow.string())
        kinds = {"id": pyarrow.int64(), **texts}
        self._table, self._schema = pyarrow.Table, pyarrow.schema(kinds)
        self._file = parquet().ParquetWriter(path, self._schema)

    def add(self, rows: list[dict[str, Any]]) -> None:
        raw = [row | {"payload": json.dumps(row["payload"], sort_keys=True)} for row in rows]
        self._file.write_table(self._table.from_pylist(raw, self._schema))

    def close(self) -> None:
        self._file.close()


def _read_items(path: Path) -> tuple[list[int], list[str], list[dict[str, Any]]]:
    """Ids, names and payload of the items of a part."""
    if path.suffix == ".parquet":
        rows = parquet().read_table(path).to_pylist()
        rows = [row | {"payload": parse_json(row["payload"], str(path))} for row in rows]
    else:
        with path.open(encoding="utf-8") as file:
            rows = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(file, start=1)]
    names = [
        os.fsdecode(bytes.fromhex(row["name_hex"])) if row.get("name_hex") else row["name"] for row in rows
    ]
    return [row["id"] for row in rows], names, [row["payload"] for row in rows]


def _named(name: str) -> dict[str, str]:
    """A name as text, and its bytes where those are no UTF-8."""
    text, written = path_text(name), os.fsencode(name)
    return {"name": text} if text.encode() == written else {"name": text, "name_hex": written.hex()}


def parquet() -> Any:
    """``pyarrow.parquet``; ImportError says how to install it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'robusthash[parquet]'") from None
    return pyarrow.parquet


@contextlib.contextmanager
def _card_of(path: Path) -> Iterator[None]:
    """Own the card for a moment, as soon as nobody else does."""
    until = time.monotonic() + _WAIT
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(owned(path, "write the card", lock="collection.lock"))
                break
            except InUse:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
