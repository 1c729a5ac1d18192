"""Processes of ``torchrun`` divide the blocks of an evaluation; the records are those of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusthash.apps.experiment import assess_run, evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import load_run

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 26, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {
        "batch_size": 6,
        "attacks": [{"name": "pgd", "steps": 2}, {"name": "mainstay", "steps": 2}],
    },
    "runtime": {"device": "cpu", "threads": 1},
}

NOTED = """
import os
from pathlib import Path
from robusthash.apps.cli import main
from robusthash.apps.experiment.block_store import FolderStore
save = FolderStore.save
def noted(self, spec, restart, block, attacked):
    save(self, spec, restart, block, attacked)
    with open("saved-by-" + os.environ["RANK"], "a") as file:
        print(self.path(spec, restart, block), file=file)
FolderStore.save = noted
main()
"""
"""The command line, which notes the blocks that a process stores."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run without results."""
    return training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


def start(
    folder: Path, number: int, port: int, words: Sequence[object], noted: bool
) -> subprocess.Popen[str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    together = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    return subprocess.Popen(
        [sys.executable, *(("-c", NOTED) if noted else ("-m", "robusthash")), *map(str, words)],
        cwd=folder,
        env={**os.environ, **address, **together},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(folder: Path, *words: object, noted: bool = False) -> list[subprocess.Popen[str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    return [start(folder, number, port, words, noted) for number in (0, 1)]


def finished(both: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


def timeless(value: Any) -> Any:
    """Plain data without what differs between two runs of the same: times."""
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if "second" not in name and name != "created"}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def records(run: Path) -> dict[str, Any]:
    """The records of a run and all blocks, without times."""
    files = {name: timeless(json.loads((run / name).read_text())) for name in ("metrics.json", "assess.json")}
    for path in sorted(run.rglob("*.npz")):
        if {"attacks", "assess"} & set(path.relative_to(run).parts):
            with np.load(path) as block:
                files[str(path.relative_to(run))] = {
                    name: (str(block[name].dtype), block[name].tobytes())
                    for name in block
                    if name != "seconds"
                }
    return files


def test_two_processes_make_the_records_of_one(trained: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for copy in (alone, together):
        shutil.copytree(trained, copy)
    evaluation_stages.evaluate(load_run(alone))
    assess_run.assess(load_run(alone), "smoke", curve=True)
    finished(pair(tmp_path, "evaluate", together, noted=True))
    (first, _), second = finished(
        pair(tmp_path, "assess", together, "--tier", "smoke", "--eps-curve", "--json", noted=True)
    )
    assert json.loads(first)["run"] == str(together)
    assert second[0] == ""
    assert records(together) == records(alone)
    shares = [(tmp_path / f"saved-by-{number}").read_text().splitlines() for number in (0, 1)]
    assert not set(shares[0]) & set(shares[1]), "each block once"
    assert len(shares[0]) > len(shares[1]) > len(shares[0]) // 2, "of five blocks three and two"

    finished(pair(tmp_path, "attack", together, "{name: pgd, steps: 3}", "--out", "both.npz"))
    evaluation_stages.attack_to_file(load_run(alone), {"name": "pgd", "steps": 3}, tmp_path / "one.npz")
    with np.load(tmp_path / "both.npz") as both, np.load(tmp_path / "one.npz") as one:
        assert all(np.array_equal(both[name], one[name]) for name in one)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_and_the_finished_blocks_stay(
    victim: int, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    words = ("evaluate", run, "--attack", "{name: pgd, steps: 40}")
    both = pair(tmp_path, *words, "--attack", "{name: mainstay, steps: 100000}")
    deadline = time.monotonic() + 120
    while len(list(run.rglob("attacks/*/*.npz"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # into the next attack, whose blocks take minutes
    both[victim].kill()
    killed = time.monotonic()
    _, said = both[1 - victim].communicate(timeout=90)
    both[victim].communicate()
    assert both[1 - victim].returncode == 1
    assert time.monotonic() - killed < 60
    assert "another process of this work is gone (" in said
    assert "Traceback" not in said
    assert "c10d" not in said, "no stack of the library"
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("attacks/*/*.npz")}
    assert len(kept) == 5
    finished(pair(tmp_path, *words))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "pgd" in load_run(run).evaluated()


def test_shards_by_hand_are_refused_under_torchrun(trained: Path, tmp_path: Path) -> None:
    both = pair(tmp_path, "assess", trained, "--shard", "0/2")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "torchrun divides the work among its processes by itself; leave --shard out" in said[0]
    assert said[1] == ""
