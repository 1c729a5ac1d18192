"""Images decoded by worker processes: the same numbers, and a worker that dies ends in a line or is replaced."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import load_run
from robusthash.apps.experiment.training_stages import train
from robusthash.core.atomic_files import is_alive
from robusthash.data import RetrievalData, batches, load_data
from robusthash.data.decoding_processes import DecodingProcesses, decoding_processes, read_by
from robusthash.data.image_files import FileSource, UnreadableImage

SIDE, COUNT = 8, 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, an image a file."""
    root = tmp_path_factory.mktemp("photos")
    noise = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(COUNT // 2):
            pixels = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=noise)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root


def read(root: Path, workers: int, cache_gib: float | None = None) -> RetrievalData:
    with read_by(workers, cache_gib):
        return load_data("folder", root=root, size=SIDE)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("held", [0, 11, COUNT])
def test_neither_workers_nor_the_cache_change_a_pixel(photos: Path, workers: int, held: int) -> None:
    plain, data = (
        load_data("folder", root=photos, size=SIDE),
        read(photos, workers, held * 3 * SIDE**2 / 2**30),
    )
    assert isinstance(data.train.source, FileSource)
    assert len(data.train.source.images) == held
    assert data.train.source.processes == workers
    assert data.fingerprint() == plain.fingerprint()
    for one, other in zip(batches(plain.train, 7), batches(data.train, 7), strict=True):
        assert torch.equal(one.inputs["image"], other.inputs["image"])


def test_workers_that_are_killed_are_replaced(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, plain = read(photos, 2, 0.0), load_data("folder", root=photos, size=SIDE)
    for pid in list(decoding_processes(2)._pool._processes):  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
    rows = torch.tensor([3, 0, 2])
    with caplog.at_level(logging.WARNING):
        found = data.train.batch(rows)
    assert torch.equal(found.inputs["image"], plain.train.batch(rows).inputs["image"])
    assert "a process that decodes images was killed or died; others take its place" in caplog.text


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_end_in_one_line_that_names_the_remedy() -> None:
    began = time.monotonic()
    with pytest.raises(
        ChildProcessError, match=r"at 0 and the 4 files after it; take fewer \(runtime.workers, now 2"
    ):
        DecodingProcesses(2).map(die, range(5))
    assert time.monotonic() - began < 60


def test_a_file_that_is_damaged_later_is_named_by_a_worker_too(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    data = read(tmp_path, 2, 0.0)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(UnreadableImage, match=r"cannot read .*\.png as an image"):
        data.query.batch(torch.arange(3))


PARENT = """
import os, sys, time
from robusthash.data.decoding_processes import decoding_processes
if __name__ == "__main__":
    print(*decoding_processes(2).map(abs, range(8)), *decoding_processes(2)._pool._processes, flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()][8:]
    assert workers
    assert all(is_alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)


def test_a_run_is_the_same_with_and_without_workers(photos: Path, tmp_path: Path) -> None:
    raw = {
        "name": "small",
        "data": {"name": "folder", "root": str(photos), "size": 16},
        "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
        "training": {"epochs": 2, "batch_size": 8, "augment": "flip-crop"},
    }
    alone = train(make_config(raw), tmp_path / "alone")
    (tmp_path / "recipe.yaml").write_text(str(raw))  # YAML reads a dict of Python
    command = [sys.executable, "-m", "robusthash", "run", "recipe.yaml", "--runs", "by"]
    options = ["--set", "runtime.workers=2", "--set", "runtime.cache_gib=0.00001"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "by" / "small").iterdir()
    by_workers = load_run(path)
    assert by_workers.id == alone.id
    assert by_workers.card()["digest"] == alone.card()["digest"]
    assert by_workers.results()


def test_settings_out_of_range_are_refused() -> None:
    for options in ({"workers": -1}, {"cache_gib": -1.0}, {"cache_gib": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 0"), read_by(**options):
            pass
