"""Processes of ``torchrun``: who they are, how they wait for each other, how they notice a dead one."""

from __future__ import annotations

import _thread
import contextlib
import datetime
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from robusthash.core.directory_lock import LOCK, owned

_LOST = re.compile(r"gloo|NCCL|connection|timed out|recv|pipe", re.IGNORECASE)
"""Errors of the exchange between processes."""

TIMEOUT = datetime.timedelta(seconds=60)
"""Longest exchange with another process, after which it is taken for dead."""

SILENCE = 30.0
"""Seconds without a sign of life, after which another process is taken for dead while this one works."""

_BEAT, _POLL = 2.0, 0.02  # seconds between two signs of life, and between two looks for those that arrive

_joined: list[bool] = []  # an entry for each time that this process has joined others
_watches: list[_SignsOfLife] = []  # that of the block which the processes are in


def rank() -> int:
    """The number of this process; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started_together() -> bool:
    """True where ``torchrun`` started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """True in all processes of ``torchrun`` but the first, which speaks for them."""
    return started_together() and int(os.environ.get("RANK", "0")) > 0


def another_says(error: Exception) -> bool:
    """True where the first process of this machine says the same: of the config, or before they join."""
    same = not _joined or type(error).__name__ == "ConfigError"
    return same and follows() and int(os.environ.get("LOCAL_RANK", "0")) > 0


def join_processes() -> None:
    """Join the processes that ``torchrun`` started; nothing where it did not."""
    if started_together() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        _joined.append(True)


def wait_for_others() -> None:
    """Wait until all processes have come here, as long as they live.

    Raises:
        ConnectionError: another of them is gone.
    """
    if _watches:
        _watches[-1].wait()
    elif world() > 1:
        dist.barrier()


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """The processes of ``torchrun`` work together inside the block; nothing without it.

    Raises:
        ConnectionError: another of them is gone, or does not answer any more.
    """
    if dist.is_initialized() or not started_together():
        yield
        return
    well = False
    try:
        join_processes()
        _watches.append(_SignsOfLife())
        with _watches[-1].ending_with_the_others():
            yield
            _watches[-1].leave()
            well = True
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = "timed out" if "timed out" in str(error).lower() else "connection closed"
        raise ConnectionError(_gone(reason)) from error
    finally:
        if _watches:
            _watches.pop().end(well)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def owned_together(folder: str | Path, work: str, lock: str = LOCK) -> Iterator[None]:
    """``owned`` by the first of the processes of ``torchrun`` for all, which are joined inside the block."""
    with joined_processes(), owned(folder, work, lock) if rank() == 0 else contextlib.nullcontext():
        wait_for_others()
        yield


def _gone(reason: str) -> str:
    return (
        f"another process of this work is gone ({reason}); its own message says why. Started again, the work "
        "goes on from the last checkpoint and the finished blocks"
    )


class _SignsOfLife:
    """Signs of life of all processes, in the store by which they met.

    A process that computes for minutes without an exchange notices so, within a minute, that another died.
    """

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), len(_joined)
        self._store = dist.PrefixStore("robusthash/{}/{}".format(*again), store)
        self._others = [number for number in range(world()) if number != rank()]
        self._lost = ""  # the reason why another is taken for dead
        self._waits = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def ending_with_the_others(self) -> Iterator[None]:
        """Inside of the block, the death of another raises a ConnectionError in the main thread.

        So does SIGTERM, by which ``torchrun`` ends all processes where one has failed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(signum: int, frame: Any) -> None:
            raise ConnectionError(_gone(self._lost or "torchrun ends them all"))

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def wait(self) -> None:
        """Wait until all are here, without a limit as long as they live."""
        self._waits += 1
        self._until(f"wait/{self._waits}")

    def leave(self) -> None:
        """Say that this process is done; the first, in which the store may live, waits for the others."""
        self._store.add(f"left/{rank()}", 1)
        if rank() == 0:
            self._until("done")
        else:
            self._ended.set()
            self._thread.join()
            self._store.add("done", 1)

    def end(self, well: bool) -> None:
        """End the signs of life; without ``well``, the others end too."""
        self._ended.set()
        self._thread.join()
        if not well:
            with contextlib.suppress(RuntimeError):
                self._store.add("failed", 1)

    def _until(self, key: str) -> None:
        """Until all processes have added to a key."""
        arrived = self._store.add(key, 1)
        while arrived < world():
            if self._lost:
                raise ConnectionError(_gone(self._lost))
            time.sleep(_POLL)
            arrived = self._store.add(key, 0)

    def _watch(self) -> None:
        last_signs = {other: (-1, time.monotonic()) for other in self._others}
        while not self._lost and not self._ended.wait(_BEAT):
            try:
                self._store.add(f"life/{rank()}", 1)
                self._lost = "it failed" if self._store.add("failed", 0) else ""
                for other, (count, since) in last_signs.items():
                    now = self._store.add(f"life/{other}", 0)
                    if now != count:
                        last_signs[other] = now, time.monotonic()
                    elif time.monotonic() - since > SILENCE and not self._store.add(f"left/{other}", 0):
                        self._lost = f"no sign of life for {SILENCE:.0f} seconds"
            except RuntimeError:
                self._lost = "connection closed"
        if self._lost and not self._ended.is_set():
            _thread.interrupt_main(signal.SIGTERM)
