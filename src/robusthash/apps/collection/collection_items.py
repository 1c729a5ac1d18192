"""Items of collections of images: what a folder, a manifest or tars have in common."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from robusthash.data.image_files import ImageFile, Skipped, path_text
from robusthash.index.payload_filter import check_key, to_json


class SourceError(ValueError):
    """A part of a collection that cannot be read, as a damaged tar; the others can."""


@dataclass(frozen=True)
class CollectionItem:
    """One image of a collection."""

    name: str  # relative to the root of the collection; in a tar "shard.tar:member"
    file: ImageFile
    payload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> int:
        """62 bits of the SHA-256 of the name: the same wherever and with whatever else it is encoded."""
        return int.from_bytes(hashlib.sha256(os.fsencode(self.name)).digest()[:8], "big") >> 2


Entry = CollectionItem | Skipped


def once(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of a part, without images of a name (or, by chance, an id) that was there before."""
    ids: set[int] = set()
    for entry in entries:
        if isinstance(entry, CollectionItem) and entry.id in ids:
            yield Skipped(path_text(entry.name), "its name is there already")
            continue
        if isinstance(entry, CollectionItem):
            ids.add(entry.id)
        yield entry


def name_fault(name: str) -> str:
    """The reason why no file has this name; "" where one can."""
    try:
        written = os.fsencode(name)
    except UnicodeEncodeError:
        return "no file name holds half of a surrogate pair"
    return "no file name holds a NUL character" if b"\0" in written else ""


def check_payload(payload: Mapping[str, Any], what: str) -> None:
    """Raise ValueError where an index would refuse it."""
    for key in payload:
        check_key(key)
    to_json(payload, what)


def digest_of(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]
