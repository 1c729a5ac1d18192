"""Images -> codes -> index, by the hasher of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.apps.experiment.model_stages import database_codes, load_hasher, read_data
from robusthash.apps.experiment.run_directory import Run, load_run, write_json
from robusthash.core.atomic_files import write_aside
from robusthash.core.hamming import pack
from robusthash.core.limited_files import parse_yaml, read_json
from robusthash.core.runtime import Progress, silent
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData, Split
from robusthash.data.image_files import SUFFIXES, read_image, read_images
from robusthash.index import CodeIndex, open_index
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher

_AT_ONCE = 1024  # images decoded and encoded together
_RUN_FILE = "run.json"  # in the directory of an index: the run whose hasher made its codes


def build_index(
    directory: Path,
    run_path: Path,
    images: Path | None = None,
    engine: str = "faiss",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Index the run's database split, or a folder of images; returns the index's info.

    Raises:
        ValueError: the directory holds an index already.
    """
    run = load_run(run_path)
    with open_index(f"file:{directory}", bits=run.card()["bits"], engine=engine) as index:
        if count := index.count():
            raise ValueError(
                f"{directory} already holds {count} items; use 'index add', or another directory"
            )
        write_json(directory / _RUN_FILE, {"run": str(run.path.resolve())})
        if images is not None:
            return _add(index, run, images, progress)
        data = read_data(run.config, progress)
        index.add(database_codes(run, progress), _payload(data, data.database))
        return dict(index.info())


def add_images(
    directory: Path, images: Path, run_path: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Add an image file or a folder of images; returns the index's info."""
    with open_index(f"file:{directory}", create=False) as index:
        return _add(index, run_of_index(directory, run_path), images, progress)


def search_image(
    directory: Path, image: Path, run_path: Path | None = None, k: int = 10, where: str | None = None
) -> list[dict[str, Any]]:
    """The k nearest items of an image file: id, distance, payload."""
    allowed = parse_yaml(where, f"--where {where!r}") if where else None
    if allowed is not None and not isinstance(allowed, dict):
        raise ValueError(f"--where takes a mapping such as '{{label: cat}}', got {where!r}")
    with open_index(f"file:{directory}", create=False) as index:
        run = run_of_index(directory, run_path)
        pixels = read_image(image, _side(run))[None]
        ranking = index.search(_encode(load_hasher(run), run, pixels), k, where=allowed)
        ids = [item for item in ranking.ids[0].tolist() if item >= 0]
        payloads = index.payload(ids)
    rows = zip(ids, ranking.distances[0].tolist(), payloads, strict=False)
    return [{"id": item, "distance": distance, "payload": payload} for item, distance, payload in rows]


def run_of_index(directory: Path, run_path: Path | None = None) -> Run:
    """The run whose hasher encodes for an index: the one given, else the one that built it."""
    if run_path is not None:
        return load_run(run_path)
    file = directory / _RUN_FILE
    builder = Path(read_json(file)["run"]) if file.is_file() else directory.resolve().parent
    if not (builder / "config.yaml").is_file():
        raise ValueError(
            f"{directory} does not say which run made its codes, or it has moved; name it with --run"
        )
    return load_run(builder)


def encode_images(
    run: Run, images: Sequence[Path], progress: Progress = silent
) -> Iterator[tuple[Codes, list[Path]]]:
    """Codes of image files and of folders of them, in pieces, with the paths of the files.

    Files that cannot be read are left out, with a warning that names them.

    Raises:
        FileNotFoundError: neither an image nor a folder.
        ValueError: a folder without images.
    """
    paths = [path for given in images for path in _files(given)]
    hasher = load_hasher(run)
    for start in range(0, len(paths), _AT_ONCE):
        chunk = paths[start : start + _AT_ONCE]
        pixels, readable = read_images(chunk, _side(run), on_error="skip")
        if len(readable):
            yield _encode(hasher, run, pixels), [chunk[position] for position in readable]
        progress(start + len(chunk), len(paths), "encoding images")


def save_codes(out: Path, bits: int, codes: Mapping[Path, bytes]) -> None:
    """Write packed codes of images to an ``.npz``: ``codes``, ``bits``, ``ids``, ``paths``."""
    packed = np.array([list(code) for code in codes.values()], dtype=np.uint8)
    arrays = {"codes": packed, "bits": np.array(bits), "ids": np.arange(len(codes))}
    with write_aside(out) as aside:
        np.savez(aside, allow_pickle=False, **arrays, paths=np.array([str(path) for path in codes]))


def _files(images: Path) -> list[Path]:
    """An image file, or the images of a folder and its subfolders by name."""
    if images.is_file():
        return [images]
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is neither an image nor a folder")
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{images} holds no image ({', '.join(sorted(SUFFIXES))})")
    return paths


def _add(index: CodeIndex, run: Run, images: Path, progress: Progress) -> dict[str, Any]:
    """Encode and add in pieces, each safe on disk before the next; ids go on from the highest one."""
    for codes, paths in encode_images(run, [images], progress):
        ids = codes.ids + index.next_id()
        index.add(Codes(codes.packed, codes.bits, ids, codes.origin), [{"path": str(path)} for path in paths])
    return dict(index.info())


def _encode(hasher: Hasher, run: Run, pixels: Tensor) -> Codes:
    """Codes of (N, 3, H, W) uint8 images."""
    signs = torch.cat([encode_signs(hasher, "image", part.float() / 255) for part in pixels.split(256)])
    return Codes(pack(signs), hasher.bits, torch.arange(len(pixels)), run.card()["digest"])


def _side(run: Run) -> int:
    """Pixels a side of the images that the run was trained on."""
    return run.card()["image_size"][0]


def _payload(data: RetrievalData, split: Split) -> list[dict[str, Any]] | None:
    if split.labels is None:
        return None
    names = data.label_names
    return [{"labels": [names[i] for i in torch.nonzero(row).flatten().tolist()]} for row in split.labels]
