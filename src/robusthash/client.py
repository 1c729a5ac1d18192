"""A client of the search service (``robusthash serve``), which needs httpx and no torch.

Example:
    >>> from robusthash.client import Client  # doctest: +SKIP
    >>> with Client("http://localhost:8765", token="rh_...") as client:  # doctest: +SKIP
    ...     for hit in client.search("query.jpg", k=5):
    ...         print(hit.id, hit.distance, hit.payload)
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

ImageInput = str | Path | bytes
"""A file, or its bytes."""


_LONGEST_WAIT = 10.0  # seconds before a request is sent again
_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,198}[\x21-\x7e])?")
Made = TypeVar("Made")


class ServiceError(RuntimeError):
    """An answer that is an error, or none of this service.

    Attributes:
        status: the HTTP status.
        retry_after: seconds after which the service says that a request may be repeated, where it does.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class SearchHit:
    """An item that was found.

    Attributes:
        distance: in bits; None where the service does not show it.
        copy: whether it is a copy of the query; None where the model does not find copies, or the service
            does not show it.
        plain_query: whether the query is of one colour or one fine texture, so that nothing counts as its
            copy; None where the model does not find copies.
        key: that a client gave it; None of the operator's files, which ``payload["file"]`` names.
    """

    id: int
    distance: int | None
    payload: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    copy: bool | None = None
    plain_query: bool | None = None


class Client:
    """A connection to a search service; several threads may share it.

    Args:
        url: such as ``http://localhost:8765``.
        token: bearer token, where the service wants one.
        timeout: seconds of one request.
        attempts: of a request that the service is too busy for (503, 429); each waits as it asks, up to
            10 s: a longer wait is an error at once.

    Every method raises ``ServiceError`` where the service refuses, or something else answers in its place;
    ``httpx.HTTPError`` where it cannot be reached; ``ValueError`` of arguments that cannot be sent, and
    ``OSError`` of image files that cannot be read.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, attempts: int = 4) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("a token is printable ASCII, as 'robusthash token' shows it")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._attempts = attempts

    def search(
        self,
        image: ImageInput | None = None,
        *,
        text: str | None = None,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        fields: Sequence[str] | None = None,
    ) -> list[SearchHit]:
        """The ``k`` nearest items of an image or a text.

        Args:
            where: filter by payload; a list of values means any of them.
            fields: of the payload to return; all by default, none of an empty list.
        """
        form: dict[str, Any] = {"k": str(k)}
        form |= {} if text is None else {"text": text}
        form |= {} if where is None else {"where": json.dumps(where)}
        form |= {} if fields is None else {"fields": ",".join(fields)}
        files = None if image is None else {"image": ("image", _content(image))}

        def read(answer: Any) -> list[SearchHit]:
            return [
                SearchHit(
                    *(one["id"], one.get("distance"), one["payload"], one.get("key"), one.get("copy")),
                    plain_query=answer.get("plain"),
                )
                for one in answer["results"]
            ]

        return self._request("POST", "/v1/search", read, data=form, files=files)

    def add(
        self,
        images: Sequence[ImageInput],
        keys: Sequence[str] | None = None,
        payload: Sequence[Mapping[str, Any]] | None = None,
        idempotency_key: str | None = None,
    ) -> list[int]:
        """Add images and return their ids; when it returns, they are on the service's disk.

        Args:
            idempotency_key: a text of your own, 1 to 200 printable ASCII characters. After an error of the
                network or a crash, repeat the call with the same one: it adds nothing twice. By default each
                call has another.
        """
        described: list[dict[str, Any]] = [{} for _ in images]
        for name, values in (("key", keys), ("payload", payload)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{len(images)} images with {len(values)} of {name}")
            for one, value in zip(described, values or (), strict=False):
                one[name] = value
        files = [("image", ("image", _content(image))) for image in images]
        key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if not _KEY.fullmatch(key):
            rule = "1 to 200 printable ASCII characters, without spaces around them"
            raise ValueError(f"an idempotency key has {rule}; got {key!r}")
        form, headers = {"items": json.dumps(described)}, {"Idempotency-Key": key}

        def read(answer: Any) -> list[int]:
            return [one["id"] for one in answer["items"]]

        return self._request("POST", "/v1/items", read, data=form, files=files, headers=headers)

    def item(self, number: int) -> dict[str, Any]:
        """The payload of an item; ServiceError 404 where there is none."""
        return self._request("GET", f"/v1/items/{number}", lambda answer: dict(answer["payload"]))

    def remove(self, ids: Sequence[int] | None = None, keys: Sequence[str] | None = None) -> int:
        """Remove items by ids or keys and return how many there were."""
        if (ids is None) == (keys is None):
            raise ValueError("give ids or keys: one of them")
        body = {"ids": list(ids)} if ids is not None else {"keys": list(keys or ())}
        return self._request("DELETE", "/v1/items", lambda answer: int(answer["removed"]), json=body)

    def info(self) -> dict[str, Any]:
        """Facts on the model, the index and the limits."""
        return self._request("GET", "/v1/info", lambda answer: {**answer})

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, method: str, path: str, read: Callable[[Any], Made], **parts: Any) -> Made:
        """The result that ``read`` makes of the JSON of an answer."""
        for attempt in range(1, self._attempts + 1):
            answer = self._http.request(method, path, **parts)
            busy = answer.status_code in (429, 503)
            wait = _seconds(answer.headers.get("Retry-After"))
            if not busy or attempt == self._attempts or (wait or 0) > _LONGEST_WAIT:
                break
            time.sleep(1.0 if wait is None else wait)
        try:
            if answer.is_success:
                return read(answer.json())
            message = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if answer.is_success:
                message = f"no answer of this service: {answer.text[:200]!r}"
            else:
                message = answer.text[:200] or answer.reason_phrase
        if place := answer.headers.get("Location"):
            message += f"; it redirects to {place[:200]}: give the client the address where the service is"
        if busy and wait:
            message += f" (may be asked again in {wait:.0f} s)"
        raise ServiceError(answer.status_code, message, wait)


def _seconds(text: str | None) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date; None where it says neither."""
    if text is None or re.fullmatch("[0-9]{1,9}", text.strip()):
        return None if text is None else float(text)
    try:
        date = parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def _content(image: ImageInput) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
