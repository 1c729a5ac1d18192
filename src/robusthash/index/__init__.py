"""Search among binary codes: an exact index in a directory, opened by its address."""

from robusthash.index.code_index import Added, CodeIndex, Within, open_index

__all__ = ["Added", "CodeIndex", "Within", "open_index"]
