"""The owner of a directory: one process at a time works there, and a second one is refused with its name."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robusthash.core.atomic_files import is_alive, remove_leftovers

LOCK = "owner.lock"

_depths: dict[tuple[str, int], int] = {}
"""How often a thread of this process owns a directory: work may be made of parts that own it too."""


class InUse(ValueError):
    """A directory in which another process works."""


@contextlib.contextmanager
def owned(folder: str | Path, work: str, lock: str = LOCK) -> Iterator[None]:
    """Own ``folder``, which is made, inside of the block; its file ``lock`` says by whom and since when.

    The system lets go of the lock of a process that ends, however it ends. What such a process left half
    written is removed by the next owner. Inside of its own block, a thread may take the lock again.

    Args:
        work: what is done there, for others that ask.

    Raises:
        InUse: another process or thread owns it; of another host, unless the file is removed by hand.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / lock
    key = str(path.resolve()), threading.get_ident()
    if key in _depths:
        _depths[key] += 1
        try:
            yield
        finally:
            _depths[key] -= 1
        return
    handle = _take(path, work)
    _depths[key] = 1
    try:
        yield
    finally:
        del _depths[key]
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path, work: str) -> int:
    """The open handle of the lock, with this process as its owner."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _locked(handle)
            owner = _owner(handle)
            if locked is False or (owner and not _ended(owner, path.parent, certain=bool(locked))):
                raise InUse(_held(path, owner))
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the owner before removed the file meanwhile
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"), "work": work}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(facts) + "\n").encode(), 0)
    return handle


def _locked(handle: int) -> bool | None:
    """True where the system gave the lock, False where another has it, None on a disk that knows none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(handle: int) -> dict[str, Any]:
    try:
        facts = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # empty, or killed while it was written
        return {}
    return facts if isinstance(facts, dict) else {}


def _ended(owner: dict[str, Any], folder: Path, certain: bool) -> bool:
    """True where the last owner is gone, and then what it left half written is removed."""
    process = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    if not certain and is_alive(process):
        return False
    if process != os.getpid():
        remove_leftovers(folder, process)
    return True


def _held(path: Path, owner: dict[str, Any]) -> str:
    if not owner:
        return f"{path.parent} is in use by another process, which has just begun; wait for it"
    who = (
        f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('work')}, since {owner.get('since')})"
    )
    if owner.get("host") == socket.gethostname():
        return f"{path.parent} is in use by {who}; wait for it, or end it"
    return f"{path.parent} is in use by {who}; wait for it, or where that has ended delete {path}"
