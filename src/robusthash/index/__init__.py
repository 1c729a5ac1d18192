"""Search among binary codes: one interface, chosen by address."""

from __future__ import annotations

from pathlib import Path

from robusthash.index.base import CodeIndex, Within
from robusthash.index.local_index import LocalIndex

__all__ = ["CodeIndex", "LocalIndex", "Within", "open_index"]


def open_index(url: str, bits: int | None = None, engine: str = "faiss", create: bool = True) -> CodeIndex:
    """Open the index at an address, or make it.

    Args:
        url: ``file:DIR``, an index in a directory of this machine (``LocalIndex``).
        bits: code length; needed for a new index, checked against an old one.
        engine: ``faiss`` (exact), ``numpy`` (exact, slow) or ``faiss-ivf`` (approximate).
        create: make the index where there is none.

    Raises:
        FileNotFoundError: where there is no index and ``create`` is False.
        ValueError: for an unknown scheme or engine, codes of another length, or a damaged store.
    """
    scheme, _, rest = url.partition(":")
    if scheme != "file" or not rest:
        raise ValueError(f"an index address is file:DIR, got {url!r}; supported schemes: file")
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise ValueError(
                f"{url!r} names a host; write file:DIR or file:///DIR for a directory of this machine"
            )
        rest = rest[2:]
    return LocalIndex(Path(rest).expanduser(), bits, engine, create)
