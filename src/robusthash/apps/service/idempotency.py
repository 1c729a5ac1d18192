"""Idempotency keys: one key of one client belongs to one whole request."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from robusthash.apps.service.guard import Refused
from robusthash.apps.service.search_service import id_fields

_REMEMBERED = 16 << 20  # characters of answers


@dataclass(frozen=True)
class WriteRequest:
    """A write under an idempotency key.

    Attributes:
        name: digest of the client and its key.
        digest: of all images, keys and payloads of the request.
    """

    name: str
    digest: str

    @classmethod
    def of(
        cls, client: str, key: str, contents: Sequence[bytes], described: Sequence[Mapping[str, Any]]
    ) -> WriteRequest:
        """From the parts of a request."""
        images = [hashlib.sha256(content).hexdigest() for content in contents]
        return cls(_digest([client, key]), _digest([images, described]))

    @property
    def stamp(self) -> str:
        """The stamp of the items that it writes, from which it is known after a restart."""
        return self.name + self.digest

    def answer_from(self, keys: Sequence[str], held: Mapping[str, tuple[int, str]]) -> dict[str, Any] | None:
        """The answer where all items are there as this request wrote them; None where some are not.

        Args:
            keys: of the items of this request.
            held: id and stamp of those that the index holds.

        Raises:
            Refused: 409, another request wrote one of them under this idempotency key.
        """
        written = {key: item for key, (item, stamp) in held.items() if stamp == self.stamp}
        if any(stamp.startswith(self.name) and key not in written for key, (_, stamp) in held.items()):
            raise _another()
        if len(written) < len(keys):
            return None
        return {"items": [{**id_fields(written[key]), "key": key, "replaced": False} for key in keys]}


class AnsweredWrites:
    """The answers to writes under idempotency keys, of this process, the oldest forgotten first.

    For one event loop.
    """

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[str, str]] = OrderedDict()  # digest and JSON, by name
        self._size = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of those under way

    @asynccontextmanager
    async def alone(self, write: WriteRequest) -> AsyncIterator[None]:
        """Wait until no other request of the same client and key is under way."""
        lock = self._locks.setdefault(write.name, asyncio.Lock())
        async with lock:
            yield

    def answer(self, write: WriteRequest) -> dict[str, Any] | None:
        """The answer that the request got before; None for a new key.

        Raises:
            Refused: 409, another request had this key.
        """
        digest, text = self._answers.get(write.name, (write.digest, "null"))
        if digest != write.digest:
            raise _another()
        answer: dict[str, Any] | None = json.loads(text)
        return answer

    def keep(self, write: WriteRequest, answer: Mapping[str, Any]) -> None:
        """Remember an answer."""
        self._answers[write.name] = write.digest, (text := json.dumps(answer))
        self._size += len(text)
        while self._size > _REMEMBERED:
            self._size -= len(self._answers.popitem(last=False)[1][1])


def _another() -> Refused:
    return Refused(409, "this Idempotency-Key belongs to another request")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
