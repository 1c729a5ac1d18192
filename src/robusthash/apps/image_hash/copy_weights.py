"""The weights of the packaged hash for copies, made of photographs without training; ours.

Of the photographs, their mirror images and transposes: the block means of each, less the average photograph,
weighed by a window that fades towards the edges, where captions and crops change a picture; of these the
first 42 principal components. Each component is coded by how many of its thresholds it exceeds, a bit each:
12 thresholds for the strongest components, 4 for the weakest, at equal shares of the photographs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.runtime import Progress, silent
from robusthash.data import load_data
from robusthash.models.block_dct import COPY_WINDOW
from robusthash.models.hasher import Hasher, build_hasher

IMAGE = 64  # pixels a side of the photographs
SIDE = 16  # blocks in a row
THRESHOLDS = (12,) * 4 + (8,) * 8 + (6,) * 12 + (4,) * 18  # of each component, 256 in all

# Of a component's thresholds, those of the first 64 and of the first 128 bits; of even and odd components
FIRST_64 = {12: ((2, 7, 9), (2, 4, 9)), 8: ((2, 5), (2, 5)), 6: ((3,), (0, 5)), 4: ((2,), (1,))}
FIRST_128 = {
    12: ((0, 2, 4, 7, 9, 11),) * 2,
    8: ((0, 2, 5, 7),) * 2,
    6: ((0, 3, 5), (0, 2, 5)),
    4: ((1, 2),) * 2,
}


def made_hasher(root: Path, progress: Progress = silent) -> Hasher:
    """The hasher that the training photographs of UC Merced make.

    Args:
        root: with ``ucmerced.tar`` and ``ucmerced.jsonl``.
    """
    return hasher_of(training_blocks(root, progress))


def training_blocks(root: Path, progress: Progress = silent) -> Tensor:
    """(N, 3 * SIDE * SIDE) block means of the photographs, their mirror images and transposes."""
    train = load_data("ucmerced", root=root, size=IMAGE, texts=False).train
    parts = []
    for part in torch.arange(len(train)).split(64):
        parts.append(functional.avg_pool2d(train.source.inputs(train.rows[part])["image"], IMAGE // SIDE))
        progress(int(part[-1]) + 1, len(train), "block means")
    blocks = torch.cat(parts)
    return torch.cat([blocks, blocks.flip(-1), blocks.transpose(-1, -2)]).flatten(1).double()


def hasher_of(images: Tensor) -> Hasher:
    """The hasher that (N, 3 * SIDE * SIDE) block means, float64, make."""
    weights, values = components(images)
    shares = [torch.arange(1, count + 1).double() / (count + 1) for count in THRESHOLDS]
    cuts = torch.cat([torch.quantile(values[:, at], share) for at, share in enumerate(shares)])
    rows, bits = torch.repeat_interleave(torch.arange(len(THRESHOLDS)), torch.tensor(THRESHOLDS)), order()
    hasher = build_hasher(image="block-means", bits=len(bits), seed=0)
    linear = linear_layer(hasher)
    with torch.no_grad():
        linear.weight.copy_(weights[rows[bits]])
        linear.bias.copy_(-(cuts[bits] + weights[rows[bits]] @ images.mean(0)))
    return hasher.eval()


def linear_layer(hasher: Hasher) -> nn.Linear:
    """The layer of block means whose signs are the bits; a ValueError of a hasher of another kind."""
    layer = getattr(hasher.heads["image"], "linear", None) if "image" in hasher.heads else None
    if not isinstance(layer, nn.Linear):
        raise ValueError("a hash for copies has a linear layer of block means, and this model has none")
    return layer


def components(images: Tensor) -> tuple[Tensor, Tensor]:
    """(D, 3 * SIDE * SIDE) weights of the blocks and (N, D) values of the images, of deviation 1."""
    weights = COPY_WINDOW.double()
    weighed = (images - images.mean(0)) * weights
    variances, axes = torch.linalg.eigh(torch.cov(weighed.T))
    axes = axes.flip(1)[:, : len(THRESHOLDS)]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # eigh leaves the sign open
    axes = axes / variances.flip(0)[: len(THRESHOLDS)].sqrt()
    return (weights[:, None] * axes).T, weighed @ axes


def order() -> list[int]:
    """The bits by component and threshold, such that the first 64 and the first 128 are hashes too."""
    starts = [sum(THRESHOLDS[:number]) for number in range(len(THRESHOLDS))]
    numbered = list(enumerate(zip(starts, THRESHOLDS, strict=True)))

    def of(table: Mapping[int, tuple[Sequence[int], ...]]) -> list[int]:
        return [start + each for number, (start, count) in numbered for each in table[count][number % 2]]

    bits: list[int] = []
    for part in (of(FIRST_64), of(FIRST_128), range(sum(THRESHOLDS))):
        bits += [bit for bit in part if bit not in bits]
    return bits
