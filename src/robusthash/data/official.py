"""Parts that the readers of official image-text sets share: options, files of archives, and their items."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.data.base import RetrievalData
from robusthash.data.image_files import ImageFile, ImageOptions, decode
from robusthash.data.splits import Indices, assemble, compact
from robusthash.data.texts import TextOptions, note_empty

logger = logging.getLogger(__name__)

Reader = Callable[..., RetrievalData]

_DEPTH = 3  # folders that an unpacked archive may lie below the root


def flat_options(*without: str) -> Callable[[Reader], Reader]:
    """Let a reader that takes option records be called by their fields, as recipes name them.

    A parameter whose default is a dataclass instance is replaced by the fields of that class, with the
    instance's values as defaults. Fields in ``without`` are no options of this reader.
    """

    def flatten(reader: Reader) -> Reader:
        signature = inspect.signature(reader, eval_str=True)
        parameters: list[inspect.Parameter] = []
        records: dict[str, tuple[Any, set[str]]] = {}
        for name, parameter in signature.parameters.items():
            record = parameter.default
            if not dataclasses.is_dataclass(record):
                parameters.append(parameter)
                continue
            fields = inspect.signature(type(record), eval_str=True).parameters.values()
            taken = [field for field in fields if field.name not in without]
            parameters += [field.replace(default=getattr(record, field.name)) for field in taken]
            records[name] = record, {field.name for field in taken}
        flat = signature.replace(parameters=parameters)

        @functools.wraps(reader)
        def read(*args: Any, **kwargs: Any) -> RetrievalData:
            options = flat.bind(*args, **kwargs).arguments
            for name, (record, fields) in records.items():
                given = {field: options.pop(field) for field in fields & options.keys()}
                options[name] = replace(record, **given)
            return reader(**options)

        read.__signature__ = flat  # type: ignore[attr-defined]
        return read

    return flatten


@dataclass(frozen=True)
class Pool:
    """All items of a set before any is chosen."""

    files: tuple[ImageFile, ...]
    labels: Tensor  # (N, C) float32
    names: tuple[str, ...]  # of the label columns
    texts: tuple[tuple[str, ...], ...] | None = None  # of each item
    bags: Tensor | None = None  # (N, V) bool or float32, where the set comes with text vectors of its own
    stop_words: frozenset[str] = frozenset()  # that bags of its texts never count
    note: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Tensor) -> Pool:
        """The items of these rows, in their order."""
        numbers = rows.tolist()
        return replace(
            self,
            files=tuple(self.files[row] for row in numbers),
            labels=self.labels[rows],
            texts=None if self.texts is None else tuple(self.texts[row] for row in numbers),
            bags=None if self.bags is None else self.bags[rows],
        )

    def only(self, mask: Tensor, lacking: str) -> Pool:
        """The items where ``mask`` (N,) holds; the note counts the others as ``lacking`` something.

        Raises:
            ValueError: none is left.
        """
        dropped = int((~mask).sum())
        if dropped == 0:
            return self
        note = f"{dropped} of {len(self)} items dropped: {lacking}."
        if dropped == len(self):
            raise ValueError(f"no item is left: {note}")
        return replace(self.take(torch.nonzero(mask).flatten()), note=f"{self.note} {note}".strip())

    def on_disk(self, belong: str) -> Pool:
        """The items whose image files are there; a set may be partial, and then one warning says so.

        Args:
            belong: the archive that the images are in and where they go, for the message.

        Raises:
            FileNotFoundError: none is there.
        """
        there = torch.tensor([file.path.is_file() for file in self.files])
        if not there.any():
            raise FileNotFoundError(f"none of the {len(self)} images is there (as {self.files[0]}); {belong}")
        if not there.all():
            logger.warning("%d of %d images are not there (%s)", int((~there).sum()), len(self), belong)
        return self.only(there, "their image file is not there")

    def expect(self, count: int) -> Pool:
        """Warn where a complete set does not have the published number of items."""
        if len(self) == count:
            return self
        note = f"Published protocols have {count} items here, these files give {len(self)}."
        logger.warning("%s", note)
        return replace(self, note=f"{self.note} {note}".strip())


def make_data(
    name: str, pool: Pool, indices: Indices, image: ImageOptions, text: TextOptions, note: str
) -> RetrievalData:
    """The data set of chosen items: images decoded, texts encoded, splits checked.

    The images of the splits are decoded once here, and the content hashes are of their pixels. Unreadable
    files leave every split under ``on_error="skip"``.
    """
    needed, indices = compact(indices)
    pool = pool.take(needed)
    source, readable = decode(pool.files, image)
    if len(readable) < len(pool):
        pool, indices = pool.take(readable), _without_unreadable(indices, readable, len(pool))
    note = f"{note} {pool.note}".strip()
    if text.texts:
        values, text_note = _encode_texts(pool, indices, text)
        source, note = replace(source, others={"text": values}), f"{note} {text_note}".strip()
    return assemble(name, source, pool.labels, source.hashes, indices, pool.names, note)


def _encode_texts(pool: Pool, indices: Indices, text: TextOptions) -> tuple[Tensor, str]:
    if pool.bags is not None and text.texts != "tokens":
        return pool.bags, note_empty(~pool.bags.any(1))
    if pool.texts is None:
        raise ValueError(f"these items come without texts, and texts={text.texts!r} was asked for")
    others = torch.cat([indices.query, indices.database])
    return text.encode(pool.texts, indices.train, others, pool.stop_words)


def _without_unreadable(indices: Indices, readable: Tensor, total: int) -> Indices:
    """Indices into ``total`` items as indices into those that are readable."""
    number = torch.full((total,), -1)
    number[readable] = torch.arange(len(readable))

    def part(rows: Tensor) -> Tensor:
        return number[rows][number[rows] >= 0]

    validation = None if indices.validation is None else part(indices.validation)
    return Indices(part(indices.train), part(indices.query), part(indices.database), validation)


def find(root: Path, name: str, belong: str) -> Path:
    """The file or folder ``name`` at ``root`` or up to three folders below, wherever an archive was unpacked.

    Args:
        name: may hold folders, as in ``annotations/captions_val2017.json``.
        belong: the official archive that it is in and where it goes, for the message.

    Raises:
        FileNotFoundError: it is nowhere.
        ValueError: two are equally near.
    """
    for depth in range(_DEPTH + 1):
        paths = [path for path in sorted(root.glob("*/" * depth + name)) if _is_own(path.relative_to(root))]
        if len(paths) > 1:
            raise ValueError(f"{name} is there twice, at {paths[0]} and {paths[1]}; give the root of one")
        if paths:
            return paths[0]
    raise FileNotFoundError(f"no {name} in {root.absolute()}; {belong}")


def _is_own(path: Path) -> bool:
    """Whether no folder on the way is hidden or one that a Mac adds to archives."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def lines_of(path: Path) -> list[str]:
    """The non-empty lines of a text file, with either line ending; bytes that are no UTF-8 become a mark."""
    return [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]


def read_npz(path: Path, keys: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """The arrays ``keys`` of an ``.npz`` file of the data set ``what``; pickles are refused."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}; it should hold the arrays {', '.join(keys)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(keys) - set(archive.files))
            if missing:
                raise ValueError(f"it lacks the arrays {', '.join(missing)} of {', '.join(keys)}")
            return {key: archive[key] for key in keys}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a {what} archive: {error}") from error
