"""Batching of encodes across requests: bounded wait and queue, the forward pass outside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(RuntimeError):
    """The queue is full; ``retry_after`` is the seconds after which there should be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the service is at its limit")
        self.retry_after = retry_after


class Batcher(Generic[Item, Result]):
    """Runs ``work`` on the items of several requests together, in one thread.

    Args:
        work: items -> as many results, called in the thread.
        most: items of one call.
        wait: seconds that the first item of a call waits for others.
        queue: items that wait; where it is full, ``admit`` raises ``Overloaded``.
        max_wait: seconds that an item may be expected to wait; beyond, ``admit`` raises it too.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        most: int,
        wait: float,
        queue: int,
        max_wait: float,
    ) -> None:
        self._work, self._most, self._wait, self._max_wait = work, most, wait, max_wait
        self._queue: asyncio.Queue[tuple[Item, asyncio.Future[Result]]] = asyncio.Queue(queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hasher")
        self._task: asyncio.Task[None] | None = None
        self._seconds = 0.0  # of one item, as a moving mean
        self._running = 0  # items of the call that goes on
        self._coming = 0  # items that are being read, and will be submitted
        self._admitted = 0  # requests under way, of which some have submitted nothing yet

    def start(self) -> None:
        """Begin to take items; needs a running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Finish what is queued, then end."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce an item: only while there are such does a call wait for more."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    @property
    def waiting(self) -> int:
        """Number of items in the queue."""
        return self._queue.qsize()

    def admit(self) -> None:
        """Raise ``Overloaded`` where one more item would find the queue full or wait too long."""
        ahead = max(self._admitted, self._queue.qsize() + self._coming + self._running)
        expected = ahead * self._seconds
        if self._queue.full() or expected > self._max_wait:
            raise Overloaded(max(1.0, expected))

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request from when its body is there until it is answered: of many that come at once, before
        any is decoded, no more are admitted than can be answered in time."""
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave out an admitted request for a while in which it needs no encoding."""
        self._admitted -= 1
        try:
            yield
        finally:
            self._admitted += 1

    async def submit(self, item: Item) -> Result:
        """The result of one item, which waits where the queue is full: ask ``admit`` before."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        await self._queue.put((item, done))
        return await done

    async def _run(self) -> None:
        while True:
            entries = await self._gather()
            entries = [entry for entry in entries if not self._left(entry)]
            if entries:
                await self._call(entries)

    async def _gather(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """The next items: those that wait already, and those that come within the wait."""
        loop = asyncio.get_running_loop()
        entries = [await self._queue.get()]
        end = loop.time() + self._wait
        while len(entries) < self._most:
            if not self._queue.empty():
                entries.append(self._queue.get_nowait())
                continue
            if not self._coming:
                break
            try:
                entries.append(await asyncio.wait_for(self._queue.get(), end - loop.time()))
            except TimeoutError:
                break
        return entries

    def _left(self, entry: tuple[Item, asyncio.Future[Result]]) -> bool:
        """True for an item whose client is gone, which is not encoded."""
        if gone := entry[1].cancelled():
            self._queue.task_done()
        return gone

    async def _call(self, entries: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        loop = asyncio.get_running_loop()
        started, self._running = loop.time(), len(entries)
        try:
            results = await loop.run_in_executor(self._thread, self._work, [item for item, _ in entries])
        except Exception as error:
            for _, done in entries:
                if not done.cancelled():
                    done.set_exception(error)
        else:
            for (_, done), result in zip(entries, results, strict=True):
                if not done.cancelled():
                    done.set_result(result)
        finally:
            for _ in entries:
                self._queue.task_done()
            self._running = 0
            self._seconds += 0.2 * ((loop.time() - started) / len(entries) - self._seconds)
