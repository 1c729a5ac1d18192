"""Filters by payload as SQL: which stored values a given value stands for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from robusthash.core.registry import nearest

IN_LIST = "IN (SELECT value FROM json_each(?))"

_KEY = re.compile(r'[^"\\\x00-\x1f]+')
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# json_each gives the one value of a scalar, every member of a list; a truth value is compared as a word
_MATCH = f"""(json_type(payloads.value, ?) <> 'object' AND EXISTS (
  SELECT 1 FROM json_each(payloads.value, ?) AS one
  WHERE CASE WHEN one.type IN ('true', 'false') THEN one.type ELSE one.value END {IN_LIST}))"""


def check_key(key: Any) -> None:
    """Refuse payload keys that a JSON path, which knows no escapes inside a quoted key, could not find."""
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(f"payload keys are text without quotes, backslashes and control marks, got {key!r}")


def json_path(key: str) -> str:
    """The JSON path of a payload key."""
    check_key(key)
    return f'$."{key}"'


def to_json(value: Any, what: str) -> str:
    """JSON text of ``value``; keys stay as written, so that a JSON path finds them."""
    try:
        text = _JSON.encode(value)
        text.encode()  # half a surrogate pair is text to Python and to nobody else
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    return text


def condition(where: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The SQL condition on ``payloads`` and its values; a list of options means any of them.

    Raises:
        ValueError: a key that no payload can have, or a value that none can equal.
    """
    clauses, values = [], []
    for key, value in where.items():
        path = json_path(key)
        options = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
        forms = [form for option in options for form in _forms(key, option)]
        clauses.append(_MATCH)
        values += [path, path, to_json(forms, f"where: {key!r}")]
    return " AND ".join(clauses), values


def unknown_key(key: str, known: list[str]) -> ValueError:
    """The error of a key that no item has."""
    has = f"; they have {', '.join(known)}" if known else ", nor any other: it was built without payload"
    return ValueError(f"no item of this index has the payload key {key!r}{nearest(key, known) or has}")


def _forms(key: str, option: Any) -> list[Any]:
    """The values that an option equals: 2 is '2' too, as files of labels say either; '007' is no 7."""
    if isinstance(option, bool):
        return [str(option).lower()]
    if isinstance(option, int):
        return [option, str(option)]
    if isinstance(option, float):
        return [option, str(option), *([str(int(option))] if option.is_integer() else [])]
    if not isinstance(option, str):
        raise ValueError(f"where: {key!r} can equal text, a number or a truth value, not {option!r}")
    try:
        number = json.loads(option)
    except (ValueError, RecursionError):
        return [option]
    return [option, number] if type(number) in (int, float) and math.isfinite(number) else [option]
