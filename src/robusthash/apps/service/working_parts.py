"""The parts of a running service that its routes use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from robusthash.apps.service.batching import Batcher
from robusthash.apps.service.guard import Metrics
from robusthash.apps.service.idempotency import AnsweredWrites
from robusthash.apps.service.query_guards import QueryGuards
from robusthash.apps.service.search_service import SearchService
from robusthash.apps.service.tokens import AcceptedTokens

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
