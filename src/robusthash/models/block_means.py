"""The encoder of the packaged hash for copies: the means of blocks of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from robusthash.core.registry import register
from robusthash.models.hasher import Encoder


@register("image-encoder", "block-means", modality="image", state="measured")
class BlockMeans(Encoder):
    """Means of ``side`` x ``side`` blocks of each channel, without weights; ours.

    A change of 8/255 is small next to the differences of large blocks, and large next to fine detail. With
    the linear head, codes are linear in the pixels, so that their robustness can be proved
    (``robustness/certificates/linear_codes.py``).

    Args:
        side: blocks in a row.
    """

    def __init__(self, side: int = 16) -> None:
        super().__init__()
        if side < 1:
            raise ValueError(f"side must be at least 1, got {side}")
        self.width, self.smallest = 3 * side * side, side

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = map(int, x.shape[-2:])  # numbers, also while an export traces the net
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the image encoder block-means needs images of at least {self.smallest} px, and these have "
                f"{height} x {width}; set the data's size to 64"
            )
        if height % self.smallest or width % self.smallest:
            blocks = functional.adaptive_avg_pool2d(x, self.smallest)
        else:
            blocks = functional.avg_pool2d(x, (height // self.smallest, width // self.smallest))
        return blocks.flatten(1), {}


def edge_window(rows: Sequence[float], columns: Sequence[float], side: int = 16) -> Tensor:
    """(3 * side * side,) weights of the blocks, which rise from the edges to 1 by the given ones."""
    weights = torch.ones(2, side)
    for line, edge in zip(weights, (rows, columns), strict=True):
        line[: len(edge)] = torch.tensor(edge)
        line[-len(edge) :] = torch.tensor(edge).flip(0)
    return (weights[0][:, None] * weights[1]).expand(3, -1, -1).flatten()


COPY_WINDOW = edge_window((0.1, 0.2, 0.35, 0.55, 0.8), (0.1, 0.25, 0.5, 0.75, 0.9))
"""Of the packaged hash for copies: captions and crops change a picture at its edges."""
