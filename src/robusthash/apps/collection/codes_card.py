"""The card of an encoded collection and the statuses of its parts, checked when they are read."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from robusthash.core.limited_files import read_json, shortened
from robusthash.models.saved_hasher import Checks, field_fault, is_count, is_digest

ItemFormat = Literal["jsonl", "parquet"]
FORMAT = 1
AGAIN = "'robusthash encode' with the same options makes it again"
_FIXED = {
    "format": "files of another version",
    "origin": "codes of another model",
    "bits": "codes of another length",
    "image_size": "images of another size",
    "source": "codes of another collection",
    "part_size": "parts of another size",
    "items": "items in another format",
}
"""Facts of a card that all who write into the folder share, and the words for those that differ."""


@dataclass(frozen=True)
class CodesCard:
    """The facts of an encoded collection.

    Attributes:
        origin: digest of the model that made the codes.
        image_size: pixels a side.
        source, root: name of the folder or manifest, or "tar", and the folder that names are relative to.
        part_size: images of a part; 0 of tars, which are a part each.
        items: format of the items.
        parts: names of all parts.
        listings: of each part the digest of what the collection lists in it, as of the last call; none of
            tars, whose parts do not depend on each other.
    """

    origin: str
    bits: int
    image_size: int
    source: str
    root: str
    part_size: int
    items: ItemFormat
    parts: tuple[str, ...]
    listings: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.items not in get_args(ItemFormat):
            raise ValueError(f"items are written as {' or '.join(get_args(ItemFormat))}, got {self.items!r}")

    @classmethod
    def read(cls, file: Path) -> CodesCard:
        """The card in a file.

        Raises:
            ValueError: of another version, or with a wrong field, which is named.
        """
        facts = read_json(file)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"{file} is of another version of robusthash; encode into another folder")
        facts = {"listings": [], **facts}
        fault = field_fault(facts, _CARD)
        if not fault and facts["listings"] and len(facts["listings"]) != len(facts["parts"]):
            fault = f"listings has {len(facts['listings'])} digests of {len(facts['parts'])} parts"
        if fault:
            raise ValueError(f"{file} is damaged: {fault}; encode into another folder")
        known = {name: facts[name] for name in (*_CARD, "format")}
        return cls(**known | {name: tuple(facts[name]) for name in ("parts", "listings")})

    def joined(self, held: CodesCard) -> CodesCard:
        """The card with the parts of ``held`` too, as tars of another call."""
        return CodesCard(**{**asdict(self), "parts": tuple(sorted({*held.parts, *self.parts}))})

    def listing(self, name: str) -> str:
        """The digest of what a part lists; "" of a tar."""
        return dict(zip(self.parts, self.listings, strict=False)).get(name, "")

    def check_same(self, held: CodesCard, path: Path) -> None:
        """Raise ValueError where the folder at ``path`` holds something else."""
        for key, what in _FIXED.items():
            before, now = getattr(held, key), getattr(self, key)
            if before != now:
                raise ValueError(f"{path} holds {what} ({key} {before}, here {now}); give another --out")


def read_status(file: Path) -> dict[str, Any]:
    """The status of a part; {} where there is none.

    Raises:
        ValueError: it cannot be read, or has a wrong field, which is named.
    """
    try:
        status = read_json(file, limit=1 << 30)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {AGAIN}") from None
    state = status.get("state") if isinstance(status, dict) else None
    fault = (
        field_fault(status, _STATUS[state])
        if state in ("done", "failed")
        else f"state is {shortened(repr(state))}"
    )
    if fault:
        raise ValueError(f"{file} is damaged: {fault}; {AGAIN}")
    return dict(status)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_parts(value: Any) -> bool:
    """Different names, none of which leads out of the folder."""
    return (
        _is_texts(value) and len(set(value)) == len(value) and not any({os.sep, "\0"} & {*n} for n in value)
    )


def _is_skipped(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and set(one) == {"file", "reason"} and all(map(_is_text, one.values()))
        for one in value
    )


def _is_sha256(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(kind)) for kind in ("codes", "items"))


_CARD: Checks = {
    "origin": is_digest,
    "bits": is_count,
    "image_size": is_count,
    "source": _is_text,
    "root": _is_text,
    "part_size": lambda value: is_count(value, 0),
    "items": lambda value: value in get_args(ItemFormat),
    "parts": _is_parts,
    "listings": _is_texts,
}
_STATUS: dict[Any, Checks] = {
    "done": {
        "source": _is_text,
        "items": lambda value: is_count(value, 0),
        "sha256": _is_sha256,
        "skipped": _is_skipped,
    },
    "failed": {"reason": _is_text},
}
