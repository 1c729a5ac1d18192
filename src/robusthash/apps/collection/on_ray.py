"""Encode a collection on a Ray cluster: parts go to workers, and those of a lost worker to others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robusthash.apps.collection.collection_index import add_part
from robusthash.apps.collection.collection_run import PART_SIZE, Encoding, Prepared, encode_part
from robusthash.apps.collection.encoded_parts import CodesFolder, ItemFormat
from robusthash.apps.collection.image_source import Part, Source, open_source
from robusthash.apps.experiment.search_model import load
from robusthash.core.directory_lock import owned
from robusthash.core.runtime import Progress, silent
from robusthash.index import CodeIndex, open_index

_LOCK = "ray.lock"


def encode_on_ray(
    run: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    workers: int = 2,
    index: str | None = None,
    items: ItemFormat = "jsonl",
    part_size: int = PART_SIZE,
    progress: Progress = silent,
    resources: Mapping[str, float] | None = None,
    **encoding: Any,
) -> dict[str, Any]:
    """``encode_collection`` by the workers of a Ray cluster; what a lost worker had is done by another.

    The cluster is the one that this program has joined (``ray.init``), or that of ``RAY_ADDRESS``, or else
    one of this machine alone. All its machines see ``run``, ``images`` and ``out`` under the same paths.

    Args:
        workers: that encode at the same time, each with a model of its own.
        index: address of an index that each part is added to, by id, as soon as it is encoded; it is made
            where there is none.
        resources: of each worker, in Ray's words: ``{"num_gpus": 1}``; by default ``{"num_cpus": 1}``.
        encoding: options of ``Encoding``; workers decode in threads unless ``processes`` says otherwise.

    Returns:
        As ``encode_collection``.

    Raises:
        ImportError: Ray is not installed.
        ValueError, FileNotFoundError: as ``encode_collection``; another call encodes on Ray into ``out``.
    """
    ray = _ray()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    how = Encoding(**{"processes": 0, **encoding})
    prepared = Prepared.of(_absolute(run), _absolute(images), _absolute(out), part_size, items)
    folder, names = prepared.folder, prepared.source.names()
    if index is not None:
        with open_index(index, bits=prepared.model.bits) as opened:
            opened.add(folder.no_codes(), keys=[])  # refuses codes of another model before the work begins
    counts: dict[str, list[str]] = {"encoded": [], "unchanged": [], "failed": [], "in_use": []}
    with owned(folder.path, "encode on Ray", lock=_LOCK):
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        job = f"encode for Ray job {ray.get_runtime_context().get_job_id()}"
        rows = ray.data.from_items(
            [{"number": number, "part": name} for number, name in enumerate(names)],
            override_num_blocks=len(names),
        ).map(
            PartEncoder,
            fn_constructor_args=(_absolute(run), _absolute(images), str(folder.path), part_size),
            fn_constructor_kwargs={"how": how, "job": job, "index": index},
            concurrency=min(workers, len(names)),
            max_restarts=-1,
            max_task_retries=-1,
            **(resources or {"num_cpus": 1}),
        )
        for done, row in enumerate(rows.iter_rows(), start=1):
            counts[row["became"]].append(row["part"])
            progress(done, len(names), "encoding parts")
        report = folder.write_report()
    numbers = {name: len(counts[name]) for name in ("encoded", "unchanged")}
    return {**report, **numbers, "in_use": sorted(counts["in_use"])}


class PartEncoder:
    """A worker: encodes the parts that it is given, and adds them to an index where there is one."""

    def __init__(
        self, run: str, images: str, out: str, part_size: int, how: Encoding, job: str, index: str | None
    ) -> None:
        self._model, self._folder = load(run), CodesFolder.open(Path(out))
        self._parts, self._how, self._job = _Cursor(open_source(images, part_size)), how, job
        self._index: CodeIndex | None = None
        if index is not None:
            self._index = open_index(index, bits=self._model.bits)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the part of a row; as often as Ray likes, the result is the same."""
        part = self._parts.at(row["number"])
        self._folder.forget_lost(part.name, self._job)
        became = encode_part(self._model, part, self._folder, self._how, work=self._job)
        if self._index is not None and became in ("encoded", "unchanged"):
            add_part(self._index, self._folder, part.name)
        return {"part": part.name, "became": became}


class _Cursor:
    """The parts of a collection by number; one that follows is found without beginning again."""

    def __init__(self, source: Source) -> None:
        self._source, self._next = source, 0
        self._coming = source.parts(0, 1)

    def at(self, number: int) -> Part:
        if number < self._next:
            self._coming, self._next = self._source.parts(0, 1), 0
        for part in self._coming:
            self._next += 1
            if self._next > number:
                return part
        raise ValueError(f"part {number} of the collection is gone since it was listed")


def _absolute(path: str | Path) -> str:
    """A path that means the same in a worker, whose working folder is another."""
    return os.path.abspath(path)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("encoding on a cluster needs Ray: pip install 'robusthash[ray]'") from None
    return ray
