"""Readers of untrusted files: text, JSON, YAML, arrays, archives of weights.

Each has limits on bytes (after decompression), depth and number of values, refuses with one ValueError that
names the file, opens regular files alone, and executes nothing that a file holds.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import yaml
from numpy.lib import format as npy

from robusthash.core.plugins import PluginError

MIB = 1 << 20
TEXT = 32 * MIB
"""Bytes of a text or JSON file."""

_REPEATED = 200  # characters of a text that an error repeats
_YAML = MIB  # bytes; a recipe or an entry has a few thousand
_DEPTH = 64  # lists and mappings within each other
_VALUES = 100_000  # of a YAML file, whose aliases count as often as they are used
_ALIASES = 1_000
_NODES = (dict, list, tuple, set)
_UNPACKED, _RATIO = 256 * MIB, 20  # an archive may unpack to the first, or to this many times its size


def read_bytes(path: str | Path, limit: int = TEXT) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: no such file, or one without rights.
        ValueError: more than ``limit`` bytes, or no regular file.
    """
    path = regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {_size(limit)}, which is the limit for a file of its kind")
    return content


def regular(path: str | Path) -> Path:
    """``path``, unless it is there and no regular file, such as a pipe, which would never end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    return path


def read_text(path: str | Path, limit: int = TEXT) -> str:
    """A UTF-8 text, whatever the locale; without the mark that some editors put first."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_json(path: str | Path, limit: int = TEXT, depth: int | None = _DEPTH) -> Any:
    """The value of a JSON file; ``depth`` None: as deep as the decoder goes."""
    return parse_json(read_text(path, limit), str(path), depth)


def parse_json(text: str | bytes, where: str, depth: int | None = _DEPTH, once: bool = False) -> Any:
    """The value of a JSON text; ``where`` names it in errors. With ``once``, a key given twice is refused."""
    try:
        value = json.loads(text, object_pairs_hook=_unique if once else None)
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if depth is not None:
        _check_shape(value, where, depth)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file."""
    return parse_yaml(read_text(path, _YAML), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a YAML text; ``where`` names it in errors."""
    try:
        value = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None or "\n" not in text.strip() else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or "it cannot be read"
        quoted = f" {text!r}" if not place and len(text) < _REPEATED else ""
        fault = (
            place.removeprefix(", ") if isinstance(error, _NotDecimal) else f"not valid YAML{place}{quoted}"
        )
        raise ValueError(": ".join(filter(None, (where, fault, problem)))) from None
    except RecursionError:
        raise ValueError(f"{where}: not valid YAML: nested too deep") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # what the loader lets through of dates, numbers and bytes of odd forms
        raise ValueError(f"{where}: not valid YAML: {error}") from None
    _check_shape(value, where, _DEPTH, _VALUES)
    return value


class _CheckedMappings:
    """Mappings without a key twice; merges stay small, since merges of merges grow without a bound."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if not getattr(node, "flat", False):  # what << brought in may be written again
            _check_keys(node)
        super().flatten_mapping(node)  # type: ignore[misc]
        node.flat = True
        self.merged += len(node.value)
        if self.merged > _VALUES:
            problem = f"more than {_VALUES:,} values, counting what << repeats"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a key that is written twice, of which YAML would take the last without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in lines:
            first = lines[key.value] + 1
            where = "" if first == key.start_mark.line + 1 else f", first in line {first}"
            problem = f"the key {key.value!r} is there twice{where}; leave one"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        lines[key.value] = key.start_mark.line


class _PlainLoader(_CheckedMappings, yaml.SafeLoader):
    """Plain values alone, and decimal numbers."""


class _QuickLoader(_CheckedMappings, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, where it was built: ten times as quick, but its faults name a later line."""


def _load(text: str) -> Any:
    """The value of a YAML text: by libyaml, or where that finds a fault by the loader that words it."""
    try:
        _check_events(text, _QuickLoader)
        return yaml.load(text, _QuickLoader)
    except yaml.YAMLError:
        _check_events(text, _PlainLoader)
        return yaml.load(text, _PlainLoader)


def _check_events(text: str, loader: Any) -> None:
    """Refuse deep nesting, and more aliases than keep merged mappings small, before a value is made."""
    aliases = depth = documents = 0
    for event in yaml.parse(text, loader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            problem = "but found another document"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > _ALIASES or depth > 2 * _DEPTH:
            problem = "nested too deep" if aliases <= _ALIASES else f"more than {_ALIASES} aliases"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


def _decimal(loader: Any, node: yaml.ScalarNode) -> int | float:
    """A number in base ten; YAML 1.1 takes 010 for eight and 1:30 for ninety."""
    text = loader.construct_scalar(node)
    whole = node.tag.endswith(":int")
    if ":" in text or (whole and not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text)):
        decimal = re.sub(r"^([-+]?)[0_]+(?=[0-9_]*$)", r"\1", text) or "0"
        write = f"write {decimal}" if decimal.lstrip("+-").isdigit() else "write it out"
        problem = f"numbers are decimal, without zeros in front, got {text}; {write}, or {text!r} for a text"
        raise _NotDecimal(None, None, problem, node.start_mark)
    read = loader.construct_yaml_int if whole else loader.construct_yaml_float
    return read(node)


class _NotDecimal(yaml.constructor.ConstructorError):
    """A number in another base than ten."""


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)
    _QuickLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def _check_shape(value: Any, where: str, depth: int, values: float = math.inf) -> None:
    """Refuse more levels or values than allowed; a value within itself has no end of levels."""
    level, count = [value] if isinstance(value, _NODES) else [], 0
    for _ in range(depth):
        below: list[Any] = []
        for node in level:
            count += len(node)
            if count > values:
                raise ValueError(f"{where} holds more than {values:,} values, counting what aliases repeat")
            below += [i for i in (node.values() if isinstance(node, dict) else node) if isinstance(i, _NODES)]
        if not (level := below):
            return
    raise ValueError(f"{where} is nested more than {depth} deep, or holds itself")


# ---------------------------------------------------------------------------------------------- archives


def check_archive(path: str | Path | IO[bytes], name: str = "") -> None:
    """Refuse a zip file (``.npz``, weights of torch) that unpacks to far more than its size.

    Raises:
        ValueError: with what it would take, and how to save it instead.
    """
    size = Path(path).stat().st_size if isinstance(path, str | Path) else _length(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{name or path} is a damaged archive ({error})") from None
    if unpacked > max(_UNPACKED, _RATIO * size):
        raise ValueError(
            f"{name or path} has {_size(size)} and unpacks to {_size(unpacked)}; "
            "save what it holds without compression (np.savez, torch.save)"
        )


def read_npz(path: str | Path | IO[bytes], keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, or ``keys`` of them; of numbers, bools, texts and dates.

    Raises:
        OSError: no such file.
        ValueError: no such file format, damaged or beyond the limits, or objects that would run code;
            the caller names the file.
    """
    if isinstance(path, str | Path):
        with regular(path).open("rb") as file:
            return read_npz(file, keys)
    try:
        if path.read(6) == b"\x93NUMPY":
            raise ValueError("it holds one bare array")
        path.seek(0)
        check_archive(path, "it")
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if missing := sorted(set(keys or ()) - set(members)):
                raise ValueError(f"it lacks the arrays {', '.join(missing)} of {', '.join(keys or ())}")
            for key in members if keys is None else keys:
                with archive.open(members[key]) as member:
                    arrays[key] = _array(member, key, members[key].file_size)
        return arrays
    except (MemoryError, ValueError):
        raise
    except (
        Exception
    ) as error:  # of zipfile, zlib, the system, and what NumPy's parser of headers lets through
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def _array(member: IO[bytes], key: str, size: int) -> np.ndarray:
    """One array, whose header is believed only where it fits the ``size`` of the file."""
    version = npy.read_magic(member)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, in_columns, dtype = read_header(member)
    if dtype.hasobject:
        raise ValueError(f"{key!r} holds Python objects, which would run code (allow_pickle=False)")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ValueError(f"{key!r} says that it is {dtype} of shape {shape}, which its bytes are not")
    content = bytearray(size - member.tell())
    with memoryview(content) as view:
        filled = 0
        while count := member.readinto(view[filled:]):  # type: ignore[attr-defined]
            filled += count
    if filled < len(content):
        raise ValueError(f"{key!r} is truncated")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")


def _length(file: IO[bytes]) -> int:
    place = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(place)
    return end


def _size(count: int) -> str:
    return f"{count / MIB:,.0f} MiB" if count >= MIB else f"{count:,} bytes"


class RunError(ValueError):
    """A run directory, or a saved model, that cannot be used as it stands."""


_DAMAGED: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError)
_DAMAGED += (pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError, RecursionError)


@contextmanager
def reading(path: Path, remedy: str, what: str = "") -> Iterator[None]:
    """Raise an error of a block that reads ``path`` as ``RunError("WHAT PATH is damaged (...); REMEDY")``."""
    try:
        yield
    except RunError:  # named already
        raise
    except PluginError as error:
        raise RunError(str(error)) from None
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), repr(error)).removeprefix(f"{path} is ")
        raise RunError(f"{f'{what} {path}'.strip()} is damaged ({reason}); {remedy}") from None


def shortened(text: str, most: int = 200) -> str:
    """A text for a message, its middle left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
