"""Types of options as recipes write them, against the annotations of what takes them."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

LARGEST = 2**63
"""No whole number of a recipe reaches it."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
}


@cache
def annotated(make: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each parameter; none where a name in them is imported for type checkers alone."""
    try:
        parameters = inspect.signature(make, eval_str=True).parameters
    except NameError:
        return {}
    return {name: parameter.annotation for name, parameter in parameters.items()}


def fits(value: Any, annotation: Any) -> bool:
    """Tell whether a value of YAML is of an annotated type; of types that YAML has not, every value is.

    A whole number is a ``float``, a number with a point no ``int``, ``true`` neither; a list is any sequence.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if annotation in (int, float):
        known = isinstance(value, (int, annotation)) and not isinstance(value, bool)
        return known and (isinstance(value, int) or math.isfinite(value))
    if annotation in _WORDS or annotation is None:
        return isinstance(value, annotation or type(None))
    if annotation is Path:
        return isinstance(value, str | Path)
    kind = origin if isinstance(origin, type) else annotation
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        known = isinstance(value, list | tuple) and len(value) == len(inner)
        return known and all(fits(item, each) for item, each in zip(value, inner, strict=True))
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, (*inner, Any)[0]) for item in value)
    if kind in (dict, Mapping):
        held = value.values() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(fits(item, (*inner, Any, Any)[1]) for item in held)
    return True


def plain(annotation: Any) -> bool:
    """Tell whether a type is one of numbers, true and false, null, and lists of them."""
    inner = [each for each in get_args(annotation) if each is not Ellipsis]
    if get_origin(annotation) is Annotated:
        return plain(inner[0])
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        return all(plain(each) for each in inner)
    return annotation in (bool, int, float, type(None))


def fault(value: Any, annotation: Any) -> str:
    """The reason why a value is not of an annotated type, or no number of 63 bits; "" where it is."""
    if not fits(value, annotation):
        return f"must be {words(annotation)}, got {_short(value)}"
    if type(value) is int and value >= LARGEST:  # counts, sizes, seeds
        return f"is too large, got {_short(value)}"
    return ""


class Checked:
    """Base of settings made in Python: a number of another type than annotated is a ValueError that names it.

    ``epochs=1.5`` would train 2 epochs, and ``steps=3.0`` end deep in a search. Numbers of NumPy and torch
    are numbers; NaN, infinity and ranges are left to the settings themselves.
    """

    def __new__(cls, *given: Any, **named: Any) -> Self:
        annotations = annotated(cls)  # type: ignore[arg-type]  # a class is hashable
        for name, value in (*zip(annotations, given, strict=False), *named.items()):
            annotation = annotations.get(name)
            if plain(annotation) and not fits(_as_written(value), annotation):
                raise ValueError(f"{name} must be {words(annotation)}, got {_short(value)}")
        return super().__new__(cls)


def _as_written(value: Any) -> Any:
    """A number as YAML would hold it, and a finite one in place of NaN and infinity."""
    if isinstance(value, list | tuple):
        return [_as_written(item) for item in value]
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return 0.5 if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    """A value for a message; of a long one its beginning."""
    try:
        text = repr(value)
    except ValueError:  # a whole number that Python does not write out
        text = "a whole number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]} ..."


def words(annotation: Any) -> str:
    """An annotated type in words: ``a whole number or null``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(each) for each in inner))
    if origin is Literal:
        *most, last = map(repr, inner)
        return " or ".join(filter(None, (", ".join(most), last)))
    kind = origin if isinstance(origin, type) else annotation
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {', '.join(words(each) for each in inner)}"
    if kind in (list, tuple, Sequence):
        return f"a list, each item {words(inner[0])}" if inner else "a list"
    if kind in (dict, Mapping):
        return "a mapping"
    if annotation is Path:
        return "a path"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
