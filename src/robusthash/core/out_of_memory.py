"""Batches that fit into memory: what does not fit is repeated in smaller batches, with a message."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
Say = Callable[[str], None]

REMEDY = "free some memory, take a smaller model or input, or compute elsewhere (runtime.device: cpu)"


class SmallerBatch(RuntimeWarning):
    """A smaller batch than asked for; numbers of a deterministic model change by float rounding at most."""


class DoesNotFit(MemoryError):
    """A single item does not fit into memory; the message holds the remedy."""


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out: torch has three kinds, NumPy and Python a fourth."""
    import torch  # seconds to import, and the command line reports errors without it

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def halving(work: Callable[[int], Result], size: int, items: str, done: str, say: Say) -> tuple[Result, int]:
    """Run ``work(size)``, and while memory runs out again at the largest proper divisor of the size.

    Divisors, so that whole batches of the smaller size fill one of the larger.

    Args:
        work: does everything, ``size`` items at a time, and leaves nothing behind when it raises.
        items, done: nouns and participle of the message: "queries", "attacked".
        say: receives a message at each step down.

    Returns:
        The result, and the size at which it fitted.

    Raises:
        DoesNotFit: one item at a time does not fit either.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, DoesNotFit) or not out_of_memory(error):
                raise
            if size == 1:
                message = f"memory is not enough for {items} to be {done} one at a time; {REMEDY}"
                raise DoesNotFit(message) from error
        # outside of the handler, whose error keeps the memory of the failed run alive
        smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
        say(f"{size} {items} at a time did not fit into memory; {smaller} were {done} at a time")
        size = smaller


def warn(text: str) -> None:
    """Issue a ``SmallerBatch`` warning, where no result has notes to hold the message."""
    warnings.warn(text, SmallerBatch, stacklevel=2)
