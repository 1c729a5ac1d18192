"""A trained run, a folder of pictures and their index, for the tests of the search service."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
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
