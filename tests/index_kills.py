"""Kills of ``index build`` and ``index add`` by command line, and what must hold after each.

As a script, for counts that are too long for a test:
``python tests/index_kills.py RUN --images 20000 --kills 30 --writers 2``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from robusthash.apps.experiment.index_run import encode_images
from robusthash.apps.experiment.search_model import load
from robusthash.core.types import Codes
from robusthash.index import open_index


def make_library(folder: Path, count: int, side: int = 24) -> Path:
    """``count`` different small JPEG files, in subfolders of a thousand."""
    chance = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(path, quality=90)
    return folder


@dataclass
class Writers:
    """Command lines at work on one index, killed at random moments and started again."""

    run: Path
    library: Path
    index: Path
    seed: int = 0
    kills: int = 0
    midway: int = 0  # kills that hit a writer after its first item and before its last
    seen: dict[str, int] = field(default_factory=dict)  # ids by key that a reader has seen

    def command(self, number: int) -> list[str]:
        """The first writer builds, and the others add the same folder."""
        verb = ["build", str(self.index), "--run", str(self.run), "--images"]
        if number and (self.index / "run.json").exists():
            verb = ["add", str(self.index)]
        return [sys.executable, "-m", "robusthash", "index", *verb, str(self.library), "--json"]

    def start(self, number: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(number), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def held(self) -> dict[str, int]:
        """Ids by key, as another process reads them now."""
        file = self.index / "index.sqlite"
        if not file.exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=60)) as store:
            held = dict(store.execute("SELECT key, id FROM keys").fetchall())
            assert store.execute("SELECT count(*) FROM items").fetchone() == (len(held),)
        return held

    def check(self) -> None:
        """What a reader has seen is there still, under its id, and no id twice."""
        held = self.held()
        assert self.seen.items() <= held.items()
        assert len(set(held.values())) == len(held)
        self.seen = held

    def kill_at_random(self, kills: int, writers: int, longest: float) -> None:
        """Kill one of the writers, drawn, at a drawn moment; all others are at work meanwhile.

        Four of five times the moment is up to ``longest`` seconds after some write was seen, so that slow
        machines are not killed in their start alone.
        """
        chance, total = random.Random(self.seed), self.total
        working = {number: self.start(number) for number in range(writers)}
        for _ in range(kills):
            patient, before = chance.random() < 0.8, len(self.held())
            while (
                patient and len(self.held()) == before and any(one.poll() is None for one in working.values())
            ):
                time.sleep(0.05)
            time.sleep(chance.uniform(0, longest))
            number = chance.randrange(writers)
            self.seen |= (held := self.held())
            working[number].kill()
            _, err = working[number].communicate()
            assert working[number].returncode in (0, -signal.SIGKILL), err
            self.kills += 1
            self.midway += 0 < len(held) < total
            self.check()
            working[number] = self.start(number)
        for process in working.values():
            out, err = process.communicate()
            assert process.returncode == 0, err
            assert json.loads(out)["count"] == total

    @property
    def total(self) -> int:
        return sum(1 for _ in self.library.rglob("*.jpg"))

    def finished(self) -> None:
        """Each image is there once, with its own code, and is found by it."""
        self.check()
        paths = {str(path): None for path in self.library.rglob("*.jpg")}
        assert self.seen.keys() == paths.keys()
        model = load(self.run)
        with open_index(f"file:{self.index}", create=False) as index:
            for codes, files in encode_images(model, [self.library]):
                ids = torch.tensor([self.seen[str(file)] for file in files])
                assert index.payload(ids) == [{"path": str(file)} for file in files]
                for row, item in enumerate(ids.tolist()):
                    one = Codes(codes.packed[row : row + 1], codes.bits, codes.ids[row : row + 1])
                    assert index.search(one, 1, where=[item]).distances.tolist() == [[0]]
        with contextlib.closing(sqlite3.connect(self.index / "index.sqlite")) as store:
            assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Children take one thread each, so that several share a small machine."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds from a write to a kill")
    parser.add_argument("--rounds", type=int, default=1, help="libraries one after the other")
    given = parser.parse_args()
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as home, one_thread():
            library, start = make_library(Path(home, "library"), given.images), time.monotonic()
            writers = Writers(given.run.resolve(), library, Path(home, "index"), seed=number)
            writers.kill_at_random(given.kills, given.writers, given.longest)
            took = time.monotonic() - start
            writers.finished()
            facts = {"images": given.images, "kills": writers.kills, "midway": writers.midway}
            print(json.dumps({**facts, "seconds": round(took, 1), "held": len(writers.seen)}), flush=True)


if __name__ == "__main__":
    main()
