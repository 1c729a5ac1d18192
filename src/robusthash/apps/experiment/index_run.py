"""Images -> codes -> index, by a run or another model that ``load`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.apps.collection.collection_index import add_codes, readable_codes
from robusthash.apps.experiment.index_filters import read_filter
from robusthash.apps.experiment.index_items import (
    OWN_KEYS,
    DistinctCodes,
    LibraryItem,
    PayloadTable,
    items_of,
    key_of,
    path_payload,
)
from robusthash.apps.experiment.model_stages import database_codes, read_data
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.search_model import SearchModel, is_located, load, located, run_of
from robusthash.core.atomic_files import write_arrays
from robusthash.core.hamming import pack
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Codes
from robusthash.core.words import some_of
from robusthash.data.base import RetrievalData, Split, as_input
from robusthash.data.image_files import (
    MAX_PIXELS,
    FileSource,
    ImageOptions,
    Skipped,
    irregular,
    iter_images,
    path_text,
    read_image,
)
from robusthash.data.image_listing import Listing, list_images
from robusthash.index import CodeIndex, address_of, open_index
from robusthash.index.checked_input import check_choice
from robusthash.index.file_index import build_source_of
from robusthash.index.index_address import directory_of
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

_AT_ONCE = 256  # images decoded and encoded together, and safe on disk before the next


@dataclass(frozen=True)
class Reading:
    """Options of reading image files.

    Attributes:
        workers: threads that decode; by default one a core, at most eight.
        max_pixels: refuse images of more pixels (width x height).
    """

    workers: int | None = None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, workers: int | None, max_pixels: int | None) -> Reading:
        """From options that may be left out."""
        return cls(workers, MAX_PIXELS if max_pixels is None else max_pixels)


@dataclass(frozen=True)
class Adding:
    """Options of adding images to an index.

    Attributes:
        on_duplicate: what becomes of a path that is held: ``update`` encodes it again where the file or its
            payload has changed, ``skip`` keeps it, ``error`` stops before anything is written.
        payload: a CSV or JSON-lines file with a column ``file``; its other columns become payload.
        codes: a folder that ``encode_collection`` wrote, whose codes are added by their ids; images, where
            given, is the folder that the paths in the payload begin with.
    """

    on_duplicate: str = "update"
    payload: Path | None = None
    reading: Reading = Reading()
    codes: Path | None = None

    def __post_init__(self) -> None:
        check_choice(self.on_duplicate)
        if self.codes is not None and (self.payload is not None or self.on_duplicate != "update"):
            what = "--payload" if self.payload is not None else "--on-duplicate"
            raise ValueError(f"--codes have their payload, and replace what is held; leave {what} out")


def build_index(
    directory: str | Path,
    source: str | Path,
    images: Path | None = None,
    engine: str | None = None,
    progress: Progress = silent,
    adding: Adding = Adding(),
) -> dict[str, Any]:
    """Index the database split of a run, or a folder of images; an interrupted build goes on.

    Args:
        directory: of the index, or its address as ``open_index`` takes it.
        source: of the model, as ``load`` takes it; only a run has a database split.
        engine: as in ``open_index``.

    Returns:
        The index's info, and of a folder what became of its files, as ``add_images``; of codes also
        ``others``, the items that an earlier build added and the codes do not hold. Where fewer than half of
        the codes ``encoded`` now are different, ``distinct_codes``.

    Raises:
        ValueError: the directory holds an index of something else; codes, images or a payload file that
            cannot be read, before an index is made.
    """
    place = adding.codes if adding.codes is not None else images
    if place is None:
        run = _with_database(source, adding)
        bits, data = run.card()["bits"], read_data(run.config, progress)
    else:
        model = load(source, None)
        bits = model.bits
        if adding.codes is not None:
            readable_codes(adding.codes, model.origin)
        else:
            files = _files(place, adding)
    made_of = {"run": located(source), "images": place and path_text(place.resolve())}
    with open_index(address_of(directory), bits=bits, engine=engine) as index:
        count = index.count()
        if count and index.build_source() != made_of:
            raise ValueError(
                f"{index.address.removeprefix('file:')} already holds {count} items of another build; add "
                "images to it with 'index add', or build in another directory"
            )
        index.set_build_source(made_of)
        if adding.codes is not None:
            added = add_codes(index, adding.codes, images, progress, model.origin)
            others = index.count() - added["added"] - added["updated"]
            return {**index.info(), **added, "others": others}
        if place is not None:
            return _add(index, model, files, progress, adding)
        payload, keys = _described(data, data.database)
        codes, distinct = database_codes(run, progress), DistinctCodes()
        distinct.see(codes)
        index.add(codes, payload, keys=keys, on_duplicate="update")
        return {**index.info(), **distinct.report()}


def _with_database(source: str | Path, adding: Adding) -> Run:
    """The run whose database split is indexed."""
    if adding.payload is not None:
        raise ValueError(f"--payload {adding.payload} describes the files of --images FOLDER; name both")
    run = run_of(source)
    if run is None:
        raise ValueError(f"{source} brings no data; name what is indexed with --images FOLDER")
    return run


def add_images(
    directory: str | Path,
    images: Path | None,
    source: str | Path | None = None,
    progress: Progress = silent,
    adding: Adding = Adding(),
) -> dict[str, Any]:
    """Add an image file or a folder of images, each by its path, or codes; repeated, it goes on.

    Returns:
        The index's info, and the files ``added``, ``updated``, ``unchanged`` and ``skipped`` (with reasons);
        with a payload file, ``without_payload`` counts the files that it has no row for, and
        ``rows_without_file`` names its rows of no such file.
    """
    if images is None and adding.codes is None:
        raise ValueError("name the images to add, or --codes, a folder that 'robusthash encode' wrote")
    with open_index(address_of(directory), create=False) as index:
        if adding.codes is not None:
            added = add_codes(index, adding.codes, images, progress)
            return {**index.info(), **added}
        assert images is not None
        files = _files(images, adding)
        return _add(index, load(source_of_index(directory, source), None), files, progress, adding)


def search_by(
    directory: str | Path,
    query: Path | str,
    source: str | Path | None = None,
    k: int = 10,
    where: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[dict[str, Any]]:
    """The k nearest items of an image file or a sentence, as of ``SearchModel.search``.

    Args:
        query: a path is an image file, a string a sentence.
        where: a filter as YAML.

    Raises:
        ValueError: a filter that is no mapping, or names a payload key that no item has; a model that does
            not encode such queries.
    """
    allowed = read_filter(where) if where else None
    with open_index(address_of(directory), create=False) as index:
        model = load(source_of_index(directory, source), None)
        if isinstance(query, str):
            return model.search(index, query, k, where=allowed, modality="text")
        model.check_encodes("image")
        pixels = as_input(read_image(query, model.side, max_pixels=max_pixels))
        return model.search(index, pixels, k, where=allowed)


def source_of_index(directory: str | Path, source: str | Path | None = None) -> str | Path:
    """The model that encodes for an index, as ``load`` takes it: the given one, or the one that built it."""
    if source is not None:
        return source
    address, remedy = address_of(directory), "name it with --run"
    home = directory_of(address)
    if home is None:
        with open_index(address, create=False) as index:
            made_of, place = index.build_source(), index.address
    else:
        place = str(home)
        try:
            made_of = build_source_of(home)
        except ValueError as error:
            raise ValueError(f"{error}; it should tell the run of the index: {remedy}") from None
    if made_of is not None and not (isinstance(made_of, dict) and isinstance(made_of.get("run"), str)):
        raise ValueError(f"{place} does not tell which run made the codes of the index; {remedy}")
    parent = "" if home is None else str(home.resolve().parent)  # of indexes that do not say it
    builder = parent if made_of is None else made_of["run"]
    if not is_located(builder):
        raise ValueError(f"{place} does not say which run made its codes, or it has moved; {remedy}")
    return str(builder)


def encode_images(
    model: SearchModel,
    images: Sequence[Path],
    progress: Progress = silent,
    reading: Reading = Reading(),
    skipped: list[Skipped] | None = None,
) -> Iterator[tuple[Codes, list[Path]]]:
    """Codes of image files and of folders of them, in pieces, with the paths of the files.

    Args:
        skipped: takes the files that are no image or cannot be read, which are left out.

    Raises:
        FileNotFoundError: neither an image nor a folder.
        ValueError: a folder without images, no file that can be read, or a model of no images.
    """
    model.check_encodes("image")
    listings = [_listing(place) for place in images]
    paths = [path for listing in listings for path in listing.images]
    skipped = [] if skipped is None else skipped
    skipped += [one for listing in listings for one in listing.skipped]
    unread, before = 0, len(skipped)
    for start in range(0, len(paths), _AT_ONCE):
        chunk = paths[start : start + _AT_ONCE]
        pixels, rows = _read(chunk, model.side, reading, skipped)
        if rows:
            yield _encode(model.hasher, model, pixels), [chunk[row] for row in rows]
        unread += len(chunk) - len(rows)
        progress(start + len(chunk), len(paths), "encoding images")
    if unread == len(paths):
        raise ValueError(f"none of the {unread} images could be read: {some_of(skipped[before:])}")


def save_codes(out: Path, bits: int, codes: Mapping[str, bytes]) -> None:
    """Write packed codes of images to an ``.npz``: ``codes``, ``bits``, ``ids``, ``paths``."""
    packed = np.array([list(code) for code in codes.values()], dtype=np.uint8)
    arrays = {"codes": packed, "bits": np.array(bits), "ids": np.arange(len(codes))}
    write_arrays(out, **arrays, paths=np.array(list(codes)))


def _listing(images: Path) -> Listing:
    """An image file, or the images of a folder and its subfolders by name."""
    if not images.exists():
        raise FileNotFoundError(f"{path_text(images)} is neither an image nor a folder")
    if not images.is_dir():
        if kind := irregular(images.stat().st_mode):
            raise ValueError(f"{path_text(images)} is {kind}, neither an image nor a folder")
        return Listing((images,), ())
    listing = list_images(images)
    if not listing.images:
        passed = some_of(listing.skipped) or "nothing, it is empty"
        raise ValueError(f"{path_text(images)} holds no image; passed over: {passed}")
    return listing


def _files(images: Path, adding: Adding) -> tuple[Listing, PayloadTable]:
    """The image files, and what the payload file knows of them."""
    return _listing(images), PayloadTable.read(adding.payload, images if images.is_dir() else images.parent)


def _add(
    index: CodeIndex,
    model: SearchModel,
    files: tuple[Listing, PayloadTable],
    progress: Progress,
    adding: Adding,
) -> dict[str, Any]:
    """Encode and add in pieces, each safe on disk before the next; what is held unchanged is not read."""
    listing, table = files
    items, skipped = items_of(listing.images, table), list(listing.skipped)
    if adding.on_duplicate == "error" and (held := index.held([item.key for item in items])):
        first = next(item for item in items if item.key in held)
        raise ValueError(
            f"{len(held)} of {len(items)} images are in the index already (first: {first.payload['path']}); "
            "--on-duplicate update encodes those that have changed, skip keeps them"
        )
    model.check_encodes("image")
    index.add(
        Codes.none(model.bits, model.origin), keys=[]
    )  # refuses a model of other codes, also where nothing is new
    hasher, distinct = model.hasher.for_database(), DistinctCodes()
    counts = {"added": 0, "updated": 0, "unchanged": 0}
    for start in range(0, len(items), _AT_ONCE):
        piece = items[start : start + _AT_ONCE]
        held = index.held([item.key for item in piece])
        todo = [item for item in piece if not item.is_done(held, adding.on_duplicate)]
        counts["unchanged"] += len(piece) - len(todo)
        pixels, rows = _read([item.path for item in todo], model.side, adding.reading, skipped)
        if rows:
            codes = _encode(hasher, model, pixels)
            distinct.see(codes)
            _add_piece(index, codes, [todo[row] for row in rows], adding, counts)
        progress(start + len(piece), len(items), "encoding images")
    if not any(counts.values()):
        raise ValueError(f"none of the {len(items)} images could be read: {some_of(skipped)}")
    passed = [vars(one) for one in skipped]
    few = distinct.report() if model.radius is None else {}  # of copies, equal codes are what is wanted
    return {**index.info(), **counts, "skipped": passed, **table.report(), **few}


def _add_piece(
    index: CodeIndex, codes: Codes, items: Sequence[LibraryItem], adding: Adding, counts: dict[str, int]
) -> None:
    """Add some items in one write and count them; what they carried keeps what the new payload lacks."""
    held = index.held([item.key for item in items])
    before = dict(zip(held, index.payload([item for item, _ in held.values()]), strict=True))
    for one in before.values():
        for name in OWN_KEYS:
            one.pop(name, None)
    payload = [{**item.payload, **before.get(item.key, {}), **item.payload} for item in items]
    keys, stamps = [item.key for item in items], [item.stamp_over(held) for item in items]
    added = index.add(codes, payload, keys=keys, stamps=stamps, on_duplicate=adding.on_duplicate)
    again = int(added.held.sum())
    counts["added"] += len(added) - again
    counts["unchanged" if adding.on_duplicate == "skip" else "updated"] += again


def _read(
    paths: Sequence[Path], side: int, reading: Reading, skipped: list[Skipped]
) -> tuple[Tensor, list[int]]:
    """(K, 3, S, S) uint8 of the readable files, and their positions; the others go into ``skipped``."""
    options, images, rows = ImageOptions(side, max_pixels=reading.max_pixels), [], []
    for row, image in enumerate(iter_images(paths, options, reading.workers)):
        if isinstance(image, Tensor):
            images.append(image)
            rows.append(row)
        else:
            reason = "gone since it was listed" if isinstance(image, FileNotFoundError) else image.reason
            skipped.append(Skipped(path_text(paths[row]), reason))
    return torch.stack(images) if images else torch.empty(0), rows


def _encode(hasher: Hasher, model: SearchModel, pixels: Tensor) -> Codes:
    """Codes of (N, 3, H, W) uint8 images, by the hasher of a model or its twin for the database."""
    signs = torch.cat([encode_signs(hasher, "image", as_input(part)) for part in pixels.split(_AT_ONCE)])
    return Codes(pack(signs), model.bits, torch.arange(len(pixels)), model.origin)


def _described(data: RetrievalData, split: Split) -> tuple[list[dict[str, Any]] | None, list[str] | None]:
    """Payload (path and labels, where there are any) and keys (paths) of the items of a split."""
    payload: list[dict[str, Any]] = [{} for _ in range(len(split))]
    keys = None
    if isinstance(split.source, FileSource):
        files = [split.source.files[row] for row in split.rows.tolist()]
        keys = [key_of(file) for file in files]
        payload = [path_payload(file) for file in files]
    if split.labels is not None and data.label_names:
        for one, row in zip(payload, split.labels, strict=True):
            one["labels"] = [data.label_names[i] for i in torch.nonzero(row).flatten().tolist()]
    return payload if any(payload) else None, keys
