"""Encode a collection on a Ray cluster: parts go to workers, and those of a lost worker to others."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusthash.apps.collection.codes_card import ItemFormat
from robusthash.apps.collection.collection_index import add_part
from robusthash.apps.collection.collection_run import PART_SIZE, Encoding, EncodingJob, encode_part
from robusthash.apps.collection.encoded_parts import CodesFolder
from robusthash.apps.collection.image_source import Collection, ImagePart, open_source
from robusthash.apps.experiment.search_model import load, located
from robusthash.core.directory_lock import owned
from robusthash.core.runtime import Progress, silent
from robusthash.index import CodeIndex, open_index

_LOCK = "ray.lock"
_WAIT, _POLL = 30.0, 0.5  # seconds for a part that is in use, and between two attempts


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
    gpus: float = 0,
    **encoding: Any,
) -> dict[str, Any]:
    """``encode_collection`` by the workers of a Ray cluster; what a lost worker had is done by another.

    The cluster is the one that this program has joined (``ray.init``), or that of ``RAY_ADDRESS``, or else
    one of this machine alone. All its machines see ``run``, ``images`` and ``out`` under the same paths.

    Args:
        workers: that encode at the same time, each with a model of its own.
        index: address of an index that each part is added to, by id, as soon as it is encoded; it is made
            where there is none.
        gpus: accelerators that each worker takes, a part of one too, next to one core.
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
    prepared = EncodingJob.of(located(run), _absolute(images), _absolute(out), part_size, items)
    folder, names = prepared.folder, list(prepared.source.listings())
    if index is not None:
        with open_index(index, bits=prepared.model.bits) as opened:
            opened.add(folder.no_codes(), keys=[])  # refuses codes of another model before the work begins
    counts: dict[str, list[str]] = {"encoded": [], "unchanged": [], "failed": [], "in_use": []}
    with owned(folder.path, "encode on Ray", lock=_LOCK):
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="WARNING")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        job = f"encode for Ray job {ray.get_runtime_context().get_job_id()}"
        work = RayWork(located(run), _absolute(images), str(folder.path), part_size, how, job, index)
        # tasks, not actors: those of a lost machine go to any other, and no model waits for a free core
        rows = ray.data.from_items(
            [{"number": number, "part": name} for number, name in enumerate(names)],
            override_num_blocks=len(names),
        ).map(
            encode_row,
            fn_kwargs={"work": work},
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(names))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for done, row in enumerate(rows.iter_rows(), start=1):
            counts[row["became"]].append(row["part"])
            progress(done, len(names), "encoding parts")
        report = folder.write_report()
    numbers = {name: len(counts[name]) for name in ("encoded", "unchanged")}
    return {**report, **numbers, "in_use": sorted(counts["in_use"])}


@dataclass(frozen=True)
class RayWork:
    """All that a worker needs to know; paths are absolute."""

    run: str
    images: str
    out: str
    part_size: int
    how: Encoding
    job: str  # of all workers, in the lock of a part
    index: str | None


def encode_row(row: dict[str, Any], work: RayWork) -> dict[str, Any]:
    """Encode one part in a worker; as often as Ray likes, the result is the same."""
    return _worker(work).encode(row["number"])


@functools.lru_cache(maxsize=1)
def _worker(work: RayWork) -> _Worker:
    return _Worker(work)


class _Worker:
    """A process of the cluster with its model, which serves for all parts that it is given."""

    def __init__(self, work: RayWork) -> None:
        self._work, self._model = work, load(work.run)
        self._folder = CodesFolder.open(Path(work.out))
        self._parts = _Cursor(open_source(work.images, work.part_size))
        self._index: CodeIndex | None = None
        if work.index is not None:
            self._index = open_index(work.index, bits=self._model.bits)

    def encode(self, number: int) -> dict[str, Any]:
        part, until = self._parts.at(number), time.monotonic() + _WAIT
        self._folder.forget_lost(part.name, self._work.job)
        became = "in_use"
        while (
            became == "in_use" and time.monotonic() < until
        ):  # of the worker before this one, which is ending
            became = encode_part(self._model, part, self._folder, self._work.how, work=self._work.job)
            time.sleep(_POLL if became == "in_use" else 0)
        if self._index is not None and became in ("encoded", "unchanged"):
            add_part(self._index, self._folder, part.name)
        return {"part": part.name, "became": became}


class _Cursor:
    """The parts of a collection by number; one that follows is found without beginning again."""

    def __init__(self, source: Collection) -> None:
        self._source, self._next = source, 0
        self._coming = source.parts(0, 1)

    def at(self, number: int) -> ImagePart:
        """The part of a number; raises ValueError where there are fewer."""
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
