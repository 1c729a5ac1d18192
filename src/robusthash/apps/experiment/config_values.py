"""Values of a config: numbers as recipes write them, checked against the annotations of its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from robusthash.core.limited_files import parse_yaml, shortened
from robusthash.core.option_types import LARGEST, annotated, fault, plain

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


Seed = Annotated[int, Field(ge=0, lt=LARGEST)]
