"""Inputs -> outputs: encoders, hash heads and the hasher that joins them."""

from robusthash.core.registry import discover
from robusthash.models.encode import encode_split
from robusthash.models.hasher import Hasher, build_hasher

__all__ = ["Hasher", "build_hasher", "encode_split"]

discover(__name__, __path__)
