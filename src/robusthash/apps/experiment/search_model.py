"""A trained model in three lines of Python: load it, encode images and texts, search an index."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.apps.experiment.model_stages import read_data
from robusthash.apps.experiment.run_directory import TEXTS, Run, RunError, load_run, reading
from robusthash.apps.experiment.run_selection import entry_named, folder_of_entry, run_of_entry
from robusthash.core.hamming import pack
from robusthash.core.limited_files import read_json, shortened
from robusthash.core.out_of_memory import halving, warn
from robusthash.core.runtime import Progress, choose_device, packaged, silent
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData, TextForm, as_input
from robusthash.data.image_files import OnError
from robusthash.data.image_text import text_form
from robusthash.data.own_data import OneImage, one_image
from robusthash.index import CodeIndex
from robusthash.models.encoding import encode_signs, weights_digest
from robusthash.models.hasher import Hasher
from robusthash.models.hub_folder import HubCard, fetched, save_folder
from robusthash.models.saved_hasher import HUB, PLAIN, load_exported, names_in, save_exported
from robusthash.robustness.evidence.records import RegistryEntry

logger = logging.getLogger(__name__)

PLAIN_QUERY = "the image is of one colour or one fine texture: its code says little, and nothing is its copy"
_COPY_HASH = "copy-hash"

Item = OneImage
"""An image or, where the model has texts, a text."""


@dataclass(frozen=True)
class SearchModel:
    """A hasher ready to encode and search: of a run, of an exported folder, or one that was just trained.

    Args:
        hasher: of images of pixels, or of texts.
        side: pixels a side of the images that it was trained on; 0 where it has none.
        origin: digest of its weights, by default computed: codes carry it, and an index refuses those of
            another model.
        read_texts: gives the form of its texts, when the first text is encoded.
        files: digests of the files of a run, by name, of which ``origin`` is made; none where it is that of
            the tensors.
    """

    hasher: Hasher
    side: int
    origin: str = ""
    read_texts: Callable[[], TextForm | None] = lambda: None
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", self.origin or weights_digest(self.hasher))
        self.hasher.side = self.side or None

    @classmethod
    def of(cls, hasher: Hasher, data: RetrievalData) -> SearchModel:
        """A hasher with the size and the texts of the data that it was trained on."""
        side = _side({"image_size": data.image_size if "image" in data.modalities else ()})
        return cls(hasher, side, read_texts=lambda: data.text_form)

    @property
    def bits(self) -> int:
        return self.hasher.bits

    @cached_property
    def radius(self) -> int | None:
        """Bits within which two images count as copies; None but of the packaged hash for copies."""
        from robusthash.apps.image_hash.copy_hash import RADIUS  # which imports this module

        is_packaged = self.origin == read_json(packaged(_COPY_HASH) / HUB.card)["digest"]
        return RADIUS[self.bits] if is_packaged else None

    def is_plain(self, pixels: Tensor) -> bool:
        """True of (3, S, S) pixels in [0, 1] of one colour or one fine texture, of which a hash for copies
        says little; False of models that have no ``radius``."""
        from robusthash.apps.image_hash.copy_hash import plain

        return self.radius is not None and bool(plain(pixels[None]))

    def copy_field(self, distance: int, plain: bool) -> dict[str, bool]:
        """The fields ``copy`` of a result, within ``radius`` of a query that is not plain, and
        ``plain_query``; {} without a radius."""
        if self.radius is None:
            return {}
        return {"copy": distance <= self.radius and not plain, "plain_query": plain}

    @cached_property
    def texts(self) -> TextForm | None:
        """The form of its texts; None where it has none, or they came as vectors."""
        return self.read_texts() if "text" in self.hasher.modalities else None

    def encode(
        self,
        images: Item | Iterable[Item],
        batch_size: int = 256,
        progress: Progress | None = None,
        modality: str = "image",
        on_error: OnError = "raise",
    ) -> Codes:
        """Codes of images, as files give them: cropped to a square and resized, encoded in batches.

        Args:
            images: one or several of a path, a PIL image, an (H, W) or (H, W, 3) array, a (3, H, W) tensor:
                uint8, or floats in [0, 1] of the model's own size. Lists, iterators, and arrays and tensors
                of four axes are several; all others are one. Texts where ``modality`` is ``text``.
            progress: called with (items done, items in all or 0 where unknown, "encoding"); by default a bar
                in a terminal, where there is more than one batch.
            modality: ``image`` or ``text``.
            on_error: ``raise`` at the first image that cannot be read or used, or ``skip`` such images, with
                one warning that counts them.

        Returns:
            (N, ...) codes; the ids are the places of the items, 0 to N - 1 unless some were skipped.

        Raises:
            FileNotFoundError, ValueError: an item that cannot be read or used (its place is named), or a
                model that is searched by its numbers, and not by their signs.
        """
        self.check_encodes(modality)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        one = isinstance(images, str | Path | Image.Image)
        one = one or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
        several: Any = [images] if one else images
        if not hasattr(several, "__iter__"):
            raise ValueError(f"encode takes images, or texts, one or several; got {type(several).__name__}")
        total = len(several) if hasattr(several, "__len__") else 0
        signs: list[Tensor] = []
        ids: list[int] = []
        errors: list[Exception] = []
        done, size = 0, batch_size
        with ExitStack() as stack:
            report = progress or _progress(stack, silenced=0 < total <= batch_size)
            for batch in _batched(iter(several), batch_size):
                read = self._images(batch, done) if modality == "image" else self._texts(batch, done)
                used = [item for item in read if not isinstance(item, Exception)]
                errors += [item for item in read if isinstance(item, Exception)]
                if errors and on_error == "raise":
                    raise errors[0]
                ids += [done + place for place, item in enumerate(read) if not isinstance(item, Exception)]
                done += len(batch)
                if used:
                    encode = partial(encode_signs, self.hasher, modality, torch.stack(used))
                    part, size = halving(encode, min(size, len(used)), "items", "encoded", warn)
                    signs.append(part)
                report(done, total, "encoding")
        first = "; ".join(map(str, errors[:3]))
        if not signs:
            raise ValueError(f"there is no {modality} to encode{first and ': '}{first}")
        if errors:
            logger.warning("%d of %d %ss skipped: %s", len(errors), done, modality, first)
        return Codes(pack(torch.cat(signs)), self.bits, torch.tensor(ids), self.origin)

    def check_encodes(self, modality: str) -> None:
        """Raise ValueError where it has no binary codes of the images, or texts, that users have."""
        if modality == "image" and modality in self.hasher.modalities and not self.side:
            raise ValueError("this model encodes images of no known size, as of features; it takes none here")
        if modality not in self.hasher.modalities:
            encoded = ", ".join(self.hasher.modalities)
            raise ValueError(f"this model encodes {encoded}, not {modality!r} items")
        if self.hasher.distance != "hamming":
            raise ValueError(
                f"this model is searched by the {self.hasher.distance} distance of its numbers, and has no "
                "binary codes; wrap it with output='logits' to encode their signs"
            )

    def search(
        self,
        index: CodeIndex,
        image: Item,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        modality: str = "image",
    ) -> list[dict[str, Any]]:
        """The k nearest items of one image or text: ``id``, ``distance`` in bits, ``payload``.

        Of a model with a ``radius`` also ``copy``, True within it, and ``plain_query``, True of a query that
        is plain, which has no copies; a warning says so too.
        """
        if modality == "image" and isinstance(image, str) and not os.path.exists(image) and self.texts:
            raise ValueError(f"{image!r} is no file; to search with a sentence, modality='text'")
        plain = False
        if self.radius is not None and modality == "image":
            image = as_input(one_image(image, self.side))
            plain = self.is_plain(image)
        if plain:
            logger.warning(PLAIN_QUERY)
        ranking = index.search(self.encode(image, modality=modality), k, where=where)
        ids = [item for item in ranking.ids[0].tolist() if item >= 0]
        rows = zip(ids, ranking.distances[0].tolist(), index.payload(ids), strict=False)
        return [
            {"id": item, "distance": distance, **self.copy_field(distance, plain), "payload": payload}
            for item, distance, payload in rows
        ]

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write weights (safetensors) and a card (JSON) to a folder, which ``load`` reads; no pickle.

        Args:
            overwrite: replace another model that was saved there.

        Raises:
            FileExistsError: the folder holds something else, or another model.
            ValueError: a wrapped net, or weights that changed since they were loaded.
        """
        save_exported(Path(directory), self.hasher, self.facts(), overwrite)

    def save_pretrained(
        self, directory: str | Path, about: HubCard | None = None, overwrite: bool = False
    ) -> None:
        """``Hasher.save_pretrained`` with the texts of the model and the digest that its codes carry."""
        save_folder(Path(directory), self.hasher, self.facts(), about, overwrite)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, token: str | None = None, device: str = "auto"
    ) -> SearchModel:
        """The model of a saved folder, or of the hub (``user/name``); see ``Hasher.from_pretrained``."""
        return load(fetched(source, revision, token), device)

    def facts(self) -> dict[str, Any]:
        """Fields of the card of a saved model: size, digest, texts, digests of the files of its run."""
        texts = None if self.texts is None else self.texts.plain()
        facts = {"image_size": [self.side] * 2 if self.side else [], "digest": self.origin, "texts": texts}
        return facts | ({"files": dict(self.files)} if self.files else {})

    def _images(self, batch: Sequence[Any], before: int) -> list[Tensor | Exception]:
        """(3, side, side) float in [0, 1] of each image, or its error; files are decoded in threads."""
        numbers = range(before, before + len(batch))
        if len(batch) > 1 and all(isinstance(image, str | Path) for image in batch):
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                return list(pool.map(self._pixels, batch, numbers))
        return list(map(self._pixels, batch, numbers))

    def _pixels(self, image: OneImage, place: int) -> Tensor | Exception:
        try:
            return as_input(one_image(image, self.side))
        except OSError as error:
            return error
        except ValueError as error:
            return ValueError(f"image {place}: {error}")

    def text_input(self, text: str) -> Tensor:
        """(V,) or (L,) of a text, as the hasher takes it.

        Raises:
            ValueError: a model without texts, or one that knows no word of the text.
        """
        if "text" not in self.hasher.modalities:
            raise ValueError("this model takes no texts")
        (row,) = self._texts([text], 0)
        if isinstance(row, Exception):
            raise row
        return row

    def _texts(self, batch: Sequence[Any], before: int) -> list[Tensor | Exception]:
        """(V,) or (L,) of each text, or its error."""
        if self.texts is None:
            raise ValueError("the texts of this model came as vectors, and how they are made is not known")
        for place, text in enumerate(batch, before):
            if not isinstance(text, str):
                raise ValueError(f"text {place} is a {type(text).__name__}")
        rows = as_input(self.texts.encode(batch))
        unknown = "the model knows none of its words"
        return [
            row if row.any() else ValueError(f"text {place}, {shortened(repr(text))}: {unknown}")
            for place, (row, text) in enumerate(zip(rows, batch, strict=True), before)
        ]


def load(source: str | Path, device: str | None = "auto") -> SearchModel:
    """Load a trained model to encode and search with.

    Args:
        source: the directory of a run; a folder that ``save`` or ``save_pretrained`` wrote; or the id of an
            entry of ``registry/``, whose weights are looked for among ``runs/`` or in its folder; or
            ``copy-hash``, the packaged hash for copies (a folder of that name as ``./copy-hash``, or as a
            ``Path``).
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda``, ...; None is that of the
            recipe of a run.

    Raises:
        RunError: none of these, damaged weights, or an entry whose weights are not there.
        ValueError: a model that hashes neither images of pixels nor texts.
    """
    place = _place(source)
    if isinstance(place, Run):
        return _of_run(place, choose_device(place.config.runtime.device if device is None else device))
    hasher, card = load_exported(place)
    texts = card["texts"] and text_form(card["texts"])
    hasher = hasher.to(choose_device("auto" if device is None else device))
    return SearchModel(hasher, _side(card), card["digest"], lambda: texts, card.get("files", {}))


def run_of(source: str | Path) -> Run | None:
    """The run that a source of ``load`` is, or that has the weights of its registry entry; None of a saved
    or packaged model.

    Raises:
        RunError: none of these.
    """
    place = _place(source)
    return place if isinstance(place, Run) else None


def _place(source: str | Path) -> Run | Path:
    """The run, or the folder of a saved or packaged model."""
    if not isinstance(source, str | Path):
        raise RunError(f"a model is loaded from a folder or by the id of an entry, got {source!r}")
    folder = Path(source)
    if source == _COPY_HASH:
        return packaged(_COPY_HASH)
    if not folder.is_dir():
        entry = entry_named(str(source))
        if isinstance(entry, RegistryEntry):
            return run_of_entry(entry)
        folder = folder_of_entry(entry)
    if (folder / "config.yaml").is_file():
        return load_run(folder)
    if names_in(folder) is None:
        none = f"no {PLAIN.card}"
        raise RunError(
            f"{folder} is not a run directory (it has no config.yaml), nor an exported model ({none})"
        )
    return folder


def located(source: str | Path) -> str:
    """A source of ``load`` that means the same from another working folder: an absolute path, or the name of
    the packaged model; raises as ``run_of``."""
    if source == _COPY_HASH:
        return _COPY_HASH
    place = _place(source)
    return str((place.path if isinstance(place, Run) else place).resolve())


def is_located(source: str) -> bool:
    """True where ``located`` gave this source and its model is still there."""
    folder = Path(source)
    is_model = (folder / "config.yaml").is_file() or names_in(folder) is not None
    return source == _COPY_HASH or (folder.is_absolute() and is_model)


def _of_run(run: Run, device: torch.device) -> SearchModel:
    card, hasher = run.card(), run.load_hasher()
    if not _side(card) and "text" not in hasher.modalities:
        modalities = ", ".join(hasher.modalities)
        raise ValueError(f"{run.path} hashes {modalities} of size {card['image_size']}, not pixels")
    size = card["image_size"]
    if len(size) == 2 and size[0] != size[1]:
        raise ValueError(f"{run.path} was trained on images of {size[0]} x {size[1]} pixels, not on squares")
    files = run.check_weights()
    return SearchModel(hasher.to(device), _side(card), card["digest"], partial(_texts_of, run), files)


def _side(card: Mapping[str, Any]) -> int:
    """Pixels a side; 0 of vectors of features."""
    return int(card["image_size"][0]) if len(card["image_size"]) == 2 else 0


def _texts_of(run: Run) -> TextForm | None:
    """The form of a run's texts: its own file, or that of its data where it was trained without one."""
    path = run.path / TEXTS
    if not path.is_file():
        return read_data(run.config).text_form
    with reading(path, "delete it to have it made of the data again"):
        return text_form(read_json(path))


def _progress(stack: ExitStack, silenced: bool) -> Progress:
    if silenced:
        return silent
    from robusthash.apps.commands.terminal import progress_bars  # rich, which one batch has no use for

    return stack.enter_context(progress_bars())


def _batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch
