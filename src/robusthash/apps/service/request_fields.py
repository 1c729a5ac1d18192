"""Fields of requests: what they mean, and what is refused."""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import Any

from robusthash.core.limited_files import parse_json

_KEY = re.compile(r"[\x20-\x7e]{1,200}")
_NAMESPACE = uuid.UUID("5b0f4a52-6a3c-4a0e-9d57-6d0c2f1d3a11")  # of keys made of idempotency keys
_PAYLOAD = 64 << 10  # characters of the payload of one item


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
    return values


def item_key(described: dict[str, Any], place: int, idempotency_key: str | None) -> str:
    key = described.get("key")
    if key is None:
        made = (
            uuid.uuid4() if idempotency_key is None else uuid.uuid5(_NAMESPACE, f"{idempotency_key} {place}")
        )
        return str(made)
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError("items: a key is a text of 1 to 200 printable ASCII characters")
    return key


def request_digest(content: bytes, described: dict[str, Any]) -> str:
    return hashlib.sha256(content + repr(sorted(described.items())).encode()).hexdigest()[:32]
