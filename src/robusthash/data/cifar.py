"""CIFAR-10 and the three splits that hashing papers use."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.registry import register
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.splits import assemble, class_split, compact, hash_pixels, one_hot

CifarSplit = Literal["deephash", "deephash-with-train", "official-test"]

_OFFICIAL = "cifar-10-batches-py"
_ARCHIVE = "cifar10.npz"
_KEYS = ("jpeg", "offset", "label", "is_test", "classes")
_ARCHIVE_NOTE = (
    "Pixels are re-encoded JPEG and the order is not the official one: numbers are close to official ones."
)


@dataclass(frozen=True)
class _Images:
    """All items before any is chosen."""

    labels: Tensor  # (N,) int64
    is_test: Tensor  # (N,) bool
    names: tuple[str, ...]
    take: Callable[[Tensor], Tensor]  # (R,) rows -> (R, 3, 32, 32) uint8


@register("data", "cifar10", paper="Krizhevsky 2009", modality="image", state="measured")
def cifar10(
    root: str | Path = "data",
    npz: str | Path | None = None,
    download: bool = False,
    split: CifarSplit = "deephash",
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
        query, train, database: cut a split to so many items, equal over the classes and seeded, for instance
            ``database=10000`` on a small machine. None is the customary size.

    Raises:
        FileNotFoundError: nothing is there; the message says what belongs where.
        ValueError: damaged files, an unknown split, a size that a class cannot give.
    """
    if split not in ("deephash", "deephash-with-train", "official-test"):
        raise ValueError(f"split must be 'deephash', 'deephash-with-train' or 'official-test', got {split!r}")
    if npz is not None:
        images, note = _read_npz(Path(npz)), _ARCHIVE_NOTE
    elif download or (Path(root) / _OFFICIAL).is_dir():
        images, note = _read_official(Path(root), download), ""
    elif (Path(root) / _ARCHIVE).is_file():
        images, note = _read_npz(Path(root) / _ARCHIVE), _ARCHIVE_NOTE
    else:
        raise FileNotFoundError(
            f"no CIFAR-10 in {Path(root).absolute()}: put the official python batches in {Path(root) / _OFFICIAL} "
            f"(download=True fetches them) or one file with JPEG images at {Path(root) / _ARCHIVE} (or name it by npz=)"
        )
    if split == "official-test":
        query_among, with_train = images.is_test, True
    else:
        query = 1000 if query is None else query
        train = 5000 if train is None else train
        query_among, with_train = None, split == "deephash-with-train"
    chosen = class_split(
        images.labels,
        query=query,
        train=train,
        database=database,
        seed=seed,
        train_in_database=with_train,
        query_among=query_among,
        names=images.names,
    )
    needed, indices = compact(chosen)
    pixels = images.take(needed)
    return assemble(
        "cifar10",
        ArraySource({"image": pixels}),
        one_hot(images.labels[needed], len(images.names)),
        hash_pixels(pixels),
        indices,
        images.names,
        f"Split {split}, seed {seed}. {note}".strip(),
    )


def _read_official(root: Path, download: bool) -> _Images:
    from torchvision.datasets import CIFAR10  # half a second to import, and only this reader needs it

    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"{root / _OFFICIAL} is damaged or incomplete: {error}; remove it and fetch it again"
        ) from None
    pixels = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    labels = torch.tensor([label for part in parts for label in part.targets])
    is_test = torch.arange(len(labels)) >= len(parts[0].data)
    return _Images(labels, is_test, tuple(parts[0].classes), lambda rows: pixels[rows].contiguous())


def _read_npz(path: Path) -> _Images:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}; it should hold the arrays {', '.join(_KEYS)}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(_KEYS) - set(archive.files))
            if missing:
                raise ValueError(
                    f"it lacks the arrays {', '.join(missing)} and has {', '.join(archive.files)}"
                )
            jpeg, offset, label, is_test = (archive[key] for key in ("jpeg", "offset", "label", "is_test"))
            names = tuple(str(name) for name in archive["classes"])
        count = len(label)
        if len(offset) != count + 1 or len(is_test) != count or (np.diff(offset.astype(np.int64)) <= 0).any():
            raise ValueError(
                f"{count} labels, {len(is_test)} test marks and {len(offset)} offsets do not fit together"
            )
        if offset[0] != 0 or offset[-1] != len(jpeg):
            raise ValueError(f"the offsets end at {offset[-1]} and there are {len(jpeg)} bytes of images")
        if count == 0 or label.min() < 0 or label.max() >= len(names):
            raise ValueError(f"labels must lie in 0..{len(names) - 1}")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a CIFAR-10 archive: {error}") from error
    offset = offset.astype(np.int64)

    def take(rows: Tensor) -> Tensor:
        pixels = np.empty((len(rows), 32, 32, 3), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            # without ``read_image`` and threads: on files this small their overhead is most of the time
            try:
                with Image.open(
                    io.BytesIO(jpeg[offset[row] : offset[row + 1]].tobytes()), formats=["JPEG"]
                ) as image:
                    decoded = np.asarray(image.convert("RGB"))
            except OSError as error:
                raise ValueError(f"image {row} of {path} is no JPEG file") from error
            if decoded.shape != (32, 32, 3):
                raise ValueError(
                    f"image {row} of {path} is {decoded.shape[1]} x {decoded.shape[0]}, not 32 x 32"
                )
            pixels[position] = decoded
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return _Images(
        torch.from_numpy(label.astype(np.int64)), torch.from_numpy(is_test.astype(bool)), names, take
    )
