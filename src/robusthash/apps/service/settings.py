"""Settings of the search service, with defaults that are safe on an open network."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Answer = Literal["ids", "coarse", "distances", "codes"]
"""Details of an answer: ids alone, distances in steps, exact distances, or the packed codes too."""


class ServiceSettings(BaseModel):
    """Settings of the search service.

    Attributes:
        host, port: address to listen on; another host than loopback needs tokens.
        max_bytes: of one request's body.
        max_pixels: width times height of one image, refused before it is decoded.
        formats: image formats that are accepted, by content.
        max_k: results of one search.
        max_items: images of one write.
        queue: requests that wait for the hasher; one more is answered 503.
        max_wait: milliseconds that a request may be expected to wait there; beyond, it is answered 503.
        buffer: bytes of all bodies that are held at once; beyond, requests are answered 503.
        batch, batch_wait: images encoded together, and the milliseconds that the first of them waits.
        timeout: seconds that a client may take to send its request.
        rate, burst: requests a second of one client, and how many it may save up; a rate of 0 sets no limit.
        connections: open at once; one more ends the one that waits longest for a request, or is refused.
        readers: threads that decode images and search.
        answer: details of an answer, see ``Answer``.
        step: of distances under ``coarse``, in bits.
        detection: count near duplicates among recent query images, and slow and refuse those that have many.
        near_own, near_everyone: different near duplicates of an image that one client, or all, may send.
        near_seconds, near_memory: how long, and how many, query images are remembered.
        near_delay: seconds by which an answer is slowed from half of these numbers on.
        agreement: bits by which codes of a query saved as JPEG, or cut by 5 %, may differ from its own; None
            does not look. It triples the encodes of image queries.
        attacks: let the page compute an attack on a query here.
        show_paths: name the files of items by their paths below the folder of images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8765, ge=0, le=65535)
    max_bytes: int = Field(10 << 20, ge=1 << 10)
    max_pixels: int = Field(25_000_000, ge=1)
    formats: tuple[Literal["JPEG", "PNG", "WEBP"], ...] = ("JPEG", "PNG", "WEBP")
    max_k: int = Field(100, ge=1, le=10_000)
    max_items: int = Field(32, ge=1, le=1_000)
    queue: int = Field(64, ge=1, le=10_000)
    max_wait: float = Field(25.0, gt=0)
    buffer: int = Field(256 << 20, ge=1 << 20)
    batch: int = Field(16, ge=1, le=1_024)
    batch_wait: float = Field(2.0, ge=0, le=1_000)
    timeout: float = Field(10.0, gt=0, le=3_600)
    rate: float = Field(50.0, ge=0)
    burst: int = Field(100, ge=1)
    connections: int = Field(1_000, ge=1, le=100_000)
    readers: int = Field(2, ge=1, le=64)
    answer: Answer = "distances"
    step: int = Field(4, ge=1)
    detection: bool = True
    near_own: int = Field(20, ge=1)
    near_everyone: int = Field(60, ge=1)
    near_seconds: float = Field(3_600.0, gt=0, le=86_400)
    near_memory: int = Field(20_000, ge=1, le=1_000_000)
    near_delay: float = Field(0.5, ge=0, le=10)
    agreement: int | None = Field(None, ge=0)
    attacks: bool = False
    show_paths: bool = False

    def public(self) -> dict[str, Any]:
        """The limits that a client may know."""
        names = ("max_bytes", "max_pixels", "formats", "max_k", "max_items", "answer", "attacks")
        guards = ("detection", "agreement")
        return {name: getattr(self, name) for name in (*names, *guards)}

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can reach the service."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """True for a name or an address, without a port, that leads to this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
