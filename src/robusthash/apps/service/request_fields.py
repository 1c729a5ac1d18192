"""Fields of requests: what they mean, and what is refused."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_origin

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field

from robusthash.core.limited_files import parse_json, shortened
from robusthash.core.registry import nearest

Value = TypeVar("Value")
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

_KEY = re.compile(r"[\x20-\x7e]{1,200}")
_DIGITS = re.compile(r"[0-9]{1,19}")
_NAMESPACE = uuid.UUID("5b0f4a52-6a3c-4a0e-9d57-6d0c2f1d3a11")  # of keys made of idempotency keys
_PAYLOAD = 64 << 10  # characters of the payload of one item


async def refuse_unknown(request: Request) -> None:
    """Refuse parameters of the URL and fields of the body that the route does not know, or gets twice."""
    route: APIRoute = request.scope["route"]
    url, body = route.dependant.query_params, route.dependant.body_params
    _check([name for name, _ in request.query_params.multi_items()], "parameter of the URL", url, body)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS:
        _check([name for name, _ in (await request.form()).multi_items()], "form field", body, url)
    elif body and kind == "application/json" and isinstance(value := await request.json(), dict):
        _check(list(value), "field of the body", body, url)


def _check(names: Sequence[str], what: str, known: Sequence[Any], elsewhere: Sequence[Any]) -> None:
    """Refuse names that no field of ``known`` has; those of ``elsewhere`` are in the wrong place."""
    many = {field.alias: get_origin(field.field_info.annotation) is list for field in known}
    for name, count in Counter(names).items():
        if name not in many:
            hint = nearest(name, many) if many else ""
            if name in {field.alias for field in elsewhere}:
                hint = f"; it goes into the {'body' if 'URL' in what else 'URL'}"
            raise ValueError(f"{shortened(name, 100)!r} is no {what} of this route{hint}")
        if count > 1 and not many[name]:
            raise ValueError(f"{name}: given {count} times; give it once")


def once(name: str, form: Value | None, url: Value | None) -> Value | None:
    """The value of a field that may come in the form or in the URL."""
    if form is not None and url is not None:
        raise ValueError(f"{name}: given in the form and in the URL; give it once")
    return url if form is None else form


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
