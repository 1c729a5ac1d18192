"""Filters by payload, as SQL or as terms: which stored values a given value stands for.

An engine that knows no JSON stores a term for each value, a digest: 2, "2" and 2.0 share one, none is long
and nothing of a filter's text enters its language.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, final

import numpy as np

from robusthash.core.registry import nearest

KEYS = 32  # of a filter
VALUES = 1_000  # of a filter, under all of its keys
IN_LIST = "IN (SELECT value FROM json_each(?))"

_KEY = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON text, where a backslash is two
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_NUMBER = re.compile(r"(-?)(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([-+]?[0-9]{1,18}))?")  # as JSON writes one
_SEVERAL = (list, tuple, set, frozenset)
_PLAIN = 400  # digits of a whole number that is written out; a float has at most 309
# of a value, or a member of a list: SQLite makes a real of a large integer, so its JSON text is asked for,
# in a list of two, because a single path would give that real
_AT = "{path} || CASE json_type(payloads.value, {path}) WHEN 'array' THEN '[' || one.key || ']' ELSE '' END"
_RAW = f"json_extract(payloads.value, {_AT}, {_AT})"
# json_each gives the one value of a scalar, every member of a list
_EACH = """payloads.value, {path}) AS one
  WHERE one.type NOT IN ('array', 'object') AND json_type(payloads.value, {path}) <> 'object'"""
_MATCH = f"""EXISTS (SELECT 1 FROM json_each({_EACH} AND CASE
  WHEN one.type IN ('true', 'false', 'null') THEN one.type
  WHEN typeof(one.value) = 'integer' THEN CAST(one.value AS TEXT)
  WHEN one.type <> 'text' THEN normal_form({_RAW})
  WHEN one.value GLOB '[-0-9]*' THEN normal_form(one.value)
  ELSE one.value END IN (SELECT value FROM json_each({{forms}})))"""


def normal_form(text: str) -> str:
    """One text for all ways to write a number: 2 for ``2.0``, ``2.00`` and ``2e0``; other texts as they are.

    Exact, of any length. ``[2,2]``, a number twice, is taken as once.
    """
    match = _NUMBER.fullmatch(text[1 : len(text) // 2] if text.startswith("[") else text)
    if match is None:
        return text
    sign, whole, fraction, power = match.groups(default="")
    digits = (whole + fraction).lstrip("0")
    shortest = digits.rstrip("0")
    exponent = int(power or 0) - len(fraction) + len(digits) - len(shortest)
    if not shortest:
        return "0"
    if 0 <= exponent <= _PLAIN:
        return f"{sign}{shortest}{'0' * exponent}"
    return f"{sign}{shortest}e{exponent}"


def check_key(key: Any) -> None:
    """Refuse payload keys that a JSON path, which knows no escapes inside a quoted key, could not find."""
    if not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise ValueError(f"payload keys are text without quotes, backslashes, controls, got {key!r:.60}")


def json_path(key: str) -> str:
    """The JSON path of a payload key."""
    check_key(key)
    return f'$."{key}"'


def to_json(value: Any, what: str) -> str:
    """JSON text of ``value``; keys stay as written, so that a JSON path finds them.

    Raises:
        ValueError: JSON cannot write it, or it holds a zero character, at which SQLite ends a text and which
            PostgreSQL does not store.
    """
    try:
        text = _JSON.encode(value)
        text.encode()  # half a surrogate pair is text to Python and to nobody else
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    if "\\u0000" in text and _NUL.search(text):
        raise ValueError(f"{what} holds a zero character (\\0), which no index stores; leave it out")
    return text


def check_filter(where: Mapping[str, Any]) -> None:
    """Refuse a filter of more keys or values than ``KEYS`` and ``VALUES``."""
    values = sum(len(value) if isinstance(value, _SEVERAL) else 1 for value in where.values())
    if len(where) > KEYS or values > VALUES:
        raise ValueError(
            f"a filter has at most {KEYS} keys and {VALUES} values, got {len(where)} and {values}; "
            "filter in several steps, or by ids"
        )


def condition(where: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The SQL condition on ``payloads`` and its values; a list of options means any of them.

    Raises:
        ValueError: a key that no payload can have, or a value that none can equal.
    """
    clauses, values = [], list[str]()
    for key, value in where.items():
        clauses.append(_MATCH.format(path=f"?{len(values) + 1}", forms=f"?{len(values) + 2}"))
        values += [json_path(key), to_json(options(key, value), f"where: {key!r}")]
    return " AND ".join(clauses), values


def options(key: str, value: Any) -> list[str]:
    """The normal forms of the values that a filter allows under a key; a collection means any of them."""
    check_key(key)
    several = list(value) if isinstance(value, _SEVERAL) else [value]
    return [_form(key, option) for option in several]


def values_query() -> str:
    """The SQL of the different values under a path, ?1, each as JSON in a list of two; ?2 is their number."""
    return f"SELECT DISTINCT {_RAW} FROM payloads, json_each({_EACH} LIMIT ?2".format(path="?1")


class UnknownKey(ValueError):
    """A filter by a payload key that no item has.

    Args:
        key: of the filter.
        known: keys that items have, for the message.
    """

    def __init__(self, key: str, known: list[str]) -> None:
        has = f"; they have {', '.join(known)}" if known else ", nor any other: it was built without payload"
        super().__init__(f"no item of this index has the payload key {key!r}{nearest(key, known) or has}")
        self.key, self.known = key, known


def _form(key: str, option: Any) -> str:
    """The normal form of an option: 2 is '2' too, as files of labels say either; '007' is no 7."""
    option = option.item() if isinstance(option, np.generic) else option
    if option is None:
        return "null"
    if isinstance(option, bool):
        return str(option).lower()
    if isinstance(option, str):
        return normal_form(option) if option[:1] in tuple("-0123456789") else option
    if isinstance(option, int) or (isinstance(option, float) and math.isfinite(option)):
        return normal_form(_JSON.encode(option))
    raise ValueError(f"where: {key!r} can equal text, a number, a truth value or None, not {option!r}")


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
            unique[_term(key, _term_form(one))] = None
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


def _term_form(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    number = isinstance(value, _Number) or value[:1] in tuple("-0123456789")
    return normal_form(str(value)) if number else value


def _term(key: str, form: str) -> str:
    return digest(json.dumps([key, form]))
