"""Fields of requests: what they mean, and what is refused."""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from robusthash.core.limited_files import parse_json

_KEY = re.compile(r"[\x20-\x7e]{1,200}")
_DIGITS = re.compile(r"[0-9]{1,19}")
_NAMESPACE = uuid.UUID("5b0f4a52-6a3c-4a0e-9d57-6d0c2f1d3a11")  # of keys made of idempotency keys
_PAYLOAD = 64 << 10  # characters of the payload of one item


def _item_id(value: Any) -> int:
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if type(value) is not int:
        raise ValueError("an id is a whole number or its decimal digits as text")
    return value


ItemId = Annotated[int, BeforeValidator(_item_id), Field(ge=0, lt=1 << 63)]
"""An id as a number or as text; no truth value, and no number with a fraction or a power."""


def names(fields: str | None) -> list[str] | None:
    return None if fields is None else [name for name in map(str.strip, fields.split(",")) if name]


def mapping(text: str | None, name: str) -> dict[str, Any] | None:
    """A JSON object of a form field."""
    if text is None or not text.strip():
        return None
    value = parse_json(text, name, once=True)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a JSON object, got {type(value).__name__}")
    return value


def described_items(text: str | None, count: int) -> list[dict[str, Any]]:
    """Key and payload of each image."""
    if text is None:
        return [{} for _ in range(count)]
    values = parse_json(text, "items", once=True)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"items is a JSON list with one object for each of {count} images")
    for value in values:
        if not isinstance(value, dict) or set(value) - {"key", "payload"}:
            raise ValueError("items: each is an object with key and payload")
        if not isinstance(value.get("payload", {}), dict):
            raise ValueError("items: a payload is a JSON object")
        if len(str(value.get("payload", ""))) > _PAYLOAD:
            raise ValueError(f"items: a payload may have {_PAYLOAD} characters")
        for name in ("path", "path_hex"):
            if name in value.get("payload", {}):
                raise ValueError(f"items: the payload field {name!r} is the service's own")
    return [
        {name: field for name, field in value.items() if (name, field) != ("key", None)} for value in values
    ]


def item_key(described: dict[str, Any], place: int, write: str | None) -> str:
    """The key of an item; one without gets its own, from the name of a write under an idempotency key."""
    key = described.get("key")
    if key is None:
        return str(uuid.uuid4() if write is None else uuid.uuid5(_NAMESPACE, f"{write} {place}"))
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError("items: a key is a text of 1 to 200 printable ASCII characters")
    return key
