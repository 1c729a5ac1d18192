"""Two sources behind each other, so that a split may hold items of both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robusthash.core.types import Inputs
from robusthash.data.base import Source


@dataclass(frozen=True)
class JoinedSource:
    """The rows of one source, then those of another of the same modalities and shapes."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def inputs(self, rows: Tensor) -> Inputs:
        second = rows >= len(self.first)
        joined: Inputs = {}
        for source, mask, offset in (
            (self.first, ~second, 0),
            (self.second, second, len(self.first)),
        ):
            if mask.any():
                for name, values in source.inputs(rows[mask] - offset).items():
                    joined.setdefault(name, values.new_empty(len(rows), *values.shape[1:]))[mask] = values
        return joined
