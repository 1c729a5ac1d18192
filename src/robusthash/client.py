"""A client of the search service (``robusthash serve``), which needs httpx and no torch.

Example:
    >>> from robusthash.client import Client  # doctest: +SKIP
    >>> with Client("http://localhost:8765", token="rh_...") as client:  # doctest: +SKIP
    ...     for hit in client.search("query.jpg", k=5):
    ...         print(hit.id, hit.distance, hit.payload)
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ImageInput = str | Path | bytes
"""A file, or its bytes."""


class ServiceError(RuntimeError):
    """An answer of the service that is an error; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True)
class SearchHit:
    """An item that was found.

    Attributes:
        distance: in bits; None where the service does not show it.
        key: that a client gave it; None of the operator's files, which ``payload["file"]`` names.
    """

    id: int
    distance: int | None
    payload: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None


class Client:
    """A connection to a search service; several threads may share it.

    Args:
        url: such as ``http://localhost:8765``.
        token: bearer token, where the service wants one.
        timeout: seconds of one request.
        attempts: of a request that the service is too busy for (503, 429); each waits as it is told.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, attempts: int = 4) -> None:
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

        Raises:
            ServiceError: the service refuses the request. httpx.HTTPError: it cannot be reached.
        """
        form: dict[str, Any] = {"k": str(k)}
        form |= {} if text is None else {"text": text}
        form |= {} if where is None else {"where": json.dumps(where)}
        form |= {} if fields is None else {"fields": ",".join(fields)}
        files = None if image is None else {"image": ("image", _content(image))}
        results = self._ask("POST", "/v1/search", data=form, files=files)["results"]
        return [SearchHit(one["id"], one.get("distance"), one["payload"], one.get("key")) for one in results]

    def add(
        self,
        images: Sequence[ImageInput],
        keys: Sequence[str] | None = None,
        payload: Sequence[Mapping[str, Any]] | None = None,
        idempotency_key: str | None = None,
    ) -> list[int]:
        """Add images and return their ids; when it returns, they are on the service's disk.

        Args:
            idempotency_key: a text of your own, up to 200 characters. After an error of the network or a
                crash, repeat the call with the same one: it adds nothing twice. By default each call has
                another.
        """
        described: list[dict[str, Any]] = [{} for _ in images]
        for name, values in (("key", keys), ("payload", payload)):
            if values is not None and len(values) != len(images):
                raise ValueError(f"{len(images)} images with {len(values)} of {name}")
            for one, value in zip(described, values or (), strict=False):
                one[name] = value
        files = [("image", ("image", _content(image))) for image in images]
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        form = {"items": json.dumps(described)}
        added = self._ask("POST", "/v1/items", data=form, files=files, headers=headers)["items"]
        return [one["id"] for one in added]

    def item(self, number: int) -> dict[str, Any]:
        """The payload of an item; ServiceError 404 where there is none."""
        payload: dict[str, Any] = self._ask("GET", f"/v1/items/{number}")["payload"]
        return payload

    def remove(self, ids: Sequence[int] | None = None, keys: Sequence[str] | None = None) -> int:
        """Remove items by ids or keys and return how many there were."""
        body = {"ids": list(ids)} if ids is not None else {"keys": list(keys or ())}
        return int(self._ask("DELETE", "/v1/items", json=body)["removed"])

    def info(self) -> dict[str, Any]:
        """Facts on the model, the index and the limits."""
        return dict(self._ask("GET", "/v1/info"))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, **parts: Any) -> dict[str, Any]:
        for attempt in range(1, self._attempts + 1):
            answer = self._http.request(method, path, **parts)
            if answer.status_code not in (429, 503) or attempt == self._attempts:
                break
            time.sleep(min(10.0, float(answer.headers.get("Retry-After", "1"))))
        if answer.is_success:
            return dict(answer.json())
        try:
            message = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        raise ServiceError(answer.status_code, str(message))


def _content(image: ImageInput) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
