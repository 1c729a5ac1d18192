"""Search among binary codes: exact indexes in a directory, in Milvus or in PostgreSQL, opened by address."""

from robusthash.index.code_index import Added, CodeIndex, Within
from robusthash.index.index_address import address_of, open_index

__all__ = ["Added", "CodeIndex", "Within", "address_of", "open_index"]
