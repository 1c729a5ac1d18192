"""Encode a collection: decoding during the forward pass, part by part, each safe on disk before the next."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from robusthash.apps.collection.codes_card import CodesCard, ItemFormat
from robusthash.apps.collection.collection_items import CollectionItem, SourceError
from robusthash.apps.collection.encoded_parts import CodesFolder, PartWriter
from robusthash.apps.collection.image_source import Collection, ImagePart, open_source
from robusthash.apps.experiment.search_model import SearchModel, load
from robusthash.core.directory_lock import InUse
from robusthash.core.hamming import pack
from robusthash.core.out_of_memory import halving, warn
from robusthash.core.runtime import Progress, silent
from robusthash.core.words import some_of
from robusthash.data.base import as_input
from robusthash.data.image_files import MAX_PIXELS, ImageOptions, Skipped, iter_images, path_text
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

PART_SIZE, BATCH_SIZE = 4096, 64
_AHEAD = 256  # images that are decoded while those before them are encoded
_MOST_PROCESSES = 16  # that decode, by default

Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoding:
    """Options by which the images of a part become codes.

    Attributes:
        processes: that decode during the forward pass; by default one for each core but one, at most 16. 0
            decodes in threads. Codes do not depend on it.
        batch_size: images of one forward pass.
        max_pixels: pass over images of more pixels (width x height).
    """

    processes: int | None = None
    batch_size: int = BATCH_SIZE
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 0:
            raise ValueError(f"processes must be at least 0, got {self.processes}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def decoding(self) -> int:
        """Processes that decode."""
        if self.processes is not None:
            return self.processes
        return min(_MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 1))


@dataclass(frozen=True)
class EncodingJob:
    """A collection, its model, and the folder that its codes go to."""

    model: SearchModel
    source: Collection
    folder: CodesFolder

    @classmethod
    def of(
        cls,
        run: str | Path | SearchModel,
        images: str | Path,
        out: str | Path,
        part_size: int,
        items: ItemFormat,
    ) -> EncodingJob:
        """Read the listing of the collection, and make the folder."""
        if part_size < 1:
            raise ValueError(f"part_size must be at least 1, got {part_size}")
        model = run if isinstance(run, SearchModel) else load(run)
        model.check_encodes("image")
        source = open_source(images, part_size)
        tars, parts = source.label == "tar", sorted(source.listings().items())
        card = CodesCard(
            origin=model.origin,
            bits=model.bits,
            image_size=model.side,
            source=path_text(source.label),
            root=path_text(source.root),
            part_size=0 if tars else part_size,
            items=items,
            parts=tuple(name for name, _ in parts),
            listings=() if tars else tuple(listing for _, listing in parts),
        )
        return cls(model, source, CodesFolder.make(Path(out), card))


def encode_collection(
    run: str | Path | SearchModel,
    images: str | Path,
    out: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    items: ItemFormat = "jsonl",
    part_size: int = PART_SIZE,
    progress: Progress = silent,
    **encoding: Any,
) -> dict[str, Any]:
    """Encode a collection of any size into a folder of codes; what is done is passed over, so repeat it.

    Args:
        run: a run, an exported model, or a loaded one; as of ``load``.
        images: a folder, a manifest (``.csv``, ``.jsonl``, ``.parquet``; the column ``file`` is relative to
            its folder, the others become payload) or tars in the layout of webdataset, ``s-{000..099}.tar``.
        out: folder of the codes, which several processes may share.
        shard: (i, n), i from 0 to n - 1: only the parts i, i + n, ... of n processes.
        items: format of ids, names and payload.
        part_size: images of a part of a folder or manifest; a tar is a part.
        encoding: options of ``Encoding``: ``processes``, ``batch_size``, ``max_pixels``.

    Returns:
        Of all that is in ``out``: ``parts``, ``done``, ``failed`` (by part, the reason), ``stale`` (parts of
        other shards, of which the collection lists other images since they were encoded: encode those shards
        again), ``missing`` (of other shards), ``items`` and ``skipped`` (files with reasons). Of this call:
        ``encoded``, ``unchanged`` and ``in_use`` (parts, the last being those that other processes work on).

    Raises:
        FileNotFoundError: no such collection.
        ValueError: ``out`` holds codes of something else, or no image can be read.
    """
    first, step = shard
    if not 0 <= first < step:
        raise ValueError(f"there is no shard {first} of {step}; they are counted from 0")
    prepared, how = EncodingJob.of(run, images, out, part_size, items), Encoding(**encoding)
    counts: dict[str, list[str]] = {"encoded": [], "unchanged": [], "in_use": []}
    left = _Left(prepared.source.amounts()[first::step], prepared.source.label == "tar", progress)
    for part in prepared.source.parts(first, step):
        became = encode_part(prepared.model, part, prepared.folder, how, left.images)
        counts.get(became, []).append(part.name)
        left.part(became == "encoded")
    report = prepared.folder.write_report()
    if not report["items"] and report["done"] == report["parts"]:
        passed = [Skipped(**one) for one in report["skipped"]]
        raise ValueError(f"none of the {len(passed)} images could be read: {some_of(passed)}")
    return {**report, **{name: len(parts) for name, parts in counts.items()}, "in_use": counts["in_use"]}


def encode_part(
    model: SearchModel,
    part: ImagePart,
    folder: CodesFolder,
    how: Encoding,
    count: Callable[[int], None] = lambda _: None,
    work: str = "encode",
) -> str:
    """Encode one part and write it down: ``encoded``, ``unchanged``, ``failed`` or ``in_use``.

    Args:
        count: called with the number of images that were encoded, or passed over, since it was last called.
        work: the work that it belongs to, for others that find the part in use.
    """
    try:
        with folder.working_on(part.name, work):
            try:
                state = part.state()
                if folder.is_done(part.name, state, part.listing):
                    return "unchanged"
                with folder.writing(part.name, state, part.listing) as writer:
                    _encode(model, part, writer, how, count)
            except (SourceError, ChildProcessError) as error:
                folder.fail(part.name, str(error))
                return "failed"
    except InUse:
        return "in_use"
    return "encoded"


def _encode(
    model: SearchModel, part: ImagePart, writer: PartWriter, how: Encoding, count: Callable[[int], None]
) -> None:
    """The codes of one part, while the images after them are decoded."""
    hasher, size = model.hasher.for_database(), how.batch_size
    for pixels, items, skipped, read in _ahead(_decoded(part, model.side, how)):
        writer.skipped += skipped
        for start in range(0, len(items), how.batch_size):
            few = items[start : start + how.batch_size]
            batch = pixels[start : start + how.batch_size]
            signs, size = halving(
                partial(_signs, hasher, batch), min(size, len(few)), "images", "encoded", warn
            )
            packed = pack(signs).numpy()
            writer.add(
                packed, [one.id for one in few], [one.name for one in few], [one.payload for one in few]
            )
            count(len(few))
        count(read - len(items))


def _signs(hasher: Hasher, pixels: Tensor, size: int) -> Tensor:
    """(N, K) signs of (N, 3, S, S) uint8 pixels, which go to the device as they are."""
    parts = (encode_signs(hasher, "image", as_input(few.to(hasher.device))) for few in pixels.split(size))
    return torch.cat(list(parts))


_Chunk = tuple[Tensor, list[CollectionItem], list[Skipped], int]


def _decoded(part: ImagePart, side: int, how: Encoding) -> Iterator[_Chunk]:
    """Some hundred images at a time: (N, 3, S, S) uint8, their items, what was passed over, images read."""
    entries, options = part.entries(), ImageOptions(side, max_pixels=how.max_pixels)
    size = how.batch_size  # of the first, during which nothing is computed
    while some := list(itertools.islice(entries, size)):
        size = max(_AHEAD, how.batch_size)
        listed = [entry for entry in some if isinstance(entry, CollectionItem)]
        skipped = [entry for entry in some if isinstance(entry, Skipped)]
        pixels, items = [], []
        images = iter_images([item.file for item in listed], options, processes=how.decoding)
        for item, image in zip(listed, images, strict=True):
            if isinstance(image, Tensor):
                pixels.append(image)
                items.append(item)
            else:
                reason = "there is no such file" if isinstance(image, FileNotFoundError) else image.reason
                skipped.append(Skipped(path_text(item.name), reason))
        yield torch.stack(pixels) if pixels else torch.empty(0), items, skipped, len(listed)


def _ahead(source: Iterator[Made]) -> Iterator[Made]:
    """The items of an iterator, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield item


class _Left:
    """The progress of a shard in images; of tars, whose images nobody has counted, the total is estimated."""

    def __init__(self, amounts: Sequence[int], estimated: bool, progress: Progress) -> None:
        self._amounts, self._estimated, self._progress = list(amounts), estimated, progress
        self._images, self._read, self._left = 0, 0, sum(amounts)  # the last two in images, or bytes of tars
        self._total = 0 if estimated else self._left

    def images(self, count: int) -> None:
        """Some images more were encoded, or passed over."""
        self._images += count
        self._progress(self._images, self._total and max(self._total, self._images), "encoding images")

    def part(self, encoded: bool) -> None:
        """A part is done, of which nothing more is to be read."""
        amount = self._amounts.pop(0)
        self._left -= amount
        self._read += amount if encoded else 0
        self._total = self._read + self._left
        if self._estimated:
            self._total = self._images * self._total // self._read if self._read else 0
