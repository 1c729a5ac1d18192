"""What others have written to an index in a directory is read row by row: only what has changed."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robusthash.core import hamming
from robusthash.core.types import Codes
from robusthash.index import CodeIndex, open_index
from robusthash.index import sqlite_store as store_module
from robusthash.index.sqlite_store import Store

OTHER = """
import json, sys, torch
from robusthash.core.types import Codes
from robusthash.index import open_index
with open_index(sys.argv[1]) as index:
    for line in sys.stdin:
        call, ids, rows = json.loads(line)
        if call == "remove":
            index.remove(ids)
        else:
            packed = torch.tensor(rows, dtype=torch.uint8)
            index.add(Codes(packed, 32, torch.tensor(ids)), on_duplicate="update")
        print("done", flush=True)
"""


class OtherProcess:
    """A process that writes to an index, one call after the other."""

    def __init__(self, home: Path) -> None:
        command = [sys.executable, "-c", OTHER, f"file:{home}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, *call: Any) -> None:
        print(json.dumps(call), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def other(home: Path) -> Iterator[OtherProcess]:
    open_index(f"file:{home}", 32).close()
    other = OtherProcess(home)
    yield other
    other.process.stdin.close()
    assert other.process.wait(20) == 0


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many rows each reading of the store named; None where it read all."""
    seen, load = list[int | None](), Store.load

    def noted(store: Store, width: int, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        seen.append(None if ids is None else len(ids))
        return load(store, width, ids)

    monkeypatch.setattr(Store, "load", noted)
    return seen


def codes(count: int, seed: int = 0, first: int = 0, origin: str = "") -> Codes:
    draws = torch.Generator().manual_seed(seed)
    return Codes(
        hamming.pack(torch.randn(count, 32, generator=draws)), 32, torch.arange(count) + first, origin
    )


def exact(index: CodeIndex, held: dict[int, list[int]]) -> None:
    """The index answers as the oracle does on the items held, ties and order included."""
    queries = codes(5, 99)
    ids = torch.tensor(sorted(held), dtype=torch.int64)
    packed = torch.tensor([held[item] for item in sorted(held)], dtype=torch.uint8).reshape(-1, 4)
    near, distances = hamming.topk(queries.packed, packed, len(held), ids)
    found = index.search(queries, len(held) or 1)
    assert index.count() == len(held)
    if held:
        assert torch.equal(found.ids, near)
        assert torch.equal(found.distances, distances)


@pytest.mark.parametrize("engine", ["faiss", "numpy"])
def test_two_processes_that_write_by_turns(
    home: Path, other: OtherProcess, loads: list[int | None], engine: str
) -> None:
    draws, held = random.Random(7), {}
    with open_index(f"file:{home}", engine=engine) as index:
        for turn in range(60):
            ids = draws.sample(range(50), draws.randint(1, 6))
            rows = [[draws.choice((0, 1, 3, 255)) for _ in range(4)] for _ in ids]  # many ties
            if removes := draws.random() < 0.3:
                for item in ids:
                    held.pop(item, None)
            else:
                held.update(zip(ids, rows, strict=True))
            if draws.random() < 0.6:
                other.call("remove" if removes else "add", ids, rows)
            elif removes:
                index.remove(ids)
            else:
                index.add(
                    Codes(torch.tensor(rows, dtype=torch.uint8), 32, torch.tensor(ids)), on_duplicate="update"
                )
            if turn % 3:
                exact(index, held)
        exact(index, held)
    assert loads[0] is None
    assert None not in loads[1:]  # all rows were read once, at the start
    assert max(loads[1:]) < 40


def test_more_changes_than_are_remembered(
    home: Path, loads: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_REMEMBERED", 10)
    with open_index(f"file:{home}", 32) as index, open_index(f"file:{home}") as writer:
        held = codes(300)
        rows = {item: held.packed[item].tolist() for item in range(300)}
        for start in range(0, 300, 6):  # each short, all together long
            part = slice(start, start + 6)
            writer.add(Codes(held.packed[part], 32, held.ids[part]))
            if start == 60:
                exact(index, {item: rows[item] for item in range(66)})
        exact(index, rows)
        assert loads == [None, None, None, None]
        writer.remove([1, 2])
        del rows[1], rows[2]
        exact(index, rows)
        assert loads[4:] == [2]
        assert writer.remove([1, 2]) == 0  # nothing changed, nothing noted
        writer.remove(list(range(100, 120)))  # more than are remembered, in one write
        for item in range(100, 120):
            del rows[item]
        exact(index, rows)
        assert loads[5:] == [None]
    store = sqlite3.connect(home / "index.sqlite")
    assert store.execute("SELECT count(*) FROM changes").fetchone()[0] <= 3
    store.close()


def test_an_index_of_format_2_is_followed_too(home: Path, loads: list[int | None]) -> None:
    with open_index(f"file:{home}", 32) as index:
        index.add(codes(3), keys=["a", "b", "c"])
    with sqlite3.connect(home / "index.sqlite") as store:
        store.executescript("DROP TABLE changes; UPDATE meta SET value = '2' WHERE key = 'format'")
    store.close()
    with open_index(f"file:{home}") as index, open_index(f"file:{home}") as writer:
        assert (index.info()["format"], index.keys(), index.next_id()) == (2, ["a", "b", "c"], 3)
        del loads[:]
        writer.add(codes(1, 5), keys=["b"])
        assert index.search(codes(1, 5), 1).ids.tolist() == [[1]]
        assert index.info()["format"] == 3
        writer.remove(keys=["a"])
        assert index.search(codes(1), 3).ids.tolist()[0][2] == -1
        assert loads == [None, 1]


def test_another_origin_of_another_writer(home: Path) -> None:
    with open_index(f"file:{home}", 32) as index, open_index(f"file:{home}") as writer:
        index.add(codes(2, origin="one"))
        assert writer.remove([0, 1]) == 2
        writer.add(codes(2, 1, origin="two"))
        assert index.origin == "two"
        with pytest.raises(ValueError, match="origin"):
            index.search(codes(1, origin="one"), 1)


def test_the_approximate_engine_follows_others(home: Path, loads: list[int | None]) -> None:
    with open_index(f"file:{home}", 32, "faiss-ivf") as index, open_index(f"file:{home}") as writer:
        writer.add(codes(500))
        assert index.search(codes(1), 1).ids.tolist() == [[0]]
        del loads[:]
        writer.add(codes(1, 5, first=600))
        writer.remove([0])
        assert index.search(codes(1, 5), 1).ids.tolist() == [[600]]
        assert index.search(codes(1), 1).distances[0, 0] > 0
        assert index.count() == 500
        assert loads == [2]


@pytest.mark.parametrize("ids", ["5", '["x"]', "[-1]", "[9223372036854775808]", "{"])
def test_damaged_changes_are_named(home: Path, ids: str) -> None:
    with open_index(f"file:{home}", 32) as index:
        index.add(codes(3))
        assert index.count() == 3
        with sqlite3.connect(home / "index.sqlite") as store:
            store.execute("INSERT INTO changes VALUES (4, ?)", (ids,))
        store.close()
        with pytest.raises(ValueError, match=r"index\.sqlite is damaged: its list of changes is"):
            index.search(codes(1), 1)
