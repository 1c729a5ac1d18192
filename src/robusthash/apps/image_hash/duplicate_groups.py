"""The copies in a folder: groups of images whose hashes are near."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robusthash.apps.image_hash.copy_hash import (
    ImageHash,
    check_bits,
    check_radius,
    copy_model,
    hashes,
    proved_levels,
)
from robusthash.core.runtime import Progress, silent
from robusthash.data.image_files import ImageOptions, Skipped, iter_images, path_text, read_image
from robusthash.data.image_listing import list_images
from robusthash.data.pixel_conversion import MAX_PIXELS
from robusthash.data.splits import hash_pixels
from robusthash.index.search_engines import FlatEngine, Rows

_BATCH = 256  # images that are hashed together, and hashes whose neighbours are looked up together


@dataclass(frozen=True)
class Copy:
    """An image of a group, and the bits by which its hash differs from that of the first."""

    path: str
    distance: int


@dataclass(frozen=True)
class Duplicates:
    """Groups of copies, largest first; of each group the first path in order comes first.

    ``plain`` images are of one colour or one fine texture: only those with the same pixels are grouped.
    """

    images: int
    bits: int
    radius: int
    groups: tuple[tuple[Copy, ...], ...]
    plain: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"schema": "robusthash.duplicates/1", **asdict(self)}


@dataclass
class HashedImages:
    """Hashes of files in order, and the files passed over."""

    paths: list[Path] = field(default_factory=list)
    hashes: list[ImageHash] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    proved: list[int] = field(
        default_factory=list
    )  # levels of ``proved_levels``, where proofs were requested


def hash_files(
    places: Sequence[str | Path],
    bits: int = 256,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = silent,
    proofs: bool = False,
) -> HashedImages:
    """Hash image files, and those of folders and their subfolders; unreadable ones are passed over.

    Args:
        proofs: prove, too, what change each hash withstands (``proved_levels``).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another number of bits, or no image at all.
    """
    check_bits(bits)
    found = HashedImages()
    files = list(_files(places, found.skipped))
    options = ImageOptions(copy_model().side, on_error="skip", max_pixels=max_pixels)
    read = zip(files, iter_images(files, options, workers), strict=True)
    done = 0
    while batch := list(islice(read, _BATCH)):
        good = [(path, pixels) for path, pixels in batch if not isinstance(pixels, Exception)]
        found.skipped += [
            Skipped(path_text(path), getattr(error, "reason", "") or str(error))
            for path, error in batch
            if isinstance(error, Exception)
        ]
        if good:
            pixels = torch.stack([one for _, one in good])
            found.paths += [path for path, _ in good]
            found.hashes += hashes(pixels, bits)
            found.proved += proved_levels(pixels, bits) if proofs else []
        done += len(batch)
        progress(done, len(files), "hashing")
    if not found.paths:
        reason = f"; passed over: {found.skipped[0]}" if found.skipped else ""
        raise ValueError(f"there is no image to hash in {', '.join(map(path_text, places))}{reason}")
    return found


def _files(places: Sequence[str | Path], skipped: list[Skipped]) -> Iterator[Path]:
    """Each file once, in order of the places and of their names."""
    seen = set[Path]()
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"no file or folder {path_text(place)}")
        files: Sequence[Path] = (place,)
        if place.is_dir():
            listing = list_images(place)
            files = listing.images
            skipped += listing.skipped
        for file in files:
            if (resolved := file.resolve()) not in seen:
                seen.add(resolved)
                yield file


def find_duplicates(
    places: str | Path | Sequence[str | Path],
    bits: int = 256,
    radius: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = silent,
) -> Duplicates:
    """Group the copies among the images of folders: an image joins a group where it is near one of it.

    Args:
        places: folders, with their subfolders, and files.
        radius: bits by which copies may differ; by default such that 1 of 100,000 pairs of different
            photographs is as near.

    Raises:
        FileNotFoundError, ValueError: see ``hash_files``; a radius out of range.
    """
    check_bits(bits)
    radius = check_radius(radius, bits)
    several = [places] if isinstance(places, str | Path) else places
    found = hash_files(several, bits, workers, max_pixels, progress)
    order = sorted(range(len(found.paths)), key=lambda row: found.paths[row])
    groups = [
        tuple(Copy(path_text(found.paths[row]), found.hashes[row] - found.hashes[rows[0]]) for row in rows)
        for rows in _groups(found, order, radius, max_pixels, progress)
    ]
    groups.sort(key=lambda group: (-len(group), group[0].path))
    plain = tuple(path_text(found.paths[row]) for row in order if found.hashes[row].plain)
    return Duplicates(len(order), bits, radius, tuple(groups), plain, tuple(found.skipped))


def _groups(
    found: HashedImages, order: Sequence[int], radius: int, max_pixels: int, progress: Progress
) -> Iterator[list[int]]:
    """Rows of two or more images each, in the given order."""
    # plain images by all of their pixels, others by their codes: equal ones are one node
    nodes = [
        _pixels(found.paths[row], max_pixels) if found.hashes[row].plain else found.hashes[row].packed
        for row in order
    ]
    unique = sorted({node for node, row in zip(nodes, order, strict=True) if not found.hashes[row].plain})
    component = dict(zip(unique, _components(unique, radius, progress), strict=True))
    members: dict[int | bytes, list[int]] = {}
    for node, row in zip(nodes, order, strict=True):
        members.setdefault(component.get(node, node), []).append(row)
    yield from (rows for rows in members.values() if len(rows) > 1)


def _pixels(file: Path, max_pixels: int) -> bytes:
    """A digest of all pixels of a file; of one that is gone by now, of its path."""
    try:
        pixels = read_image(file, max_pixels=max_pixels)
    except (OSError, ValueError):
        return b"path" + os.fsencode(file)
    return str(tuple(pixels.shape)).encode() + bytes(hash_pixels(pixels[None])[0])


def _components(codes: Sequence[bytes], radius: int, progress: Progress) -> list[int]:
    """The connected component of each of some different codes, where near ones are connected."""
    if not codes:
        return []
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    packed = np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), -1)
    engine, label = FlatEngine(Rows(np.arange(len(codes)), packed)), np.arange(len(codes))
    for start in range(0, len(codes), _BATCH):
        near = engine.range(packed[start : start + _BATCH], radius)
        left = np.repeat(np.arange(start, start + len(near)), [len(ids) for ids, _ in near])
        right = np.concatenate([ids for ids, _ in near])
        edges = coo_array((np.ones(len(left), bool), (label[left], label[right])), shape=(len(codes),) * 2)
        label = connected_components(edges, directed=False)[1][label]
        progress(min(start + _BATCH, len(codes)), len(codes), "comparing")
    return [int(one) for one in label]
