"""Search among binary codes: an exact index in a directory, opened by its address."""

from robusthash.index.code_index import CodeIndex, Within, open_index

__all__ = ["CodeIndex", "Within", "open_index"]
