"""Processes that decode images ahead of use: started when first needed, and again where one dies."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_CHUNK = 256  # items done ahead; bounds the memory of one pass

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FileReading:
    """The way in which image files are read; pixels do not depend on it.

    Args:
        workers: processes that decode; 0 takes threads of this one.
        cache: bytes that decoded images may take; None leaves that to the ``memory`` of a data set.
    """

    workers: int = 0
    cache: int | None = None


READING: ContextVar[FileReading] = ContextVar("reading")
"""The way in which data sets that are made now read their images, for as long as they last."""


@contextlib.contextmanager
def read_by(workers: int = 0, cache_gib: float | None = None) -> Iterator[None]:
    """Data sets that are made inside of the block decode their images by these processes.

    Args:
        workers: processes; 0 decodes in threads. A script of your own that takes some keeps its calls
            below ``if __name__ == "__main__":``, since each process imports it.
        cache_gib: GiB of decoded uint8 pixels that are kept; the images beyond are decoded for each batch.
            By default as the data set says (``memory``).
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if cache_gib is not None and not 0 <= cache_gib < float("inf"):
        raise ValueError(f"cache_gib must be at least 0 and finite, got {cache_gib!r}")
    token = READING.set(FileReading(workers, None if cache_gib is None else int(cache_gib * 2**30)))
    try:
        yield
    finally:
        READING.reset(token)


class DecodingProcesses:
    """A fixed number of processes for one kind of work; they end with this one, however it ends."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``work`` of each item, in order; where a process dies, the items are done once more.

        Raises:
            ChildProcessError: a process died at the second try too.
        """
        each = max(1, len(items) // (2 * self._count))
        for last in (False, True):
            pool = self._running()
            try:
                return list(pool.map(work, items, chunksize=each))
            except BrokenProcessPool:
                self._forget(pool)
                if last:
                    break
                logger.warning("a process that decodes images was killed or died; others take its place")
        raise ChildProcessError(
            f"processes that decode images die (killed, or out of memory) at {items[0]} and the "
            f"{len(items) - 1} files after it; take fewer (runtime.workers, now {self._count}), or 0 to "
            'decode in threads; a script of your own needs `if __name__ == "__main__":` around its calls'
        )

    def _running(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # not forked from this process, whose threads and devices a child could not use
                method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
                context = multiprocessing.get_context(method)
                if method == "forkserver":
                    context.set_forkserver_preload(["robusthash.data.image_files"])
                self._pool = ProcessPoolExecutor(self._count, context, _begin)
            return self._pool

    def _forget(self, pool: Any) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.shutdown(wait=False, cancel_futures=True)


def done_in_order(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int, processes: int
) -> Iterator[Result]:
    """``work`` of each item in processes, or where there are none in threads; some hundred items ahead."""
    chunks = (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))
    if processes:
        for chunk in chunks:
            yield from decoding_processes(processes).map(work, chunk)
        return
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for chunk in chunks:
            yield from pool.map(work, chunk)


@functools.cache
def decoding_processes(count: int) -> DecodingProcesses:
    """The ``count`` processes of this program that decode images."""
    return DecodingProcesses(count)


def _begin() -> None:
    """Leave Ctrl-C to the parent, and end with it: a pool alone would outlive a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
