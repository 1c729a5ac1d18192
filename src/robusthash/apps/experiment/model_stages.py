"""The data and the trained model of a run: read, load, encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robusthash.apps.experiment.config import Config
from robusthash.apps.experiment.run_directory import Run
from robusthash.core.atomic_files import write_arrays
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, choose_device, keep_freed_memory, silent
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData
from robusthash.data.decoding_processes import read_by
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective


def prepare_process(config: Config) -> None:
    """Take as many threads as the config names, all by default; keep freed memory."""
    keep_freed_memory()
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)


def read_data(config: Config, progress: Progress = silent) -> RetrievalData:
    """The data set that the config names."""
    progress(0, 1, "reading data")
    with read_by(config.runtime.workers, config.runtime.cache_gib):
        data: RetrievalData = build("data", config.data)
    progress(1, 1, "reading data")
    return data


def image_size(data: RetrievalData) -> tuple[int, int] | None:
    """Height and width of image queries; None of texts and features."""
    pixels = data.query.batch(torch.arange(1)).inputs.get("image")
    return None if pixels is None or pixels.ndim != 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))


def load_hasher(run: Run) -> Hasher:
    """The trained hasher on the device of its config, without its objective."""
    return run.load_hasher().to(choose_device(run.config.runtime.device))


def load_victim(run: Run) -> tuple[Hasher, HashObjective]:
    """The trained hasher and its objective, on the device of its config."""
    hasher, objective = run.load_model()
    device = choose_device(run.config.runtime.device)
    return hasher.to(device), objective.to(device)


def encode(run: Run, progress: Progress = silent) -> dict[str, Path]:
    """Codes of every split, one ``.npz`` each: ``codes`` packed, ``bits``, ``ids``, ``labels``."""
    hasher, origin, written = load_hasher(run), run.card()["digest"], {}
    (run.path / "codes").mkdir(exist_ok=True)
    for name, split in read_data(run.config, progress).splits.items():

        def titled(done: int, total: int, title: str = f"encoding {name}") -> None:
            progress(done, total, title)

        by = hasher.for_database() if name == "database" else hasher
        for modality, codes in encode_split(by, split, progress=titled, origin=origin).items():
            path = run.path / "codes" / f"{name}.{modality}.npz"
            arrays = {"codes": codes.packed.numpy(), "bits": np.array(codes.bits), "ids": codes.ids.numpy()}
            if split.labels is not None:
                arrays["labels"] = split.labels.to(torch.uint8).numpy()
            write_arrays(path, **arrays)
            written[f"{name}.{modality}"] = path
    return written


def database_codes(run: Run, progress: Progress = silent) -> Codes:
    """Codes of the database split: those that the method learned, else by the run's hasher."""
    learned = run.learned_database()
    if learned is not None:
        return learned
    hasher = load_hasher(run)
    modality, split = hasher.modalities[0], read_data(run.config, progress).database

    def titled(done: int, total: int) -> None:
        progress(done, total, "encoding the database")

    origin, by = run.card()["digest"], hasher.for_database()
    return encode_split(by, split, modality=modality, progress=titled, origin=origin)[modality]
