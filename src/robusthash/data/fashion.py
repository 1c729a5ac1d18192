"""Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robusthash.core.registry import register
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.splits import SplitOptions, assemble, class_split, compact, hash_pixels, one_hot

CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_SIDE = 28
_PARTS = ("train", "t10k")
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist installs


@register("data", "fashion-mnist", paper="Xiao 2017", modality="image", state="measured")
def fashion_mnist(
    root: str | Path = "data",
    pool: int | None = None,
    train: int | None = 2000,
    query: int | None = 500,
    database: int | None = 10000,
    seed: int = 0,
) -> RetrievalData:
    """Fashion-MNIST: 70,000 grey images of 28 x 28 in ten classes. Queries are official test images.

    Training and database items are drawn from the 60,000 official training images and share none, unless
    ``train`` is None. Images whose pixels occur twice are kept once. Grey is repeated into three channels, so
    that every image encoder takes it.

    Args:
        root: a folder with the four IDX files (``train-images-idx3-ubyte`` and so on, plain or ``.gz``), or
            one that holds ``FashionMNIST/raw`` (torchvision's layout). Looked for last: where Debian's
            package ``dataset-fashion-mnist`` puts them.
        pool: side to average the images down to, 4 to 28: each new pixel is the mean of the pixels that its
            area touches, which also keeps high frequencies from aliasing. None leaves 28.
        train, query, database: items, equal over the classes and seeded; None takes all there are.
    """
    if pool is not None and not 4 <= pool <= _SIDE:
        raise ValueError(f"pool must lie in 4..{_SIDE} pixels, got {pool}")
    folder = _find(Path(root))
    parts = [_read_part(folder, part) for part in _PARTS]
    pixels = _pooled(torch.cat([images for images, _ in parts]), pool or _SIDE)
    labels = torch.cat([labels for _, labels in parts])
    is_test = torch.arange(len(labels)) >= len(parts[0][1])
    hashes = hash_pixels(pixels)
    first = torch.from_numpy(np.sort(np.unique(hashes, return_index=True)[1]))
    labels, is_test, hashes = labels[first], is_test[first], hashes[first.numpy()]
    sizes = SplitOptions(None, query, train, database, seed)
    needed, indices = compact(class_split(labels, sizes, query_among=is_test, names=CLASSES))
    side = f"pooled to {pool} x {pool}, " if pool is not None and pool < _SIDE else ""
    note = f"Grey images {side}repeated into three channels; seed {seed}."
    source = ArraySource({"image": pixels[first[needed]][:, None].repeat(1, 3, 1, 1)})
    classes = one_hot(labels[needed], len(CLASSES))
    return assemble("fashion-mnist", source, classes, hashes[needed.numpy()], indices, CLASSES, note)


def _find(root: Path) -> Path:
    """The folder that holds all four files."""
    searched = (root, root / "FashionMNIST" / "raw", _DEBIAN)
    names = [f"{part}-{kind}" for part in _PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for folder in searched:
        if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
            return folder
    raise FileNotFoundError(
        f"no Fashion-MNIST: the files {', '.join(names)} (plain or .gz) belong in {root.absolute()} or "
        f"{searched[1]}; torchvision.datasets.FashionMNIST({str(root)!r}, download=True) puts them there, "
        "and Debian's package dataset-fashion-mnist installs them too"
    )


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """(N, 28, 28) uint8 images and (N,) int64 labels."""
    images = read_idx(_either(folder / f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_either(folder / f"{part}-labels-idx1-ubyte"), dimensions=1)
    if images.shape[1:] != (_SIDE, _SIDE):
        shape = f"{images.shape[2]} x {images.shape[1]}"
        raise ValueError(f"{folder}: {part} images of {shape}, not {_SIDE} x {_SIDE}")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {part} images and {len(labels)} labels")
    if len(labels) and labels.max() >= len(CLASSES):
        raise ValueError(f"{folder}: a {part} label is {labels.max()}, and there are {len(CLASSES)} classes")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _either(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or ``.gz`` -> uint8 array of its own shape."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}; fetch it again") from error
    magic = 0x0800 + dimensions  # two zero bytes, the type (08: unsigned byte), the number of dimensions
    head = 4 + 4 * dimensions
    start = int.from_bytes(raw[:4], "big")
    if len(raw) < head or start != magic:
        raise ValueError(f"{path} is no IDX file of {dimensions} dimensions: it starts with {start:#010x}")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", dimensions, offset=4))
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} says {shape} and holds {len(raw) - head} bytes of data; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()


def _pooled(images: Tensor, side: int) -> Tensor:
    """(N, 28, 28) uint8 -> (N, side, side) uint8 by area averages, rounded."""
    if side == _SIDE:
        return images
    blocks = [functional.adaptive_avg_pool2d(block.float(), side).round() for block in images.split(4096)]
    return torch.cat(blocks).to(torch.uint8)
