"""Faults of a config in words, each in a line that names the field."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from robusthash.apps.experiment.config_values import shortened
from robusthash.core.registry import nearest


def explained(problem: Mapping[str, Any], where: str, config: type[BaseModel]) -> str:
    """One pydantic error of a config in a line; for an unknown key it offers the nearest."""
    place = [str(part) for part in problem["loc"] if not re.match(r"function-|dict\[|str$", str(part))]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section: Any = config
        for part in place[:-1]:
            known = getattr(section, "model_fields", {})
            section = known[part].annotation if part in known else get_args(section)[-1]
            section = get_args(section)[0] if get_origin(section) is Annotated else section
        known = section.__dataclass_fields__ if dataclasses.is_dataclass(section) else section.model_fields
        hint = _elsewhere(place[-1], config) or nearest(place[-1], known)
        return f"{where}: unknown key {'.'.join(place)!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    rejected = problem["input"]
    is_component = place and isinstance(rejected, Mapping) and "name" in rejected
    names_value = ", got " in message or (
        isinstance(rejected, Mapping) and not is_component
    )  # sections are long
    value = "" if names_value else f" (got {shortened(repr(rejected))})"
    return f"{where}: {'.'.join(place) or 'config'}: {message}{value}"


def _elsewhere(key: str, config: type[BaseModel]) -> str:
    """A hint that names the sections which have a key of this name; "" where none has."""
    sections = {
        name: getattr(field.annotation, "model_fields", {}) for name, field in config.model_fields.items()
    }
    places = [repr(f"{name}.{key}") for name in reversed(sections) if key in sections[name]]
    return f"; did you mean {' or '.join(places)}?" if places else ""
