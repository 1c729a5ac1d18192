"""Values of a config: numbers as recipes write them, checked by annotations of fields; faults in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from robusthash.core.limited_files import parse_yaml, shortened
from robusthash.core.option_types import LARGEST, annotated, fault, plain
from robusthash.core.registry import nearest

_FRACTION = re.compile(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*/\s*([\d.]+)\s*")
_EXPONENT = re.compile(r"[+-]?\d+(?:\.\d*)?[eE][+-]?\d+")


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field and the remedy."""


def numbers(value: Any) -> Any:
    """``"8/255"`` and ``"1e-4"`` (a string to YAML 1.1) as floats, at any depth."""
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item) for item in value]
    if isinstance(value, str):
        if fraction := _FRACTION.fullmatch(value):
            try:
                return float(fraction[1]) / float(fraction[2])
            except ZeroDivisionError:
                raise ConfigError(f"{value!r} divides by zero; write a fraction such as 8/255") from None
            except ValueError:  # dots of a version or a date: 1.2.3/4
                return value
        if _EXPONENT.fullmatch(value):
            return float(value)
    return value


def value_of(text: str, where: str = "") -> Any:
    """A value of the command line, as a recipe would hold it; ``where`` names it in errors.

    Raises:
        ConfigError: not YAML; one line.
    """
    try:
        return numbers(parse_yaml(text, where or repr(shortened(text))))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def checked(value: Any, annotation: Any, name: str = "") -> Any:
    """A number, or list of numbers, that is what its annotation says; ``true`` is no number."""
    if not plain(annotation):
        return value
    value = numbers(value)
    if problem := fault(value, annotation):
        raise ValueError(f"{name} {problem}".strip())
    return value


def fields_of(record: type) -> BeforeValidator:
    """Validator of the settings of a dataclass."""

    def known(settings: Any) -> Any:
        if not isinstance(settings, Mapping):
            return settings
        annotations = annotated(record)
        return {key: checked(value, annotations.get(key, str), key) for key, value in settings.items()}

    return BeforeValidator(known)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], value: Any, where: str) -> Model:
    """A value of a packaged file as a model. Raises ValueError that names the place of the first fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


Seed = Annotated[int, Field(ge=0, lt=LARGEST)]


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
