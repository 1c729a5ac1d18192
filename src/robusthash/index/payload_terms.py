"""Payload as terms, for engines that know no JSON: an item has a term for each value, a filter asks for it.

The values that a term stands for are those of ``payload_filter``: 2, "2" and 2.0 share one term. Terms are
digests, so that none is long and nothing of a filter's text enters an engine's language.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, final

from robusthash.index.payload_filter import normal_form, options, to_json


@final
class _Number(str):
    """A number of JSON, as written: no digit is lost."""


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number)


def digest(text: str) -> str:
    """32 hex digits that stand for a text."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def has_term(key: str) -> str:
    """The term of all items whose payload has a key."""
    return digest(json.dumps([key]))


def terms(payload: str) -> list[str]:
    """The terms of a payload, which is the text of a JSON object."""
    unique: dict[str, None] = {}
    for key, value in _DECODER.decode(payload).items():
        unique[has_term(key)] = None
        for one in _scalars(value):
            unique[_term(key, _form(one))] = None
    return list(unique)


def term_groups(where: Mapping[str, Any]) -> list[list[str]]:
    """Groups of terms: an item passes the filter that has one or more of each group.

    Raises:
        ValueError: a key that no payload can have, or a value that none can equal.
    """
    groups = {key: options(key, value) for key, value in where.items()}
    to_json(groups, "where")
    return [[_term(key, form) for form in forms] for key, forms in groups.items()]


def scalars(payload: str, key: str) -> Iterator[tuple[str, Any]]:
    """The values under a key that a filter can name, each with its JSON text."""
    for one in _scalars(_DECODER.decode(payload).get(key, [])):
        text = one if isinstance(one, _Number) else json.dumps(one)
        yield str(text), json.loads(text)


def _scalars(value: Any) -> list[Any]:
    members = value if isinstance(value, list) else [value]
    return [one for one in members if not isinstance(one, (list, dict))]


def _form(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    number = isinstance(value, _Number) or value[:1] in tuple("-0123456789")
    return normal_form(str(value)) if number else value


def _term(key: str, form: str) -> str:
    return digest(json.dumps([key, form]))
