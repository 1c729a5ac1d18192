"""A user's own arrays and torch data sets: images and labels of any usual form, checked, and split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Inputs
from robusthash.data.base import ArraySource, RetrievalData, Source, as_input, content_hash
from robusthash.data.image_files import pixels_of, read_image
from robusthash.data.image_text import TextOptions, one_text_each
from robusthash.data.label_cells import Labels, read_labels
from robusthash.data.splits import (
    Indices,
    SplitOptions,
    assemble,
    hash_pixels,
    note_unlabelled,
    sampled_split,
)

OneImage = str | Path | Image.Image | np.ndarray | Tensor
Images = np.ndarray | Tensor | Sequence[OneImage]
Rows = Mapping[str, Sequence[int] | np.ndarray | Tensor]
"""Row numbers of the splits ``query`` and ``database``, and maybe of ``train`` and ``validation``."""

_PARTS = ("train", "query", "database", "validation")
_AGAIN = 8  # readings of items that were read already: one finds a change by chance only sometimes


def from_arrays(
    images: Images,
    labels: Labels,
    *,
    texts: Sequence[str] | np.ndarray | Tensor | None = None,
    vocabulary: int = 1000,
    size: int | None = None,
    label_names: Sequence[str] | None = None,
    rows: Rows | None = None,
    name: str = "arrays",
    **splits: Any,
) -> RetrievalData:
    """Your own images and labels in memory as a data set.

    Args:
        images: (N, H, W, 3) or (N, 3, H, W), one channel or none for grey: uint8, or floats in [0, 1]; a list
            of paths, PIL images, arrays and tensors; or (N, V) float vectors of features.
        labels: N class numbers or names; (N, C) multi-hot; or a list of labels for each item, maybe empty.
            Items that share a label are relevant to each other. All lists empty: for objectives without
            labels; nothing can be scored.
        texts: a text for each item ("" where there is none), of which a bag of words is made; or an array of
            (N, V) vectors.
        vocabulary: most frequent words of the training texts that a bag counts.
        size: pixels a side to which images are cropped and resized, as files are; they stay as they are by
            default.
        label_names: of the columns; class numbers are their places. By default the classes that occur.
        rows: row numbers of each split, or a mask of all rows. ``train`` is the database by default.
        splits: else, of a drawn split: ``split`` (``random``, or ``balanced`` over the classes), the numbers
            ``query``, ``train`` and ``database``, and ``seed``; see ``SplitOptions``.

    Raises:
        ValueError: another shape, values out of range, labels that do not fit the images or that can be read
            in two ways, rows in two splits that must not share any.

    Example:
        >>> import numpy as np, robusthash as rh
        >>> images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
        >>> data = rh.RetrievalData.from_arrays(images, [number % 3 for number in range(60)], query=10)
        >>> len(data.query), len(data.database), data.label_names
        (10, 50, ('0', '1', '2'))
    """
    pixels = _eight_bit(_read_images(images, size))
    hot, names = read_labels(labels, len(pixels), label_names)
    indices = _by_rows(rows, splits, len(pixels)) if rows is not None else _sampled(hot, names, splits)
    arrays, note, form = {"image": pixels}, "", None
    if texts is not None:
        if not (isinstance(texts, Tensor) or getattr(texts, "dtype", np.dtype(object)).kind in "biuf"):
            texts = one_text_each(texts)
        if len(texts) != len(pixels):
            raise ValueError(f"{len(texts)} texts for {len(pixels)} images")
        if isinstance(texts, np.ndarray | Tensor):
            arrays["text"] = _vectors(_owned(texts), "texts")
        else:
            others = torch.cat([indices.query, indices.database])
            options = TextOptions(vocabulary=vocabulary)
            arrays["text"], note, form = options.encode([[text] for text in texts], indices.train, others)
    note = f"{note} {note_unlabelled(name, hot)}".strip()
    hashes = hash_pixels(pixels)
    return assemble(name, ArraySource(arrays), hot, hashes, indices, names, note, text_form=form)


def from_dataset(
    dataset: Any,
    *,
    size: int | None = None,
    label_names: Sequence[str] | None = None,
    rows: Rows | None = None,
    name: str = "",
    memory: int = 1 << 30,
    progress: Progress = silent,
    **splits: Any,
) -> RetrievalData:
    """A torch ``Dataset`` or ``DataLoader`` of images and labels as a data set.

    Of a loader the data set is read, in its own order, without what its sampler leaves out. Images must come
    as pixels: leave normalisation to the model (``wrap`` has mean and std) and random changes to training
    (``TrainConfig`` has ``augment``).

    Args:
        dataset: its items are (image, label, ...) or mappings with ``image`` and ``label`` or ``labels``, in
            the forms of ``from_arrays``.
        size, rows, splits: as in ``from_arrays``.
        label_names: by default the ``classes`` of the data set, as torchvision has them.
        memory: bytes that images may take; those of a larger data set are read again for each batch.

    Raises:
        ValueError: as ``from_arrays``, with the number of the item; items that are no pairs; an image that is
            another when it is read again; a loader whose sampler draws other items in each pass.
    """
    items = _Items.of(dataset, size)
    images: list[Tensor] = []
    labels, hashes, held, total = [], [], 0, len(items)
    for number, (pixels, label) in enumerate(items):
        labels.append(label)
        hashes.append(content_hash(pixels.numpy().tobytes()))
        held += pixels.numel() * pixels.element_size()
        if held <= memory:
            images.append(pixels)
        progress(number + 1, total, "reading the data set")
    if not labels:
        raise ValueError("the data set holds no item")
    items = replace(items, hashes=tuple(hashes))
    for row in np.linspace(0, len(labels) - 1, _AGAIN).astype(int).tolist() if items.indexed else ():
        items.image(row)
    hot, names = read_labels(labels, len(labels), label_names or _classes(dataset))
    indices = _by_rows(rows, splits, len(labels)) if rows is not None else _sampled(hot, names, splits)
    source: Source = items
    if len(images) == len(labels):
        source = ArraySource({"image": _stacked(images)})
    elif not items.indexed:
        raise ValueError(
            f"the images take more than memory={memory} bytes, and a data set without __getitem__ must be "
            "held whole: raise memory, or make size smaller"
        )
    name = name or type(items.dataset).__name__
    return assemble(name, source, hot, np.array(hashes, "S16"), indices, names, note_unlabelled(name, hot))


def one_image(image: OneImage, size: int | None = None) -> Tensor:
    """An image of any form -> (3, H, W): uint8, or of floats float32 in [0, 1].

    Args:
        image: a path, a PIL image, an (H, W) or (H, W, 3) array, a (3, H, W) tensor: uint8, or floats in
            [0, 1], which must be of this size already.
        size: pixels a side to which others are cropped and resized, as files are.

    Raises:
        ValueError: another type or shape, values out of range.
    """
    if isinstance(image, str | Path):
        return read_image(image, size)
    if isinstance(image, Image.Image):
        return pixels_of(image, size)
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"an image is a path, PIL image, array or tensor, got {type(image).__name__}")
    pixels = _channels_first(_owned(image)[None], isinstance(image, np.ndarray))[0]
    if pixels.is_floating_point():
        if size is not None and tuple(pixels.shape[-2:]) != (size, size):
            raise ValueError(
                f"floats must be {size} x {size} pixels already, got {tuple(image.shape)}; give a PIL image "
                "or uint8 to have it resized"
            )
        return pixels
    return pixels if size is None else pixels_of(pixels.permute(1, 2, 0).numpy(), size)


@dataclass(frozen=True)
class _Items:
    """The items of a torch data set: a source that reads them again for each batch."""

    dataset: Any
    numbers: Sequence[int] | None  # of the items in the data set; None where it is only iterated
    size: int | None
    hashes: tuple[bytes, ...] = ()  # of the pixels, once all were read; by them another image is found out

    @classmethod
    def of(cls, dataset: Any, size: int | None) -> _Items:
        """The items of a data set, or of the one that a loader reads."""
        loader = dataset if isinstance(dataset, torch.utils.data.DataLoader) else None
        dataset = dataset if loader is None else loader.dataset
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            if not hasattr(dataset, "__iter__"):
                raise ValueError(f"a {type(dataset).__name__} is no data set: it has no __getitem__")
            return cls(dataset, None, size)
        everything = (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler)
        if loader is None or loader.sampler is None or isinstance(loader.sampler, everything):
            return cls(dataset, range(len(dataset)), size)
        chosen, again = sorted(loader.sampler), sorted(loader.sampler)
        if chosen != again or getattr(loader.sampler, "replacement", False):
            raise ValueError(
                f"the {type(loader.sampler).__name__} of the loader draws other items in each pass, and "
                "leaves some out by chance; give the loader's data set, or a Subset of it"
            )
        return cls(dataset, sorted(set(chosen)), size)

    @property
    def indexed(self) -> bool:
        return self.numbers is not None

    def __len__(self) -> int:
        return 0 if self.numbers is None else len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """(pixels, label) of each item."""
        items = iter(self.dataset) if self.numbers is None else map(self.dataset.__getitem__, self.numbers)
        for number, item in enumerate(items):
            image, label = _pair(item, number)
            yield self._pixels(image, number), label

    def image(self, row: int) -> Tensor:
        """(3, H, W) of one item, read again; a ValueError where it is another image than at first."""
        number = row if self.numbers is None else self.numbers[row]
        pixels = self._pixels(_pair(self.dataset[number], number)[0], number)
        if self.hashes and self.hashes[row] != content_hash(pixels.numpy().tobytes()):
            raise ValueError(
                f"item {number} is another image when it is read again: take random changes out of the data "
                "set's transform; TrainConfig(augment='flip-crop') makes them in training"
            )
        return pixels

    def inputs(self, rows: Tensor) -> Inputs:
        return {"image": as_input(_stacked([self.image(row) for row in rows.tolist()]))}

    def _pixels(self, image: OneImage, number: int) -> Tensor:
        try:
            return _eight_bit(one_image(image, self.size))
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from error


def _pair(item: Any, number: int) -> tuple[Any, Any]:
    """Image and label of an item."""
    if isinstance(item, Mapping):
        label = item.get("label", item.get("labels"))
        if "image" in item and label is not None:
            return item["image"], label
        raise ValueError(f"item {number} has {', '.join(map(str, item))}, and not image and label")
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) >= 2:
        return item[0], item[1]
    raise ValueError(f"item {number} is a {type(item).__name__}; items are (image, label)")


def _classes(dataset: Any) -> Sequence[str] | None:
    """The names of the classes that a data set, or the one below its loader or subset, has."""
    while dataset is not None and not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)
    return None if dataset is None else list(map(str, dataset.classes))


# ------------------------------------------------------------------------------------------------- images


def _read_images(images: Images, size: int | None) -> Tensor:
    """(N, 3, H, W) uint8 or float32, or (N, V) float32."""
    if isinstance(images, np.ndarray | Tensor):
        values = _owned(images)
        if values.ndim == 2:
            return _vectors(values, "images")
        pixels = _channels_first(values, isinstance(images, np.ndarray))
        if size is None or tuple(pixels.shape[-2:]) == (size, size):
            return pixels
        images = list(pixels)
    several = []
    for number, image in enumerate(images):
        try:
            several.append(_eight_bit(one_image(image, size)))
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from error
    return _stacked(several)


def _owned(values: np.ndarray | Tensor) -> Tensor:
    """A copy on the CPU, of views that run backwards and read-only arrays as well."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", copy=True)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"images are uint8 or floats in [0, 1], got an array of {values.dtype}")
    return torch.from_numpy(np.array(values))


def _channels_first(values: Tensor, channels_last: bool) -> Tensor:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, 3, H, W), uint8 or float32 in [0, 1].

    ``channels_last`` decides where both ends could be channels.
    """
    shape = tuple(values.shape)
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4:
        last, first = shape[3] in (1, 3), shape[1] in (1, 3)
        if not last and not first:
            raise ValueError(f"images have 3 channels or 1, first or last, got shape {shape[1:]}")
        values = values.permute(0, 3, 1, 2) if last and (channels_last or not first) else values
    else:
        raise ValueError(f"images are (H, W, 3), (3, H, W) or (H, W), got shape {shape[1:]}")
    if values.numel() == 0:
        raise ValueError(f"there is no pixel in images of shape {shape[1:]}")
    if values.is_floating_point():
        least, largest = float(values.min()), float(values.max())
        if not (math.isfinite(least) and math.isfinite(largest)):
            row = int(torch.nonzero(~values.flatten(1).isfinite().all(1))[0])
            raise ValueError(f"pixels are NaN or infinite{f', first in image {row}' * (len(values) > 1)}")
        if not (least >= 0 and largest <= 1):
            remedy = "divide by 255" if least >= 0 else "undo the normalisation, which belongs into the model"
            raise ValueError(f"floats must lie in [0, 1], got {least:g} to {largest:g}; {remedy}")
        values = values.float()
    elif values.dtype != torch.uint8:
        raise ValueError(f"pixels are uint8 from 0 to 255, or floats in [0, 1], got {values.dtype}")
    return values.expand(-1, 3, -1, -1).contiguous()


def _vectors(values: Tensor, what: str) -> Tensor:
    """(N, V) finite float32."""
    if values.ndim != 2 or not torch.isfinite(values.float()).all():
        raise ValueError(f"{what} of shape {tuple(values.shape)} must be (N, V) vectors without NaN")
    return values.float()


def _eight_bit(pixels: Tensor) -> Tensor:
    """Floats that 8-bit pixels became, as ToTensor makes them, as those pixels: the same, in a quarter."""
    if pixels.ndim == 2 or not pixels.is_floating_point():
        return pixels
    levels = (pixels * 255).round().to(torch.uint8)
    return levels if torch.equal(as_input(levels), pixels) else pixels


def _stacked(images: Sequence[Tensor]) -> Tensor:
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if not images:
        raise ValueError("there is no image")
    if len(sizes) > 1:
        raise ValueError(f"images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[-1]}; give size=")
    if len({image.dtype for image in images}) > 1:
        images = [as_input(image) for image in images]
    return torch.stack(list(images))


# ------------------------------------------------------------------------------------------------- splits


def _sampled(labels: Tensor, names: Sequence[str], splits: Mapping[str, Any]) -> Indices:
    known = SplitOptions.__dataclass_fields__
    if unknown := sorted(set(splits) - set(known)):
        raise ValueError(f"options of a drawn split are {', '.join(known)}, got {', '.join(unknown)}")
    return sampled_split(labels, names, SplitOptions(**splits))


def _by_rows(rows: Rows, splits: Mapping[str, Any], count: int) -> Indices:
    """The splits whose rows a user names."""
    if splits:
        raise ValueError(f"rows= names the splits, and {', '.join(splits)} would draw them; leave one out")
    if unknown := set(rows) - set(_PARTS):
        raise ValueError(f"rows= names {', '.join(_PARTS)}, got {sorted(unknown)[0]!r}")
    for part in ("query", "database"):
        if part not in rows:
            raise ValueError(f"rows= needs the rows of {part!r}")
    parts = {part: _row_numbers(part, numbers, count) for part, numbers in rows.items()}
    parts.setdefault("train", parts["database"])
    for part in ("database", "train", "validation"):
        shared = sorted(set(parts["query"].tolist()) & set(parts.get(part, torch.empty(0)).tolist()))
        if shared:
            raise ValueError(f"{len(shared)} queries are also in {part!r} (first: row {shared[0]})")
    return Indices(parts["train"], parts["query"], parts["database"], parts.get("validation"))


def _row_numbers(part: str, numbers: Any, count: int) -> Tensor:
    if isinstance(numbers, Iterable) and not isinstance(numbers, np.ndarray | Tensor | Sequence):
        numbers = sorted(numbers) if isinstance(numbers, Set) else list(numbers)
    found = np.asarray(numbers)
    found = np.flatnonzero(found) if found.dtype == bool and found.shape == (count,) else found
    if found.ndim != 1 or len(found) == 0 or found.dtype.kind not in "iu":
        got = f"{numbers!r:.60} ({found.dtype}, shape {found.shape})"
        raise ValueError(f"rows of {part!r} are row numbers, at least one, or a mask of {count}: got {got}")
    rows = torch.as_tensor(found.astype(np.int64))
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        raise ValueError(
            f"rows of {part!r} reach from {rows.min()} to {rows.max()}; there are 0 to {count - 1}"
        )
    if len(set(rows.tolist())) < len(rows):
        raise ValueError(f"rows of {part!r} name a row twice")
    return rows
