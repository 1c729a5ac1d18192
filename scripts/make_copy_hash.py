"""The packaged hash for copies, ours: python scripts/make_copy_hash.py --data DATA --out FOLDER

From the 1,680 training photographs of UC Merced (public domain; DATA holds ``ucmerced.tar`` and
``ucmerced.jsonl``), their mirror images and transposes: the block means of each, less the average photograph,
weighed by a window that fades towards the edges, where captions and crops change a picture; of these the
first 42 principal components. Each component is coded by how many of its thresholds it exceeds, a bit each:
12 thresholds for the strongest components, 4 for the weakest, at equal shares of the photographs. So the
number of bits that differ follows the distance of two pictures, and a small change crosses few thresholds.
Nothing is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import robusthash as rh
from robusthash.models.block_means import COPY_WINDOW
from robusthash.models.hub_card import HubCard

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


def photographs(root: Path) -> Tensor:
    """(N, 3 * SIDE * SIDE) block means of the photographs, their mirror images and transposes."""
    train = rh.load_data("ucmerced", root=root, size=64, texts=False).train
    parts = [train.source.inputs(train.rows[part])["image"] for part in torch.arange(len(train)).split(64)]
    blocks = torch.nn.functional.avg_pool2d(torch.cat(parts), 64 // SIDE)
    return torch.cat([blocks, blocks.flip(-1), blocks.transpose(-1, -2)]).flatten(1).double()


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
    """The bits by component and threshold: the first 64, and the first 128, are hashes of their own."""
    starts = [sum(THRESHOLDS[:number]) for number in range(len(THRESHOLDS))]
    numbered = list(enumerate(zip(starts, THRESHOLDS, strict=True)))

    def of(table: dict[int, tuple[Sequence[int], ...]]) -> list[int]:
        return [start + each for number, (start, count) in numbered for each in table[count][number % 2]]

    bits: list[int] = []
    for part in (of(FIRST_64), of(FIRST_128), range(sum(THRESHOLDS))):
        bits += [bit for bit in part if bit not in bits]
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="with ucmerced.tar and ucmerced.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = photographs(given.data)
    weights, values = components(images)
    shares = [torch.arange(1, count + 1).double() / (count + 1) for count in THRESHOLDS]
    cuts = torch.cat([torch.quantile(values[:, at], share) for at, share in enumerate(shares)])
    rows = torch.repeat_interleave(torch.arange(len(THRESHOLDS)), torch.tensor(THRESHOLDS))
    bits = order()
    hasher = rh.build_hasher(image="block-means", bits=len(bits), seed=0)
    linear = hasher.heads["image"].linear
    with torch.no_grad():
        linear.weight.copy_(weights[rows[bits]])
        linear.bias.copy_(-(cuts[bits] + weights[rows[bits]] @ images.mean(0)))
    about = HubCard(
        name="copy-hash",
        licence="apache-2.0",
        data="1,680 photographs of UC Merced (public domain)",
        method="thresholds of windowed principal components of block means; scripts/make_copy_hash.py",
        finds_copies=True,
    )
    hasher.eval().save_pretrained(given.out, size=64, about=about, overwrite=True)


if __name__ == "__main__":
    main()
