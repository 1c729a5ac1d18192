"""The parts of a running service that its routes use, and the guards of image queries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from robusthash.apps.service.batching import Batcher
from robusthash.apps.service.guard import Metrics, Refused
from robusthash.apps.service.idempotency import AnsweredWrites
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.settings import ServiceSettings
from robusthash.apps.service.tokens import AcceptedTokens
from robusthash.core.hamming import distance
from robusthash.data.transforms import to_pixels
from robusthash.defenses.query_detection import CodeAgreement, DetectionLimits, QueryDetector


class QueryGuards:
    """Query detection and code agreement, each where the settings have it; safe in several threads."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._detector: QueryDetector | None = None
        if settings.detection:
            limits = DetectionLimits(
                own=settings.near_own,
                everyone=settings.near_everyone,
                seconds=settings.near_seconds,
                memory=settings.near_memory,
            )
            self._detector = QueryDetector(limits)

    def detect(self, image: Tensor, client: str) -> float:
        """Seconds by which the answer to (3, S, S) pixels in [0, 1] is slowed.

        Raises:
            Refused: 429, too many different queries that are nearly this one.
        """
        if self._detector is None:
            return 0.0
        detection = self._detector.see(to_pixels(image[None])[0], client, time.monotonic())
        if detection.verdict == "refuse":
            self._metrics.refused.labels("near duplicates").inc()
            message = "too many queries that are nearly this image; send others, or wait"
            raise Refused(429, message, detection.retry_after)
        if detection.verdict == "slow":
            self._metrics.slowed.inc()
            return self._settings.near_delay
        return 0.0

    def changed(self, image: Tensor) -> list[Tensor]:
        """Harmless changes of a query whose codes must agree with its own; none without agreement."""
        if self._settings.agreement is None:
            return []
        return [each[0] for each in CodeAgreement().changed(image[None])]

    def agree(self, code: Tensor, others: list[Tensor]) -> None:
        """Refuse a packed code that is farther from one of the others than the settings allow.

        Raises:
            Refused: 422.
        """
        most = self._settings.agreement
        if most is not None and any(int(distance(code[None], other[None])) > most for other in others):
            self._metrics.refused.labels("code agreement").inc()
            message = "the code of this image changes when it is saved as JPEG or cut a little at the edges; "
            raise Refused(422, message + "send the photograph as it was taken")


Value = TypeVar("Value")


@dataclass
class Working:
    """The parts of a running service that routes use."""

    service: SearchService
    queries: Batcher[tuple[str, Tensor], Tensor]
    threads: ThreadPoolExecutor
    metrics: Metrics
    guards: QueryGuards
    compared: tuple[SearchService, ...] = ()
    tokens: AcceptedTokens = field(default_factory=AcceptedTokens)
    ready: bool = False
    attacking: asyncio.Lock = field(default_factory=asyncio.Lock)
    writes: AnsweredWrites = field(default_factory=AnsweredWrites)

    async def run(self, call: Callable[[], Value]) -> Value:
        """A blocking call in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    async def code(self, modality: str, read: Callable[[], Tensor], database: bool = False) -> Tensor:
        """The packed code of one input of an admitted request, encoded with those of others."""
        with self.queries.coming():
            item = await self.run(read)
        return await self.queries.submit(("database" if database else modality, item))

    async def query_code(self, content: bytes, client: str, audits: bool) -> tuple[Tensor, bool]:
        """The packed code of an uploaded query image, where the guards let it pass (an audit passes), and
        whether the image is plain; see ``SearchModel.is_plain``."""

        def read() -> tuple[list[Tensor], float]:
            image = self.service.decode(content)
            if audits:
                return [image], 0.0
            slowed = self.guards.detect(image, client)
            return [image, *self.guards.changed(image)], slowed

        with self.queries.coming():
            images, slowed = await self.run(read)
        if slowed:
            with self.queries.away():
                await asyncio.sleep(slowed)
        code, *others = await asyncio.gather(*(self.queries.submit(("image", image)) for image in images))
        self.guards.agree(code, others)
        return code, self.service.model.is_plain(images[0])
