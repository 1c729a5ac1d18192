"""Measurements of the packaged hash for copies beside the perceptual hashes, a JSON file that grows by hash.

    python scripts/measure_copy_hash.py results/copy-hash.json --data DATA

DATA holds ``coco_mini.tar`` (246 photographs; none was trained on) and ``cifar10.npz`` (of its 10,000 test
photographs the distances of different ones are counted too: 52 million pairs with those of COCO). A hash that
is in the file already is passed over. Each is measured at the radius at which 1 of 10,000, and 1 of 100,000,
pairs of different photographs match: recall after everyday changes, under attack by ``robusthash audit`` (50
photographs at the side that the hash is given), and for ours under white-box attack of the 256 px file
through the resizing, and the share of all photographs that provably stay within the radius.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.targets import AuditOptions, Tier
from robusthash.apps.experiment.search_model import load
from robusthash.apps.image_hash.copy_hash import plain, withstand
from robusthash.apps.image_hash.entry_data import (
    CHANGES,
    SIDE,
    cifar_photographs,
    coco_photographs,
    pair_counts,
)
from robusthash.core.atomic_files import write_aside
from robusthash.core.hamming import as_words, pack
from robusthash.data.image_files import pixels_of
from robusthash.models.encoding import encode_signs
from robusthash.models.external.loaders import TITLES, perceptual
from robusthash.models.hasher import Hasher

RATES = {"1e-4": 1e-4, "1e-5": 1e-5}
LEVELS = (2, 4, 8)
CERTIFIED = (1, 2, 3, 4, 5, 6, 8)
QUERIED = 8  # the level at which black-box attacks make their 1,000 oracle queries
WHITE_BOX = ("guided-apgd", "flip", "mainstay", "evade", "evade-sharp")
Change = Callable[[Image.Image], Image.Image]


class Model:
    """A hash: its name, the side that attacks change, and packed codes of images."""

    def __init__(self, name: str, title: str, target: str, bits: int = 256) -> None:
        self.name, self.title, self.target, self.bits = name, title, target, bits
        self.library = perceptual(target) if target in TITLES else None
        if self.library is None:
            model = load(target, "cpu")
            self.hasher, self.side = shorter(model.hasher, bits), model.side
        else:
            self.bits, self.side = self.library.bits, 128

    def codes(self, images: Iterator[Image.Image] | list[Image.Image]) -> np.ndarray:
        """(N, bytes) uint8."""
        if self.library is not None:
            return np.stack([np.packbits(self.library.compute(np.asarray(one))) for one in images])
        parts = []
        several = iter(images)
        while part := list(itertools.islice(several, 256)):
            pixels = torch.stack([pixels_of(one, self.side) for one in part]).float() / 255
            parts.append(pack(encode_signs(self.hasher, "image", pixels)).numpy())
        return np.concatenate(parts)

    def audited(self) -> str | nn.Module:
        return self.target if self.library is not None else self.hasher


def shorter(hasher: Hasher, bits: int) -> Hasher:
    """The hasher of the first bits alone."""
    linear = hasher.heads["image"].linear
    linear.weight = nn.Parameter(linear.weight.detach()[:bits].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[:bits].clone())
    hasher.bits = hasher.heads["image"].bits = bits
    return hasher.eval()


class Resized(nn.Module):
    """A hasher of files of SIDE pixels: the resizing of its images is part of it."""

    def __init__(self, hasher: Hasher, side: int) -> None:
        super().__init__()
        self.hasher, self.side = hasher, side

    def forward(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        small = functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.hasher({"image": small})["image"].logits


# -------------------------------------------------------------------------------------------- measurements


def measured(model: Model, images: list[Image.Image], data: Path) -> dict[str, Any]:
    own = model.codes(images)
    counts = pair_counts(np.concatenate([own, model.codes(cifar_photographs(data))]), model.bits)
    shares = counts.cumsum() / counts.sum()
    radii = {name: int((shares <= rate).sum()) - 1 for name, rate in RATES.items()}
    result: dict[str, Any] = {
        "title": model.title,
        "bits": model.bits,
        "pairs": int(counts.sum()),
        "radius": radii,
        "false matches": {name: float(shares[radius]) for name, radius in radii.items()},
        "changes": {name: recall(own, model, images, change, radii) for name, change in CHANGES.items()},
        "milliseconds": milliseconds(model, images),
    }
    if radii["1e-5"] < 0:  # more pairs than that have the very same hash
        return {**result, "attacked": {}}
    result["attacked"] = attacked(model.audited(), model.side, images, radii["1e-5"])
    if model.library is None:
        result["certified"] = certified(model, images, radii["1e-5"])
    if model.name == "copy-hash":
        through = Resized(model.hasher, model.side)
        result["through resizing"] = attacked(through, SIDE, images, radii["1e-5"], None)
    return result


def certified(model: Model, images: list[Image.Image], radius: int) -> dict[str, float]:
    """By level of 255: share of the photographs that no change within it hides."""
    pixels = torch.stack([pixels_of(one, model.side) for one in images]).float() / 255
    held = {level: withstand(model.hasher, pixels, level / 255, model.bits, radius) for level in CERTIFIED}
    return {str(level): float(each.float().mean()) for level, each in held.items()}


def recall(
    own: np.ndarray, model: Model, images: list[Image.Image], change: Change, radii: dict[str, int]
) -> dict[str, float]:
    """Share of the changed photographs within each radius of their own; of ours, where neither is plain."""
    changed = [change(one) for one in images]
    apart = np.bitwise_count(as_words(model.codes(changed)) ^ as_words(own)).sum(1)
    shown = np.ones(len(images), dtype=bool)
    if model.library is None:
        for each in (images, changed):
            pixels = torch.stack([pixels_of(one, model.side) for one in each]).float() / 255
            shown &= ~plain(pixels).numpy()
    return {name: float(((apart <= radius) & shown).mean()) for name, radius in radii.items()}


def milliseconds(model: Model, images: list[Image.Image]) -> float:
    """Of one decoded photograph of SIDE pixels, median of 100."""
    times = []
    for one in images[:100]:
        start = time.perf_counter()
        model.codes([one])
        times.append(time.perf_counter() - start)
    return float(1000 * np.median(times))


def attacked(
    target: str | nn.Module, side: int, images: list[Image.Image], radius: int, queried: int | None = QUERIED
) -> dict[str, dict[str, float]]:
    """By level of 255: recall white box and after 1,000 oracle queries, and collisions, within the radius."""
    found = {}
    with TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        for number, image in enumerate(images):
            image.save(photos / f"{number:03d}.png")
        for level in LEVELS:
            tier = Tier("copy-hash", 50, 50, 20, 1000 if level == queried else 2, checked=1)
            options = AuditOptions(size=side, tier=tier, eps=level / 255, radius=radius)
            summary = run_audit(target, Path(folder) / "out", photos, options)
            rows = {row["name"]: row for row in summary["rows"]}
            kinds = {row["kind"]: row for row in summary["rows"]}
            found[str(level)] = {
                "white box": min(rows[name]["recognised"] for name in WHITE_BOX if name in rows),
                "saved as JPEG 95": kinds["hide-saved"]["recognised"],
                "collisions": kinds["imitate-worst"]["recognised"],
            }
            if level == queried:
                found[str(level)]["1,000 queries"] = rows["square"]["recognised"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="copy-hash", help="another folder than the packaged one")
    parser.add_argument("--only", action="append", help="names of the rows to measure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Model]] = {
        "copy-hash": lambda: Model("copy-hash", "copy-hash", given.model),
        "copy-hash-128": lambda: Model("copy-hash-128", "copy-hash", given.model, 128),
        "copy-hash-64": lambda: Model("copy-hash-64", "copy-hash", given.model, 64),
        **{name: (lambda name=name: Model(name, TITLES[name], name)) for name in TITLES if name != "ahash"},  # type: ignore[misc]
    }
    rows = json.loads(given.out.read_text()) if given.out.exists() else {}
    images = coco_photographs(given.data)
    for name in given.only or makers:
        if name in rows:
            continue
        rows[name] = measured(makers[name](), images, given.data)
        with write_aside(given.out) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, json.dumps(rows[name]["changes"]), json.dumps(rows[name]["attacked"]), flush=True)


if __name__ == "__main__":
    main()
