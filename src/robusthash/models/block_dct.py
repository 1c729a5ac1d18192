"""The block DCT: a fixed orthonormal change of basis, so that energies and gradients keep their size.

``block-means``, the encoder of the packaged hash for copies, takes the means of blocks of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.registry import register
from robusthash.models.hasher import Encoder


def dct_matrix(size: int) -> Tensor:
    """(n, n) orthonormal DCT-II: A[0, j] = sqrt(1/n), A[u, j] = sqrt(2/n) cos((2j + 1) u pi / 2n)."""
    if size < 1:
        raise ValueError(f"a DCT needs at least 1 point, got {size}")
    place = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2.0 / size) * torch.cos((2.0 * place + 1.0) * place[:, None] * (math.pi / (2 * size)))
    matrix[0] = math.sqrt(1.0 / size)
    return matrix.float()


class BlockDCT(nn.Module):
    """DCT of n x n blocks of every channel, Z = A X A^T, and its inverse X = A^T Z A (SAAH, Eq. 5).

    The paper's factors (2/n) C_u C_v are those of the orthonormal DCT-II for every n: sums of squares are
    kept, the first coefficient of a block of constant g is n * g, and the transform of a perturbation is the
    perturbation of the transform. Both products are one with the Kronecker product of A with itself, measured
    2.3 times faster on 8 x 8 blocks. Always in the precision of its input, also under autocast, since bf16
    would lose what an attack of 8/255 adds.

    Args:
        block: side n of a block, in pixels.
    """

    basis: Tensor

    def __init__(self, block: int = 8) -> None:
        super().__init__()
        matrix = dct_matrix(block)
        self.block = block
        self.register_buffer("basis", torch.kron(matrix, matrix), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P, C, n, n): block by rows, channel, frequency (u down, v across)."""
        n = self.block
        items, channels, height, width = x.shape
        if height % n or width % n:
            raise ValueError(
                f"images of {height} x {width} px do not divide into blocks of {n}; "
                f"resize or crop them to a multiple of {n}, or give the gate another block"
            )
        blocks = x.reshape(items, channels, height // n, n, width // n, n).permute(0, 2, 4, 1, 3, 5)
        with torch.autocast(x.device.type, enabled=False):
            coefficients = blocks.reshape(-1, n * n) @ self.basis.T
        return coefficients.view(items, -1, channels, n, n)

    def inverse(self, z: Tensor, height: int, width: int) -> Tensor:
        """(B, P, C, n, n) coefficients of images of ``height`` x ``width`` -> (B, C, H, W)."""
        n = self.block
        items, _, channels = z.shape[:3]
        with torch.autocast(z.device.type, enabled=False):
            blocks = z.reshape(-1, n * n) @ self.basis
        blocks = blocks.view(items, height // n, width // n, channels, n, n)
        # channels first in memory: this copy is much cheaper, and convolutions convert to channels last
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(items, channels, height, width)


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
