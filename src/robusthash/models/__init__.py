"""Inputs -> outputs: encoders, hash heads and the hasher that joins them."""

from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher, build_hasher, purified
from robusthash.models.purifier import Purifier

__all__ = ["Hasher", "Purifier", "build_hasher", "encode_split", "purified"]
