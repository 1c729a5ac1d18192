"""CIFAR-10 and the three splits that hashing papers use."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import ArraySource, RetrievalData, read_npz
from robusthash.data.splits import SplitOptions, assemble, class_split, compact, hash_pixels, one_hot

_OFFICIAL = "cifar-10-batches-py"
_ARCHIVE = "cifar10.npz"
_KEYS = ("jpeg", "offset", "label", "is_test", "classes")


@dataclass(frozen=True)
class _Images:
    """All items before any is chosen."""

    labels: Tensor  # (N,) int64
    is_test: Tensor  # (N,) bool
    names: tuple[str, ...]
    take: Callable[[Tensor], Tensor]  # (R,) rows -> (R, 3, 32, 32) uint8
    note: str = ""


@register("data", "cifar10", paper="Krizhevsky 2009", modality="image", state="measured")
def cifar10(
    root: str | Path = "data",
    npz: str | Path | None = None,
    download: bool = False,
    split: Literal["deephash", "deephash-with-train", "official-test"] = "deephash",
    query: int | None = None,
    train: int | None = None,
    database: int | None = None,
    seed: int = 0,
) -> RetrievalData:
    """CIFAR-10, 60,000 colour images of 32 x 32 in ten classes, under a split of the hashing literature.

    ``deephash``: 1,000 queries (100 a class) and 5,000 training images (500 a class) drawn from all 60,000;
    the database is the other 54,000 ("cifar10" in the DeepHash family of codes). ``deephash-with-train``: the
    same, and the database is all 59,000 that are no queries ("cifar10-1"). ``official-test``: the 10,000
    official test images are the queries, the 50,000 training images are training set and database
    ("cifar10-2"; some codes draw those 10,000 from all images instead). The published draws were not seeded
    alike, so no seed repeats a paper's own choice.

    Args:
        root: folder that holds ``cifar-10-batches-py`` (torchvision's layout, checked by its digests) or,
            looked for second, ``cifar10.npz``.
        npz: read this file instead: arrays ``jpeg`` (all files end to end), ``offset``, ``label``,
            ``is_test`` and ``classes``.
        download: fetch the official files into ``root`` where they are missing.
        split: one of the three above.
        query, train, database: cut a split to a number of items, equal over the classes and seeded, for
            instance ``database=10000`` on a small machine. None is the customary size.
    """
    images = _read(Path(root), npz, download)
    is_official = split == "official-test"
    if not is_official:
        query, train = 1000 if query is None else query, 5000 if train is None else train
    indices = class_split(
        images.labels,
        SplitOptions(split, query, train, database, seed),
        train_in_database=split != "deephash",
        query_among=images.is_test if is_official else None,
        names=images.names,
    )
    needed, indices = compact(indices)
    pixels = images.take(needed)
    labels = one_hot(images.labels[needed], len(images.names))
    note = f"Split {split}, seed {seed}. {images.note}".strip()
    source = ArraySource({"image": pixels})
    return assemble("cifar10", source, labels, hash_pixels(pixels), indices, images.names, note)


def _read(root: Path, npz: str | Path | None, download: bool) -> _Images:
    if npz is not None:
        return _read_archive(Path(npz))
    if download or (root / _OFFICIAL).is_dir():
        return _read_official(root, download)
    if (root / _ARCHIVE).is_file():
        return _read_archive(root / _ARCHIVE)
    raise FileNotFoundError(
        f"no CIFAR-10 in {root.absolute()}: put the official python batches in {root / _OFFICIAL} "
        f"(download=True fetches them) or one file with JPEG images at {root / _ARCHIVE} (or name it by npz=)"
    )


def _read_official(root: Path, download: bool) -> _Images:
    from torchvision.datasets import CIFAR10  # half a second to import, and only this reader needs it

    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        path = root / _OFFICIAL
        raise ValueError(f"{path} is damaged or incomplete: {error}; remove it and fetch it again") from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    labels = torch.tensor([label for part in parts for label in part.targets])
    is_test = torch.arange(len(labels)) >= len(parts[0].data)
    return _Images(labels, is_test, tuple(parts[0].classes), lambda rows: pixels[rows].contiguous())


def _read_archive(path: Path) -> _Images:
    jpeg, offset, label, is_test, classes = read_npz(path, _KEYS, "CIFAR-10").values()
    offset, names = offset.astype(np.int64), tuple(map(str, classes))
    count, wrong = len(label), ""
    if len(offset) != count + 1 or len(is_test) != count or (np.diff(offset) <= 0).any():
        wrong = f"{count} labels, {len(is_test)} test marks and {len(offset)} offsets do not fit together"
    elif offset[0] != 0 or offset[-1] != len(jpeg):
        wrong = f"the offsets end at {offset[-1]} and there are {len(jpeg)} bytes of images"
    elif count == 0 or label.min() < 0 or label.max() >= len(names):
        wrong = f"labels must lie in 0..{len(names) - 1}"
    if wrong:
        raise ValueError(f"{path} is not a CIFAR-10 archive: {wrong}")

    def take(rows: Tensor) -> Tensor:
        pixels = np.empty((len(rows), 32, 32, 3), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            stream = io.BytesIO(jpeg[offset[row] : offset[row + 1]].tobytes())
            pixels[position] = _decode(stream, f"image {row} of {path}")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    note = (
        "Pixels are re-encoded JPEG and the order is not the official one: "
        "numbers are close to official ones."
    )
    labels = torch.from_numpy(label.astype(np.int64))
    return _Images(labels, torch.from_numpy(is_test.astype(bool)), names, take, note)


def _decode(stream: io.BytesIO, name: str) -> np.ndarray:
    """(32, 32, 3) uint8. On files this small the overhead of ``read_image`` is most of the time."""
    try:
        with Image.open(stream, formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{name} is no JPEG file") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{name} is {pixels.shape[1]} x {pixels.shape[0]}, not 32 x 32")
    return pixels
