"""Records that others send in: plain data checked against a schema, with errors that name the field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from robusthash.core.registry import nearest


class Record(BaseModel):
    """Plain data that cannot be changed, and that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Read = TypeVar("Read", bound=Record)


def read_record(kind: type[Read], raw: Any, schema: str, where: str) -> Read:
    """``raw`` as a record of ``kind``; ``schema`` is the version that ``raw`` must name.

    Args:
        where: the file, for messages.

    Raises:
        ValueError: another schema, a missing or unknown field, a bad value; every fault in a line of its own.
    """
    if not isinstance(raw, dict) or "schema" not in raw:
        raise ValueError(f"{where}: names no schema; this version reads {schema!r}")
    if raw["schema"] != schema:
        raise ValueError(f"{where}: schema {raw['schema']!r} is not {schema!r}, which this version reads")
    try:
        return kind.model_validate({key: value for key, value in raw.items() if key != "schema"})
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, problem, where) for problem in error.errors())) from None


def _explain(kind: type[Record], problem: Any, where: str) -> str:
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "missing":
        return f"{where}: the field {'.'.join(place)!r} is missing"
    if problem["type"] == "extra_forbidden":
        section: Any = kind
        for part in place[:-1]:
            section = getattr(section, "model_fields", {})[part].annotation if section else None
        hint = nearest(place[-1], getattr(section, "model_fields", {}))
        return f"{where}: unknown field {'.'.join(place)!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {'.'.join(place) or 'record'}: {message} (got {problem['input']!r})"
