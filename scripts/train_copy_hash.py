"""Training of the packaged hash for copies, ours: python scripts/train_copy_hash.py --data DATA --out FOLDER

Pictures: the 1,680 training photographs of UC Merced (public domain; DATA holds ``ucmerced.tar`` and
``ucmerced.jsonl``), the photographs that scikit-image and scikit-learn bring, and 16,000 collages of their
windows with noise of photographic spectra, gradients and flat shapes. Each step mirrors, recolours and mixes
some of them into new pictures, changes a copy of each as people do, moves the copy by at most eps away from
the code of its picture and towards others (two steps), and asks that the copy find its picture among those of
the batch and of the last batches, by the first 64, the first 128 and all 256 bits. A second, shorter stage
also asks for the same bits, and has pictures of single things on plain grounds among the collages.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn
from torch.nn import functional

import robusthash as rh
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.models.hub_card import HubCard

SIDE, LARGE = 32, 96  # pixels of training pictures, and of the collages that they are reduced from
CUTS = (64, 128, 256)  # codes that must do for themselves
COLLAGES, BATCH, QUEUE = 16_000, 256, 3072
INNER, STEP = 2, 0.75  # steps of the attack, and their length in eps
TEMPERATURE, DECAY = 0.08, 5e-4


@dataclass(frozen=True)
class Stage:
    """A stage of training; ``warm`` is the share of its steps over which eps rises."""

    steps: int
    eps: float
    rate: float
    align: float  # weight of the distance between the soft codes of a copy and its picture
    warm: float
    things: bool  # single things on plain grounds among the collages
    seed: int


STAGES = (
    Stage(12_000, 8.5 / 255, 1.5e-3, 0.0, 0.2, False, 0),
    Stage(2_500, 0.0353, 5e-4, 5.0, 0.0, True, 10),
)


# ------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Pictures:
    """(N, 3, SIDE, SIDE) uint8, and (N,) the photograph that each is a window of: these are no negatives."""

    pixels: Tensor
    owners: Tensor


class Collages:
    """Random pictures made of windows of photographs, noise, gradients and flat shapes."""

    def __init__(self, photographs: Sequence[Image.Image], seed: int) -> None:
        self.photographs = photographs
        self.rng = np.random.default_rng(seed)

    def window(self, photograph: Image.Image, least: float) -> Image.Image:
        """A square part of a photograph, of at least that share of its shorter side."""
        short = min(photograph.size)
        side = int(self.rng.integers(int(least * short), short + 1))
        left, top = (int(self.rng.integers(0, length - side + 1)) for length in photograph.size)
        box = (left, top, left + side, top + side)
        return photograph.resize((LARGE, LARGE), Image.Resampling.BICUBIC, box=box)

    def collage(self) -> Image.Image:
        """Shapes on a texture, with shadow over some."""
        image = self.texture().copy()
        for _ in range(self.rng.integers(1, 25)):
            flat = Image.new("RGB", image.size, tuple(map(int, self.rng.integers(0, 256, 3))))
            image.paste(flat if self.rng.random() < 0.5 else self.texture(), (0, 0), self.shape())
        if self.rng.random() < 0.3:
            light = np.linspace(self.rng.uniform(0.4, 1), 1, LARGE)[:, None, None]
            light = light if self.rng.random() < 0.5 else light.transpose(1, 0, 2)
            image = _image(np.asarray(image) * light)
        return image

    def thing(self) -> Image.Image:
        """One thing on a plain ground, as shops show them: such pictures differ in little but outlines."""
        level = int(self.rng.choice([0, 255, int(self.rng.integers(0, 256))]))
        ground = (level,) * 3 if self.rng.random() < 0.6 else tuple(map(int, self.rng.integers(0, 256, 3)))
        image = Image.new("RGB", (LARGE, LARGE), ground)
        if self.rng.random() < 0.3:
            image = _image(np.asarray(image) * 0.6 + 0.4 * self.noise(2.2))
        mask = Image.new("L", (LARGE, LARGE))
        draw, centre = ImageDraw.Draw(mask), self.rng.uniform(0.35, 0.65, 2) * LARGE
        for _ in range(self.rng.integers(1, 6)):
            x, y = centre + self.rng.normal(0, 0.13, 2) * LARGE
            wide, high = self.rng.uniform(0.05, 0.3, 2) * LARGE
            if self.rng.random() < 0.6:
                draw.ellipse((x - wide, y - high, x + wide, y + high), fill=255)
            else:
                angles = np.sort(self.rng.uniform(0, 2 * np.pi, self.rng.integers(3, 7)))
                draw.polygon([(x + wide * np.cos(a), y + high * np.sin(a)) for a in angles], fill=255)
        fill = self.texture()
        if self.rng.random() < 0.5:
            fill = _image(np.asarray(fill) * 0.5 + 0.5 * self.rng.integers(0, 256, 3))
        image.paste(fill, (0, 0), mask.filter(ImageFilter.GaussianBlur(self.rng.uniform(0, 2))))
        return image

    def texture(self) -> Image.Image:
        """Noise, a gradient of four colours, or a window of a photograph, recoloured or not."""
        kind = self.rng.integers(3)
        if kind == 0:
            return _image(self.noise(self.rng.uniform(0.8, 2.2)))
        if kind == 1:
            corners = self.rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
            return Image.fromarray(corners).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
        image = self.window(self.photographs[self.rng.integers(len(self.photographs))], 0.2)
        if self.rng.random() < 0.5:
            return image
        mixing = self.rng.normal(0, 0.35, (3, 3)) + 0.7 * np.eye(3)
        mixed = (np.asarray(image) - 128.0) @ mixing.T * self.rng.uniform(0.6, 1.4)
        return _image(mixed + 128 + self.rng.normal(0, 40, 3))

    def noise(self, slope: float) -> np.ndarray:
        """(LARGE, LARGE, 3) noise whose amplitude falls with the frequency by this exponent."""
        squares = np.fft.fftfreq(LARGE)[:, None] ** 2 + np.fft.rfftfreq(LARGE)[None] ** 2
        squares[0, 0] = np.inf
        draws = self.rng.normal(size=(2, 3, *squares.shape))
        waves = np.fft.irfft2((draws[0] + 1j * draws[1]) / squares ** (slope / 2), s=(LARGE, LARGE))
        waves /= waves.std((1, 2), keepdims=True)
        mixing = np.eye(3) * self.rng.uniform(0.1, 1) + self.rng.uniform(0, 1) * np.ones((3, 3))
        waves = np.tensordot(mixing, waves, 1)
        waves *= self.rng.uniform(20, 70) / waves.std()
        return (waves + self.rng.uniform(60, 190) + self.rng.normal(0, 20, (3, 1, 1))).transpose(1, 2, 0)

    def shape(self) -> Image.Image:
        """The mask of an ellipse, a rectangle or a polygon; small ones are more frequent."""
        radius = min(0.04 * LARGE / self.rng.uniform(0.03, 1) ** 0.9, 0.7 * LARGE)
        (x, y), (wide, high) = self.rng.uniform(-10, LARGE + 10, 2), radius * self.rng.uniform(0.4, 1.6, 2)
        mask = Image.new("L", (LARGE, LARGE))
        draw, kind = ImageDraw.Draw(mask), self.rng.integers(3)
        if kind == 0:
            draw.ellipse((x - wide, y - high, x + wide, y + high), fill=255)
        elif kind == 1:
            draw.rectangle((x - wide, y - high, x + wide, y + high), fill=255)
        else:
            angles = np.sort(self.rng.uniform(0, 2 * np.pi, self.rng.integers(3, 8)))
            draw.polygon([(x + wide * np.cos(a), y + high * np.sin(a)) for a in angles], fill=255)
        soft = self.rng.random() < 0.3
        return mask.filter(ImageFilter.GaussianBlur(self.rng.uniform(1, 6))) if soft else mask


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures(root: Path, collages: int, things: bool, seed: int) -> Pictures:
    """Photographs, windows of them and collages, a window for three collages; or two, and a thing."""
    train = rh.load_data("ucmerced", root=root, size=128, texts=False).train
    rows = torch.arange(len(train)).split(64)
    aerial = [
        Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy())
        for part in rows
        for one in train.source.inputs(train.rows[part])["image"]
    ]
    packaged = [Image.open(photograph_path(each)).convert("RGB") for each in PHOTOGRAPHS]
    packaged = [one.resize([int(400 * side / min(one.size)) for side in one.size]) for one in packaged]
    maker = Collages([*aerial, *packaged * 20], seed)
    images, owners = list(aerial), list(range(len(aerial)))
    for number in range(collages):
        if number % 4:
            images.append(maker.thing() if things and number % 4 == 1 else maker.collage())
            owners.append(200_000 + number)
            continue
        among, base = (packaged, 100_000) if maker.rng.random() < 0.3 else (aerial, 0)
        row = int(maker.rng.integers(len(among)))
        images.append(maker.window(among[row], 1 / 3))
        owners.append(base + row)
    small = [np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BOX)) for one in images]
    return Pictures(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous(), torch.tensor(owners))


# -------------------------------------------------------------------------- new pictures and their copies


class Changes:
    """Random changes of (B, 3, SIDE, SIDE) batches, drawn from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.places = (torch.arange(SIDE) + 0.5) / SIDE

    def draw(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=self.generator)

    def chosen(self, count: int, share: float) -> Tensor:
        """(B, 1, 1, 1) true for about that share."""
        return self.draw(0, 1, count, 1, 1, 1) < share

    def new_pictures(self, x: Tensor, others: Tensor) -> Tensor:
        """Mirrored, turned, mixed with others by a soft shape, recoloured: some of each."""
        count = len(x)
        x = torch.where(self.chosen(count, 0.5), x.flip(-1), x)
        x = torch.where(self.chosen(count, 0.3), x.transpose(-1, -2), x)
        mask = self._soft_shape(count)
        x = torch.where(self.chosen(count, 0.5), mask * x + (1 - mask) * others.flip(-2), x)
        mean = x.mean((2, 3), keepdim=True)
        normal = torch.randn(count, 3, 4, generator=self.generator)
        mixing = torch.eye(3) * self.draw(0.4, 1.1, count, 1, 1) + 0.3 * normal[:, :, :3]
        mixed = torch.einsum("bij,bjhw->bihw", mixing, x - mean) * self.draw(0.5, 1.5, count, 1, 1, 1)
        x = torch.where(self.chosen(count, 0.5), mixed + mean + 0.1 * normal[:, :, 3:, None], x)
        grey = x.mean(1, keepdim=True).expand_as(x)
        return torch.where(self.chosen(count, 0.1), grey, x).clamp(0, 1)

    def _soft_shape(self, count: int) -> Tensor:
        """(B, 1, SIDE, SIDE) ellipses and half planes with hard and soft edges."""
        row, column = 2 * self.places[None, None] - 1, 2 * self.places[None, :, None] - 1
        stretch = self.draw(0.4, 2.5, count, 1, 1)
        x, y = ((place - self.draw(-1, 1, count, 1, 1)) for place in (row, column))
        ellipse = self.draw(0.2, 1.2, count, 1, 1) - ((x * stretch) ** 2 + (y / stretch) ** 2).sqrt()
        angle = self.draw(0, 2 * math.pi, count, 1, 1)
        half = row * angle.cos() + column * angle.sin() + self.draw(-0.6, 0.6, count, 1, 1)
        edge = torch.where(self.draw(0, 1, count, 1, 1) < 0.5, ellipse, half)
        return torch.sigmoid(edge * self.draw(3, 60, count, 1, 1))[:, None]

    def copies(self, x: Tensor) -> Tensor:
        """Cut and turned, re-lit, written over, blurred: some of each."""
        x = self._written_over(self._written_over(self._lit(self._cut(x)), anywhere=False), anywhere=True)
        if self.draw(0, 1, 1) < 0.2:
            x = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return x

    def _cut(self, x: Tensor) -> Tensor:
        count = len(x)
        scale = 1 - self.draw(0, 0.24, count, 2) * (self.draw(0, 1, count, 1) < 0.7)
        angle = self.draw(-6, 6, count) * (self.draw(0, 1, count) < 0.5) * math.pi / 180
        move = (1 - scale) * self.draw(-0.9, 0.9, count, 2)
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos * scale[:, 0], -sin * scale[:, 0], move[:, 0]], 1),
            torch.stack([sin * scale[:, 1], cos * scale[:, 1], move[:, 1]], 1),
        ]
        grid = functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        border = "zeros" if self.draw(0, 1, 1) < 0.5 else "border"
        return functional.grid_sample(x, grid, padding_mode=border, align_corners=False)

    def _lit(self, x: Tensor) -> Tensor:
        count = len(x)
        mean, on = x.mean((1, 2, 3), keepdim=True), self.chosen(count, 0.7).float()
        contrast, light = (1 + on * self.draw(-0.3, 0.3, count, 1, 1, 1) for _ in range(2))
        contrast = torch.where(self.chosen(count, 0.5), light, contrast)
        return ((x - mean) * contrast + mean * light).clamp(0, 1)

    def _written_over(self, x: Tensor, anywhere: bool) -> Tensor:
        """Bands with writing, or writing alone: anywhere, or at the upper or lower edge."""
        count = len(x)
        on, height = self.draw(0, 1, count) < 0.3, self.draw(0.04, 0.2, count)
        low, high = 1 - height * self.draw(0.8, 1.2, count), self.draw(0, 0.1, count)
        edge = torch.where(self.draw(0, 1, count) < 0.5, low, high)
        top = (self.draw(-0.05, 1, count) if anywhere else edge)[:, None]
        rows = (self.places > top) & (self.places < top + height[:, None]) & on[:, None]
        dots = torch.rand(count, 1, SIDE, SIDE, generator=self.generator)
        writing = functional.avg_pool2d(dots, (3, 1), 1, (1, 0)) > 0.6
        band, banded = rows[:, None, :, None], self.chosen(count, 0.6)
        colour = self.draw(0, 1, count, 3, 1, 1)
        extreme = (colour.mean(1, keepdim=True) > 0.5).float().expand_as(colour)
        colour = torch.where(self.chosen(count, 0.7), extreme, colour)
        on_band = torch.where(writing, 0.7 - 0.4 * colour, colour)
        ink = torch.where(banded, on_band, colour.expand_as(on_band))
        return torch.where(band & (banded | writing), ink, x)


# --------------------------------------------------------------------------------------------- training


class Trained(nn.Module):
    """The hasher with its logits brought to mean 0 and variance 1 by BatchNorm, which ``folded`` removes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.hasher = rh.build_hasher(image="copy-net", bits=CUTS[-1], seed=seed)
        self.balance = nn.BatchNorm1d(CUTS[-1], affine=False)

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.hasher.encoders["image"](x)
        return self.balance(self.hasher.heads["image"].linear(features))

    def folded(self) -> rh.Hasher:
        linear, balance = self.hasher.heads["image"].linear, self.balance
        deviation = (balance.running_var + balance.eps).sqrt()
        with torch.no_grad():
            linear.weight.div_(deviation[:, None])
            linear.bias.copy_((linear.bias - balance.running_mean) / deviation)
        return self.hasher.eval()


def near(logits: Tensor, others: Tensor, cut: int) -> Tensor:
    """(B, N) cosine of the soft codes of the first ``cut`` bits, over the temperature."""
    soft = [functional.normalize(torch.tanh(each[:, :cut]), dim=1) for each in (logits, others)]
    return soft[0] @ soft[1].T / TEMPERATURE


def attacked(net: Trained, copies: Tensor, stored: Tensor, eps: float, cut: int, changes: Changes) -> Tensor:
    """Copies moved by at most ``eps`` away from their own stored codes and towards others."""
    own = torch.arange(len(copies))
    move = eps * changes.draw(-1, 1, *copies.shape)
    for _ in range(INNER):
        move.requires_grad_(True)
        loss = functional.cross_entropy(near(net((copies + move).clamp(0, 1)), stored, cut), own)
        (slope,) = torch.autograd.grad(loss, move)
        move = (move.detach() + STEP * eps * slope.sign()).clamp(-eps, eps)
    return (copies + move).clamp(0, 1)


def loss_of(logits: Tensor, stored: Tensor, old: Tensor, same: Tensor, cut: int, align: float) -> Tensor:
    """Each copy finds its picture and each picture its copy, and pictures are far from each other."""
    own, far = torch.arange(len(logits)), -1e9
    found = near(logits, stored, cut)
    among_old = near(logits, old, cut).masked_fill(same, far)
    apart = near(stored, stored, cut).masked_fill(torch.eye(len(own), dtype=torch.bool), far)
    apart = torch.cat([apart, near(stored, old, cut).masked_fill(same, far)], 1)
    copies = functional.cross_entropy(torch.cat([found, among_old], 1), own)
    copies = copies + align * (1 - TEMPERATURE * found.diagonal()).mean()
    return copies + functional.cross_entropy(found.T, own) + apart.logsumexp(1).mean()


def batches(owners: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of BATCH pictures of different photographs, and rows of others to mix with, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(owners), generator=generator)[: 2 * BATCH]
        first = torch.from_numpy(np.sort(np.unique(owners[rows].numpy(), return_index=True)[1]))
        rows = rows[first][:BATCH]
        yield rows, torch.randint(len(owners), rows.shape, generator=generator)


def train(given: Pictures, stage: Stage, seed: int, start: rh.Hasher | None) -> rh.Hasher:
    """The hasher of the moving mean of the weights, from those of ``start`` or random ones."""
    net, changes = Trained(seed), Changes(seed + stage.seed + 1)
    if start is not None:
        net.hasher.load_state_dict(start.state_dict())
    optimiser = torch.optim.AdamW(net.parameters(), lr=stage.rate, weight_decay=DECAY)
    mean = {name: value.clone() for name, value in net.state_dict().items()}
    old, old_owners = torch.zeros(0, CUTS[-1]), torch.zeros(0, dtype=torch.int64)
    steps = stage.steps
    for step, (rows, mixed) in zip(range(steps), batches(given.owners, seed + 2), strict=False):
        share = step / steps
        for group in optimiser.param_groups:
            group["lr"] = stage.rate * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
        x = changes.new_pictures(given.pixels[rows].float() / 255, given.pixels[mixed].float() / 255)
        copies = functional.avg_pool2d(changes.copies(x), SIDE // 16)
        x = functional.avg_pool2d(x, SIDE // 16)
        net.eval().requires_grad_(False)
        if stage.eps:
            cut = CUTS[int(torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 1, generator=changes.generator))]
            eps = stage.eps * (min(1, share / stage.warm) if stage.warm else 1)
            copies = attacked(net, copies, net(x), eps, cut, changes)
        net.train().requires_grad_(True)
        stored, logits = net(torch.cat([x, copies])).split(len(x))
        same = given.owners[rows][:, None] == old_owners
        losses = [loss_of(logits, stored, old, same, cut, stage.align) for cut in CUTS]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        old = torch.cat([stored.detach(), old])[:QUEUE]
        old_owners = torch.cat([given.owners[rows], old_owners])[:QUEUE]
        new = 1 - min(0.99, (step + 1) / (step + 10))
        for name, value in net.state_dict().items():
            mean[name] = mean[name].lerp(value, new) if value.is_floating_point() else value
        if step % 200 == 0:
            flipped = float(((logits > 0) != (stored > 0)).float().mean())
            print(f"step {step} of {steps}: loss {loss.item():.3f}, bits flipped {flipped:.3f}", flush=True)
    net.load_state_dict(mean)
    return net.folded()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with ucmerced.tar and ucmerced.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--undefended", action="store_true", help="without the attack, to compare with")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps and collages, to try it")
    parser.add_argument(
        "--start", type=Path, help="the result of the first stage; only the second is trained"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    hasher = None if given.start is None else rh.Hasher.from_pretrained(given.start)
    for stage in STAGES[given.start is not None :]:
        stage = replace(stage, steps=int(stage.steps * given.scale))
        stage = replace(stage, eps=0.0) if given.undefended else stage
        shown = pictures(given.data, int(COLLAGES * given.scale), stage.things, given.seed)
        hasher = train(shown, stage, given.seed, hasher)
    assert hasher is not None
    about = HubCard(
        name="copy-hash",
        licence="apache-2.0",
        data="UC Merced (public domain), photographs of scikit-image and scikit-learn, generated collages",
        method="copies found among others, under adversarial training; scripts/train_copy_hash.py",
        finds_copies=True,
    )
    hasher.save_pretrained(given.out, size=64, about=about, overwrite=True)


if __name__ == "__main__":
    main()
