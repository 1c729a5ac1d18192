"""Encoding a collection: its time over that of the forward pass alone, and its memory by number of images.

Photographs as 500 x 375 JPEG files at 224 px, EfficientNet-Lite0, two processes that decode: the whole way
from the files to the folder of codes against the same net on pixels that lie in memory, in pairs that
alternate in order. Then the peak resident memory of a process that encodes 2,000, and 20,000, small images.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _timing import in_turn, seconds
from PIL import Image

import robusthash as rh
from robusthash.apps.collection.collection_index import add_codes
from robusthash.core.hamming import pack
from robusthash.data.base import as_input
from robusthash.data.image_files import read_images
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.models.encoding import encode_signs

NET, BITS, SIDE, BATCH, PROCESSES = "efficientnet-lite0", 64, 224, 64, 2
TARGET, FLAT = 1.10, 1.05


def photographs(folder: Path, count: int) -> list[Path]:
    """``count`` cuts of the embedded photographs, 500 x 375, each another file."""
    opened = [Image.open(photograph_path(each)).convert("RGB") for each in PHOTOGRAPHS]
    files = []
    for number, picture in zip(range(count), itertools.cycle(opened), strict=False):
        left, top = 3 * (number % 40), 2 * (number % 25)
        cut = picture.resize((620, 425)).crop((left, top, left + 500, top + 375))
        files.append(folder / f"{number:06d}.jpg")
        cut.save(files[-1], quality=90)
    return files


def against_forward(home: Path, count: int, pairs: int) -> dict[str, Any]:
    """The time of ``encode_collection`` over that of the forward pass, and images a second."""
    (home / "photos").mkdir()
    files = photographs(home / "photos", count)
    model = rh.SearchModel(rh.build_hasher(image=NET, bits=BITS), SIDE)
    pixels, made = read_images(files, SIDE)[0], itertools.count()

    def whole() -> None:
        out = home / f"codes-{next(made)}"
        rh.encode_collection(model, home / "photos", out, processes=PROCESSES, batch_size=BATCH)

    def forward() -> None:
        for few in pixels.split(BATCH):
            pack(encode_signs(model.hasher, "image", as_input(few)))

    compared = in_turn(whole, forward, pairs)
    detail = {
        "net": NET,
        "images": count,
        "pairs": pairs,
        "processes": PROCESSES,
        "threads": torch.get_num_threads(),
    }
    detail |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor_ratio": compared.ratio}
    detail |= {"whole_images_s": count / compared.ours_wall, "forward_images_s": count / compared.theirs_wall}
    return row("encode-collection-vs-forward", compared.wall_ratio, TARGET, detail)


def memory_of(folder: Path, count: int) -> dict[str, Any]:
    """Peak memory and time of a process that encodes ``count`` small images, and of loading their codes."""
    images = folder / f"images-{count}"
    for number in range(count):
        path = images / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(folder / "one.png")
    words = [sys.executable, __file__, "--child", str(images), str(folder / f"codes-{count}")]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def child(images: str, out: str) -> None:
    """Encode in a process of its own, and print what it took."""
    model = rh.SearchModel(rh.build_hasher(image={"name": "small", "width": 4}, bits=BITS), 32)
    wall, _ = seconds(lambda: rh.encode_collection(model, images, out, processes=1, part_size=1000))
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent before exec too
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    with rh.open_index(f"file:{out}-index", bits=BITS) as index:
        loading, _ = seconds(lambda: add_codes(index, out))
    print(json.dumps({"peak_mib": peak, "seconds": wall, "load_seconds": loading}))


def flat_memory(home: Path) -> dict[str, Any]:
    """The peak memory with 20,000 images over that with 2,000."""
    Image.new("RGB", (40, 30), "teal").save(home / "one.png")
    small, large = (memory_of(home, count) for count in (2_000, 20_000))
    detail = {"2000": small, "20000": large}
    return row("encode-collection-memory", large["peak_mib"] / small["peak_mib"], FLAT, detail)


def row(name: str, ratio: float, target: float, detail: dict[str, Any]) -> dict[str, Any]:
    return {"bench": name, "ratio": round(ratio, 4), "target": target, "better": "lower", "detail": detail}


def main() -> None:
    torch.set_num_threads(1)
    for work in (lambda home: against_forward(home, 512, 5), flat_memory):
        with tempfile.TemporaryDirectory() as home:
            print(json.dumps(work(Path(home))), flush=True)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
