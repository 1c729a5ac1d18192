"""Images -> codes -> index, by the hasher of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from robusthash.apps.experiment import stages
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.stages import Progress, silent
from robusthash.core.hamming import pack, sign
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData, Split
from robusthash.data.image_files import SUFFIXES, read_image, read_images
from robusthash.index import CodeIndex, open_index
from robusthash.models.hasher import Hasher, frozen

_AT_ONCE = 1024  # images decoded and encoded together


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
    card = run.card()
    with open_index(f"file:{directory}", bits=card["bits"], engine=engine) as index:
        if index.count():
            raise ValueError(
                f"{directory} already holds {index.count()} items; use 'index add', or another directory"
            )
        if images is not None:
            return _add(index, run, images, progress)
        data = stages.read_data(run.config, progress)
        index.add(stages.database_codes(run, progress), _payload(data, data.database))
        return dict(index.info())


def add_images(directory: Path, images: Path, run_path: Path, progress: Progress = silent) -> dict[str, Any]:
    """Add an image file or a folder of images; returns the index's info."""
    with open_index(f"file:{directory}", create=False) as index:
        return _add(index, load_run(run_path), images, progress)


def search_image(
    directory: Path, image: Path, run_path: Path, k: int, where: str | None = None
) -> list[dict[str, Any]]:
    """The k nearest items of an image file: id, distance, payload."""
    run = load_run(run_path)
    hasher, _ = stages.load_victim(run)
    with open_index(f"file:{directory}", create=False) as index:
        query = _encode(hasher, run, torch.stack([read_image(image, _side(run))]), first_id=0)
        allowed = yaml.safe_load(where) if where else None
        if allowed is not None and not isinstance(allowed, dict):
            raise ValueError(f"--where takes a mapping such as '{{label: cat}}', got {where!r}")
        found = index.search(query, k, where=allowed)
        ids = [item for item in found.ids[0].tolist() if item >= 0]
        payloads = index.payload(ids)
    return [
        {"id": item, "distance": distance, "payload": payload}
        for item, distance, payload in zip(ids, found.distances[0].tolist(), payloads, strict=False)
    ]


def _add(index: CodeIndex, run: Run, images: Path, progress: Progress) -> dict[str, Any]:
    """Encode and add in pieces, each safe on disk before the next; ids go on from the highest one."""
    if images.is_file():
        paths = [images]
    elif images.is_dir():
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    else:
        raise FileNotFoundError(f"{images} is neither an image nor a folder")
    if not paths:
        raise ValueError(f"{images} holds no image ({', '.join(sorted(SUFFIXES))})")
    hasher, _ = stages.load_victim(run)
    first = index.next_id()
    for start in range(0, len(paths), _AT_ONCE):
        chunk = paths[start : start + _AT_ONCE]
        pixels, kept = read_images(chunk, _side(run), on_error="skip")
        if len(kept):
            codes = _encode(hasher, run, pixels, first)
            index.add(codes, [{"path": str(chunk[position])} for position in kept])
            first += len(kept)
        progress(start + len(chunk), len(paths), "adding images")
    return dict(index.info())


def _encode(hasher: Hasher, run: Run, pixels: torch.Tensor, first_id: int) -> Codes:
    with frozen(hasher), torch.no_grad():
        logits = [
            hasher({"image": part.to(hasher.device).float() / 255})["image"].logits
            for part in pixels.split(256)
        ]
    ids = torch.arange(first_id, first_id + len(pixels))
    return Codes(pack(sign(torch.cat(logits))), hasher.bits, ids, run.card()["digest"])


def _side(run: Run) -> int:
    """Pixels a side of the images that the run was trained on."""
    return run.card()["image_size"][0]


def _payload(data: RetrievalData, split: Split) -> list[dict[str, Any]] | None:
    if split.labels is None:
        return None
    names = data.label_names
    return [{"labels": [names[i] for i in torch.nonzero(row).flatten().tolist()]} for row in split.labels]
