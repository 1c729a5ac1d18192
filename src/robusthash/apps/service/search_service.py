"""The search behind the service: a model, an index, and what an answer shows of them."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment.search_model import SearchModel, load
from robusthash.apps.service.settings import ServiceSettings
from robusthash.core.hamming import pack
from robusthash.core.limited_files import read_yaml
from robusthash.core.runtime import Draws
from robusthash.core.types import Codes
from robusthash.data.base import as_input
from robusthash.data.image_files import BROKEN, opened, read_image
from robusthash.index import CodeIndex, open_index
from robusthash.models.encoding import encode_signs

_MAGIC = {"JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG\r\n\x1a\n",), "WEBP": (b"RIFF",)}
_MEDIA_TYPES = {name: f"image/{name.lower()}" for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")}
_MEDIA_TYPES["MPO"] = "image/jpeg"
_TRIES = 5
_PATHS = ("path", "path_hex")  # payload of files on the server's disk
OWN_FILE = "answers make file of the path, and neither is filtered by: use a field of the payload"


class RefusedFormat(ValueError):
    """An upload of a format that the service does not take."""


class NoItem(KeyError):
    """An id that the index does not hold; with another reason, one of which the service has no image."""


def id_fields(number: int) -> dict[str, Any]:
    """An id as a number and as text, for readers whose numbers end at 2^53."""
    return {"id": number, "id_text": str(number)}


def _public_key(key: str | None, payload: Mapping[str, Any]) -> dict[str, str]:
    """The key that a client gave; nothing of a file of the operator, whose key is its path."""
    if key is None or any(name in payload for name in _PATHS) or Path(key).is_absolute():
        return {}
    return {"key": key}


@dataclass(frozen=True)
class ServedItem:
    """An item to add: its packed code, key and payload, and the digest of the request that brought it."""

    code: Tensor
    key: str
    payload: Mapping[str, Any]
    stamp: str = ""


class SearchService:
    """A hasher and an index, and the settings of answers; methods may be called from several threads.

    Args:
        run: a model, as ``load`` takes it.
        index: address of the index, as ``open_index`` takes it.
        images: folder below which images of items may be shown; None shows none.
        device: as in ``load``.
    """

    def __init__(
        self,
        run: str | Path,
        index: str,
        settings: ServiceSettings = ServiceSettings(),
        images: Path | None = None,
        device: str = "auto",
    ) -> None:
        self.settings = settings
        self.model: SearchModel = load(run, device)
        self.address = index
        self.name = self._name(run)
        self.images = None if images is None else images.resolve()
        self._database = self.model.hasher.for_database()
        self._lock, self._reloading = threading.Lock(), threading.Lock()
        self._index = self._open()
        self._users: dict[int, int] = {}  # by the id of an index object: searches that go on in it

    @staticmethod
    def _name(run: str | Path) -> str:
        """The name of a run's recipe, or of an exported model's folder."""
        config = Path(run) / "config.yaml"
        return str(read_yaml(config).get("name", "")) if config.is_file() else Path(run).name

    def _open(self) -> CodeIndex:
        index = open_index(self.address, self.model.bits, create=False)
        if index.origin not in ("", self.model.origin):
            origin, place = index.origin, index.address
            index.close()
            raise ValueError(f"the index {place} holds codes of another model ({origin}); serve its own run")
        return index

    def reload(self) -> int:
        """Open the index at the address again and switch to it; requests under way end in the old one.

        Returns:
            The number of items of the new one.

        Raises:
            OSError, ValueError: there is none, or it is damaged; the old one stays in use.
        """
        with self._reloading:
            new = self._open()
            count = new.count()  # before another can take its place and close it
            with self._lock:
                old, self._index = self._index, new
                idle = not self._users.get(id(old))
            if idle:
                old.close()
        return count

    @contextmanager
    def index(self) -> Iterator[CodeIndex]:
        """The index in use, which stays open as long as it is held."""
        with self._lock:
            index = self._index
            self._users[id(index)] = self._users.get(id(index), 0) + 1
        try:
            yield index
        finally:
            with self._lock:
                self._users[id(index)] -= 1
                last = not self._users[id(index)] and index is not self._index
                if not self._users[id(index)]:
                    del self._users[id(index)]
            if last:
                index.close()

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def decode(self, content: bytes) -> Tensor:
        """An uploaded file -> (3, S, S) float in [0, 1], as the hasher takes it.

        Raises:
            RefusedFormat: a format that the service does not take.
            ImageTooLarge, UnreadableImage: as in ``read_image``.
        """
        if not self.model.side:
            raise ValueError("this model takes no images")
        accepted = self.settings.formats
        if not any(content.startswith(magic) for name in accepted for magic in _MAGIC[name]):
            raise RefusedFormat(f"the image is no {', '.join(accepted)}")
        stream = io.BytesIO(content)
        stream.name = "the image"
        return as_input(read_image(stream, self.model.side, max_pixels=self.settings.max_pixels))

    def encode(self, modality: str, items: Sequence[Tensor], database: bool = False) -> list[Tensor]:
        """Packed codes of inputs, one by one; queries pass the run's purifier where it has one."""
        hasher = self._database if database else self.model.hasher
        return list(pack(encode_signs(hasher, modality, torch.stack(list(items)))))

    def text(self, text: str) -> Tensor:
        """A text as the hasher takes it.

        Raises:
            ValueError: a model without texts, or one that knows no word of the text.
        """
        return self.model.text_input(text)

    def search(
        self,
        code: Tensor,
        k: int,
        where: Mapping[str, Any] | None,
        fields: Sequence[str] | None,
        plain: bool = False,
    ) -> list[dict[str, Any]]:
        """The nearest items of a packed code, with the fields of their payload that may be shown.

        Of a model that finds copies each says whether it is a copy of the query; none is of a ``plain`` one.

        Raises:
            ValueError: a filter by a key that no item has, or by paths of the server's disk.
        """
        if hidden := set(where or ()) & set(_PATHS):
            raise ValueError(f"where: items are not filtered by {', '.join(sorted(hidden))}; {OWN_FILE}")
        with self.index() as index:
            rows = self._rows(index, self._codes(code[None]), k, where)
            keys = index.keys_of([item for item, _, _ in rows])
        if self.settings.answer == "coarse":  # the order within a step would tell what the step hides
            rows.sort(key=lambda row: (row[1] // self.settings.step, row[0]))
        return [
            {
                **id_fields(item),
                **_public_key(keys.get(item), payload),
                **self._distance(distance, plain),
                "payload": self.public_payload(payload, fields),
            }
            for item, distance, payload in rows
        ]

    @staticmethod
    def _rows(
        index: CodeIndex, query: Codes, k: int, where: Mapping[str, Any] | None
    ) -> list[tuple[int, int, dict[str, Any]]]:
        """Id, distance and payload of the nearest; searched again where one was removed before its payload
        was read."""
        for tries in range(_TRIES):
            ranking = index.search(query, k, where)
            ids = [item for item in ranking.ids[0].tolist() if item >= 0]
            try:
                payloads = index.payload(ids)
            except KeyError:
                if tries + 1 < _TRIES:
                    continue
                raise ConnectionError("items are removed faster than they can be read") from None
            return list(zip(ids, ranking.distances[0].tolist(), payloads, strict=False))
        raise AssertionError("the last try returns or raises")

    def add(self, items: Sequence[ServedItem]) -> list[dict[str, Any]]:
        """Add items, or replace those of the same keys; returns when the write survives a kill."""
        codes = torch.stack([item.code for item in items])
        with self.index() as index:
            added = index.add(
                self._codes(codes),
                [item.payload for item in items],
                keys=[item.key for item in items],
                stamps=[item.stamp for item in items],
            )
        rows = zip(items, added.ids.tolist(), added.held.tolist(), strict=True)
        return [{**id_fields(one), "key": item.key, "replaced": held} for item, one, held in rows]

    def held(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """As ``CodeIndex.held``."""
        with self.index() as index:
            return index.held(keys)

    def remove(self, ids: Sequence[int] | None = None, keys: Sequence[str] | None = None) -> int:
        """Remove items and return how many there were."""
        with self.index() as index:
            return index.remove(None if ids is None else list(ids), keys=keys)

    def item(self, number: int, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """One item by its id.

        Raises:
            NoItem: there is none.
        """
        payload = self._payload(number)
        with self.index() as index:
            key = index.keys_of([number]).get(number)
        public = self.public_payload(payload, fields)
        return {**id_fields(number), **_public_key(key, payload), "payload": public}

    def samples(self, count: int = 12) -> list[dict[str, Any]]:
        """Some items, the nearest to each of ``count`` fixed codes; none unless images are shown."""
        if self.images is None:
            return []
        signs = Draws(0).within("samples").uniform(torch.arange(count), (self.model.bits,)) - 0.5
        with self.index() as index:
            nearest = index.search(self._codes(pack(signs)), 1).ids.flatten().tolist()
        return [self.item(number) for number in dict.fromkeys(nearest) if number >= 0]

    def picture(self, number: int) -> Path:
        """The file of an item's image, below the folder of images.

        Raises:
            NoItem: no such item, or no image of it that may be shown.
        """
        path = Path(self._payload(number).get("path", ""))
        if self.images is None or not path.is_absolute():
            raise NoItem(number, f"item {number} has no image here")
        path = path.resolve()
        if not path.is_relative_to(self.images):
            raise NoItem(number, f"item {number}: its image is not below --images")
        if not path.is_file():
            raise NoItem(number, f"item {number}: its image is gone")
        return path

    def typed_picture(self, number: int) -> tuple[Path, str | None]:
        """As ``picture``, with the media type of the file's content; None where no browser shows such."""
        path = self.picture(number)
        try:
            with path.open("rb") as stream, opened(stream, self.settings.max_pixels) as image:
                return path, _MEDIA_TYPES.get(image.format or "")
        except BROKEN:
            return path, None

    def info(self) -> dict[str, Any]:
        """Facts on the model and the index that a client may know."""
        with self.index() as index:
            count = index.count()
        limits = {**self.settings.public(), "samples": self.images is not None}
        modalities = list(self.model.hasher.modalities)
        sizes: dict[str, Any] = {
            "bits": self.model.bits,
            "image_size": self.model.side,
            "modalities": modalities,
        }
        purified = "image" in self.model.hasher.spec.get("purifiers", {})
        sizes |= {} if self.model.radius is None else {"copy_radius": self.model.radius}
        return {**sizes, "items": count, "origin": self.model.origin, "purified": purified, "limits": limits}

    def public_payload(self, payload: Mapping[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
        """The payload without paths of the server's disk, cut to ``fields``."""
        rest = {name: value for name, value in payload.items() if name not in _PATHS}
        path = payload.get("path")
        if isinstance(path, str):
            inside = self.images is not None and Path(path).is_relative_to(self.images)
            if self.settings.show_paths and inside and self.images is not None:
                rest["file"] = str(Path(path).relative_to(self.images))
            else:
                rest.setdefault("file", Path(path).name)
        return rest if fields is None else {name: rest[name] for name in fields if name in rest}

    def _payload(self, number: int) -> dict[str, Any]:
        with self.index() as index:
            try:
                return index.payload([number])[0]
            except KeyError:
                raise NoItem(number) from None

    def _codes(self, packed: Tensor) -> Codes:
        return Codes(packed, self.model.bits, torch.arange(len(packed)), self.model.origin)

    def _distance(self, distance: int, plain: bool) -> dict[str, Any]:
        if self.settings.answer == "ids":
            return {}
        step = self.settings.step if self.settings.answer == "coarse" else 1
        return {"distance": distance // step * step, **self.model.copy_field(distance, plain)}
