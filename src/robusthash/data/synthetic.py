"""A generated world of coloured shapes with captions: the data set of the tests and of first steps."""

from __future__ import annotations

import torch
from torch import Tensor

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.data.base import ArraySource, RetrievalData
from robusthash.data.image_text import Vocabulary
from robusthash.data.splits import Indices, assemble, check_sizes, hash_pixels, one_hot

COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.70, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.90, 0.85, 0.15),
}
SHAPES = ("disc", "square", "cross", "ring")
GROUNDS = ("plain", "striped", "chequered")
_ADJECTIVES = {"disc": "round", "square": "angular", "cross": "crossed", "ring": "hollow"}


@register("data", "synthetic")
def synthetic(
    size: int = 16,
    multilabel: bool = True,
    texts: bool = True,
    train: int = 200,
    query: int = 40,
    database: int = 200,
    seed: int = 0,
) -> RetrievalData:
    """Coloured shapes on textured grounds with a bag-of-words caption: tiny, instant, learnt in seconds.

    Each image shows one of four shapes in one of four colours at a random place and scale, on a ground whose
    texture carries no label, with noise. Items take the sixteen pairs of colour and shape in turn.

    Args:
        size: side in pixels, 12 to 64.
        multilabel: labels are the colour and the shape (8 columns, two of them set), so that items may share
            one or both; otherwise the pair is the single label (16 columns).
        texts: adds the caption as modality ``text``; it names the ground and the place too, which is noise.
        train, query, database: items in each split; the three are disjoint.
    """
    if not 12 <= size <= 64:
        raise ValueError(f"size must lie in 12..64 pixels, got {size}")
    check_sizes(train=train, query=query, database=database)
    draws = Draws(seed).within("synthetic")
    counts = {"train": train, "query": query, "database": database}
    worlds = [_world(count, size, draws.within(part)) for part, count in counts.items()]
    pixels = torch.cat([images for images, _, _ in worlds])
    pair = torch.cat([pairs for _, pairs, _ in worlds])
    arrays, vocabulary = {"image": pixels}, None
    if texts:
        captions = [caption for _, _, captions in worlds for caption in captions]
        vocabulary = Vocabulary.fit(captions[:train])
        arrays["text"] = vocabulary.encode(captions)
    if multilabel:
        names = (*COLOURS, *SHAPES)
        labels = torch.cat([one_hot(pair % 4, 4), one_hot(pair // 4, 4)], dim=1)
    else:
        names = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
        labels = one_hot(pair, 16)
    indices = Indices(*torch.arange(len(pixels)).split(list(counts.values())))
    source, hashes = ArraySource(arrays), hash_pixels(pixels)
    note = "Generated shapes."
    return assemble("synthetic", source, labels, hashes, indices, names, note, text_form=vocabulary)


def _world(count: int, size: int, draws: Draws) -> tuple[Tensor, Tensor, list[str]]:
    """(count, 3, S, S) uint8 images, (count,) pairs as colour + 4 * shape, and captions."""
    ids = torch.arange(count)
    pair = ids % 16
    colour, shape = pair % 4, pair // 4
    numbers = draws.uniform(ids, (8,))
    ground = (numbers[:, 0] * len(GROUNDS)).long()
    noise = draws.within("noise").uniform(ids, (3, size, size))
    return _draw(colour, shape, ground, numbers, noise), pair, _captions(colour, shape, ground, numbers)


def _draw(colour: Tensor, shape: Tensor, ground: Tensor, numbers: Tensor, noise: Tensor) -> Tensor:
    """(N,) of each kind, (N, 8) and (N, 3, S, S) uniform numbers -> (N, 3, S, S) uint8."""
    size = noise.shape[-1]
    line = (torch.arange(size) + 0.5) / size
    y, x = line[None, :, None], line[None, None, :]

    def column(number: int) -> Tensor:
        return numbers[:, number, None, None]

    radius = 0.28 + 0.10 * column(1)
    down, across = y - (0.4 + 0.2 * column(2)), x - (0.4 + 0.2 * column(3))
    distance = (down**2 + across**2).sqrt()
    larger = torch.maximum(down.abs(), across.abs())
    smaller = torch.minimum(down.abs(), across.abs())
    item = torch.arange(len(shape))
    disc, square = distance < radius, larger < 0.85 * radius
    cross = (larger < 1.1 * radius) & (smaller < 0.35 * radius)
    ring = (distance < 1.1 * radius) & (distance > 0.6 * radius)
    inside = torch.stack([disc, square, cross, ring])[shape, item]  # (N, S, S)
    stripes = ((y + column(4)) * 5 % 1 < 0.5).float().expand(-1, -1, size)
    cheques = ((y * 4).floor() + (x * 4).floor() + (column(4) * 2).floor()) % 2
    pattern = torch.stack([torch.full_like(cheques, 0.5), stripes, cheques])[ground, item]
    back = 0.35 + 0.25 * column(5) + 0.12 * (pattern - 0.5)
    tint = torch.tensor(list(COLOURS.values()))[colour] * (0.8 + 0.2 * numbers[:, 6, None])
    image = torch.where(inside[:, None], tint[:, :, None, None], back[:, None])
    return ((image + 0.1 * (noise - 0.5)).clamp(0, 1) * 255).round().to(torch.uint8)


def _captions(colour: Tensor, shape: Tensor, ground: Tensor, numbers: Tensor) -> list[str]:
    colours, captions = tuple(COLOURS), []
    for item, row in enumerate(numbers.tolist()):
        name = SHAPES[int(shape[item])]
        name = f"{_ADJECTIVES[name]} {name}" if row[7] < 0.5 else name
        side = "left" if row[3] < 0.5 else "right"
        texture = GROUNDS[int(ground[item])]
        captions.append(f"a {colours[int(colour[item])]} {name} on a {texture} ground, to the {side}")
    return captions
