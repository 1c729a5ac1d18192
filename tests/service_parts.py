"""A trained run, a folder of pictures and their index, for the tests of the search service."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.index_run import build_index
from robusthash.apps.experiment.training_stages import train

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "size": 32, "train": 24, "query": 8, "database": 16},
    "hasher": {"bits": 16, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 12},
    "runtime": {"device": "cpu"},
}


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and a folder of pictures."""
    root = tmp_path_factory.mktemp("service")
    photos = root / "photos"
    photos.mkdir()
    for seed in range(12):
        (photos / f"{seed:02d}.png").write_bytes(picture(seed))
    return train(make_config(CONFIG), root / "runs").path, photos


@pytest.fixture
def index(parts: tuple[Path, Path], tmp_path: Path) -> Path:
    run, photos = parts
    build_index(tmp_path / "index", run, photos)
    return tmp_path / "index"


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, uvicorn.Server]]:
    """The address of a service that listens in a thread, and its server."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()
