"""Batches of a size that fits into memory: what does not fit is done again, less at a time, and that is
said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
Say = Callable[[str], None]

REMEDY = "free some memory, take a smaller model or input, or compute elsewhere (runtime.device: cpu)"


class SmallerBatch(RuntimeWarning):
    """Less was done at a time than was asked for. Of a deterministic model no number changes beyond float
    rounding."""


class DoesNotFit(MemoryError):
    """A single item is too much. The message holds the remedy."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice: torch raises three kinds of it, NumPy and Python a
    fourth."""
    import torch  # seconds to import, and the command line reports errors without it

    said = str(error).lower()
    exhausted = (
        "out of memory" in said or "can't allocate memory" in said or "cublas_status_alloc_failed" in said
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and exhausted
    )


def halving(work: Callable[[int], Result], size: int, items: str, done: str, say: Say) -> tuple[Result, int]:
    """``work(size)``; where memory does not suffice, all of it again at the largest proper divisor of the
    size.

    Divisors, so that whole batches of the smaller size fill one of the larger. Half of an even size; 1 of a
    prime.

    Args:
        work: does everything, so many items at a time, and leaves nothing behind when it raises.
        items: what there are ``size`` of, such as "queries".
        done: what is done with them, such as "attacked".
        say: is given a line at each step down.

    Returns:
        The result, and the size at which it fitted.

    Raises:
        DoesNotFit: one item at a time does not fit either.

    Example:
        >>> def narrow(size: int) -> str:
        ...     if size > 4:
        ...         raise MemoryError
        ...     return "done"
        >>> halving(narrow, 12, "items", "encoded", print)
        12 items at a time did not fit into memory; 6 were encoded at a time
        6 items at a time did not fit into memory; 3 were encoded at a time
        ('done', 3)
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, DoesNotFit) or not out_of_memory(error):
                raise
            if size == 1:
                raise DoesNotFit(
                    f"memory does not suffice for {items} to be {done} one at a time; {REMEDY}"
                ) from error
        # outside of the handler, whose error keeps the failed attempt alive
        smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
        say(f"{size} {items} at a time did not fit into memory; {smaller} were {done} at a time")
        size = smaller


def warn(text: str) -> None:
    """Say it as a ``SmallerBatch`` warning, where no result has notes to hold it."""
    warnings.warn(text, SmallerBatch, stacklevel=2)
