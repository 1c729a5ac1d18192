"""An attack step of the small net in a process that keeps freed memory, beside one that hands it back.

Each side is a process of its own, since the setting cannot be taken back; both in turn, processor time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from robusthash.core.runtime import keep_freed_memory
from robusthash.models import build_hasher

SIDE, BATCH, STEPS, PAIRS = 48, 64, 30, 5
TARGET = 0.95


def seconds_of_a_step() -> float:
    """Processor time of a forward and backward pass to the input, after a few to warm up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hasher = build_hasher(bits=32, image={"name": "small", "width": 16}).eval().requires_grad_(False)
    images = torch.rand(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        leaf = images.detach().requires_grad_(True)
        torch.autograd.grad(hasher({"image": leaf})["image"].relaxed(1.0).sum(), leaf)

    for _ in range(3):
        step()
    start = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - start) / STEPS


def measured(kept: bool) -> float:
    """``seconds_of_a_step`` in a new process."""
    words = [sys.executable, __file__, "kept" if kept else "returned"]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def run() -> list[dict[str, Any]]:
    """One row: with over without."""
    measured(True)
    pairs = [(measured(True), measured(False)) for _ in range(PAIRS)]
    kept, returned = (statistics.median(side) for side in zip(*pairs, strict=True))
    detail = {
        "kept_ms": round(1e3 * kept, 3),
        "returned_ms": round(1e3 * returned, 3),
        "pixels": SIDE,
        "batch": BATCH,
        "pairs": PAIRS,
        "torch": torch.__version__,
    }
    ratio = round(statistics.median(one / two for one, two in pairs), 4)
    return [
        {"bench": "freed_memory/small", "ratio": ratio, "target": TARGET, "better": "lower", "detail": detail}
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        if sys.argv[1] == "kept":
            keep_freed_memory()
        sys.stdout.write(f"{seconds_of_a_step()}\n")
    else:
        for row in run():
            sys.stdout.write(f"{json.dumps(row)}\n")
