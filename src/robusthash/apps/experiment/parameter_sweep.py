"""Sweeps: one recipe over values of its settings and over seeds, as ordinary runs in a process each.

A point is trained and evaluated on one thread in a new process, so that it can be stopped, resumed and read
like any run. The sweep itself keeps only ``sweep.json`` and the output of the processes.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import Config, ConfigError, load_config, value_of
from robusthash.apps.experiment.run_directory import load_run, write_json
from robusthash.apps.experiment.run_files import reading
from robusthash.apps.experiment.tables import Cell, cell_of
from robusthash.apps.reports.cell_text import markdown_table
from robusthash.core.directory_lock import owned
from robusthash.core.limited_files import read_json
from robusthash.core.out_of_memory import REMEDY, out_of_memory
from robusthash.core.runtime import Progress, digest, silent
from robusthash.metrics.results import EvalResult, headline_of

State = Literal["waiting", "done", "failed"]


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes, as text that ``--set`` understands."""

    path: str
    values: tuple[str, ...]


def read_axis(text: str) -> Axis:
    """``training.outer.lam=0.1,0.5,0.9``; values with commas of their own are written as a YAML list of them.

    Raises:
        ValueError: no value, a value twice, or a setting that makes no other model.
    """
    path, equals, listed = text.partition("=")
    if not equals or not path or not listed:
        raise ValueError(f"--over takes section.key=value,value,..., got {text!r}")
    if listed.startswith("["):
        dumped = [yaml.safe_dump(value, default_flow_style=True) for value in _listed(text, listed)]
        values = tuple(value.strip().removesuffix("...").strip() for value in dumped)
    else:
        values = tuple(value.strip() for value in listed.split(","))
    if len(set(values)) < len(values) or not all(values):
        raise ValueError(f"--over {text}: every value once, and none empty")
    if path == "runtime.seed":
        raise ValueError("seeds are swept by --seeds 0,1,2, so that the table can average over them")
    if path.partition(".")[0] in ("evaluation", "runtime", "name"):
        remedy = "sweep settings of data, hasher or training, and set the rest with --set"
        raise ValueError(f"--over {path} makes no other model, and all points would share one run; {remedy}")
    return Axis(path, values)


def _listed(text: str, listed: str) -> list[Any]:
    values = value_of(listed)
    if not isinstance(values, list):
        raise ValueError(f"--over {text}: {listed!r} is no list")
    return values


def whole_numbers(text: str) -> list[int]:
    """``0,1,2``. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--seeds takes whole numbers with commas, 0,1,2, got {text!r}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: dict[str, str]
    seed: int
    sets: tuple[str, ...]  # all overrides of the recipe
    config: Config

    @property
    def name(self) -> str:
        settings = [f"{path.rpartition('.')[2]}={value}" for path, value in self.values.items()]
        return " ".join([*settings, f"seed={self.seed}"])

    @property
    def key(self) -> str:
        return digest(self.config.model_dump(mode="json"))

    @property
    def parent(self) -> str:
        """Key of the run that training starts from, if a recipe makes it: never by two points at once."""
        config, named = self.config, self.config.training.init_from
        if named is None or Path(named).suffix not in (".yaml", ".yml"):
            return ""
        net = config.hasher.model_dump(mode="json", include={"bits", "image", "text", "head"})
        return f"parent-{digest([named, config.data, net, config.runtime.model_dump(mode='json')])}"


@dataclass(frozen=True)
class Outcome:
    """State of a point, its run directory once it is done, its error where it failed."""

    values: dict[str, str]
    seed: int
    key: str
    state: State = "waiting"
    run: str = ""
    error: str = ""

    def results(self) -> dict[str, EvalResult]:
        """Evaluated results of a point that is done."""
        return load_run(self.run).evaluated()


def points_of(
    recipe: Path, axes: Sequence[Axis], seeds: Sequence[int], sets: Sequence[str] = ()
) -> list[Point]:
    """All points in order, every config checked before anything runs.

    Raises:
        ConfigError: an override that the recipe does not take.
        ValueError: points that are the same model, or seeds that come twice or not at all.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds takes different whole numbers, got {list(seeds)}")
    models: dict[str, Point] = {}
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = {axis.path: value for axis, value in zip(axes, combination, strict=True)}
        swept = [f"{path}={value}" for path, value in values.items()]
        for seed in seeds:
            overrides = (*sets, *swept, f"runtime.seed={seed}", "runtime.threads=1")
            point = Point(values, seed, overrides, load_config(recipe, overrides))
            identity = point.config.model_id(point.config.training.init_from or "")
            if identity in models:
                other = models[identity].name
                raise ValueError(f"the points {other!r} and {point.name!r} are the same model; name one")
            models[identity] = point
    return list(models.values())


class Sweep:
    """A recipe over its points, in several processes.

    Args:
        recipe: the file; it is read again by each process.
        runs: folder of all runs, of points and of the runs that they start from.
        out: folder of ``sweep.json`` and of the logs.
        jobs: processes at a time.
    """

    def __init__(self, recipe: Path, points: Sequence[Point], runs: Path, out: Path, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.recipe, self.points, self.runs, self.out, self.jobs = recipe, list(points), runs, out, jobs
        self.outcomes = {point.key: Outcome(point.values, point.seed, point.key) for point in self.points}

    def run(self, progress: Progress = silent) -> list[Outcome]:
        """Run what is not done yet; a failing point is stored with its error and the others go on.

        An exception (Ctrl-C) stops all processes first, and a kill ends them; the same call resumes.

        Raises:
            InUse: another process runs a sweep in the same folder.
        """
        with owned(self.out, "sweep"):
            return self._run(progress)

    def _run(self, progress: Progress) -> list[Outcome]:
        (self.out / "logs").mkdir(exist_ok=True)
        self._recall()
        remaining = [point for point in self.points if self.outcomes[point.key].state != "done"]
        parents = {point.parent: point for point in remaining if point.parent}
        with _processes(self.jobs) as start:
            trained = self._work(start, parents, "prepare", progress, "parents")  # before any point
            blocked = {key: error for key, _, error in trained if error}
            points: dict[str, Point] = {}
            for point in remaining:
                if point.parent in blocked:
                    error = f"its parent {point.config.training.init_from} failed: {blocked[point.parent]}"
                    self._store(point.key, "failed", error=error)
                else:
                    points[point.key] = point
            for key, run, error in self._work(start, points, "run_all", progress, "points of the sweep"):
                self._store(key, "failed" if error else "done", run, error)
        return [self.outcomes[point.key] for point in self.points]

    def _recall(self) -> None:
        """Take over points that an earlier call finished, where their results still exist."""
        path, by_key = self.out / "sweep.json", {point.key: point for point in self.points}
        olds: list[Outcome] = []
        if path.is_file():
            with reading(path, "delete it; what its runs hold is taken from them"):
                olds = [Outcome(**entry) for entry in read_json(path)["points"]]
        for old in olds:
            files = [Path(old.run) / name for name in ("config.yaml", "metrics.json")]
            if old.state != "done" or old.key not in by_key or not all(file.is_file() for file in files):
                continue
            if load_run(old.run).config == by_key[old.key].config:  # not evaluated under another one since
                self.outcomes[old.key] = old

    def _store(self, key: str, state: State, run: str = "", error: str = "") -> None:
        self.outcomes[key] = replace(self.outcomes[key], state=state, run=run, error=error)
        points = [asdict(self.outcomes[point.key]) for point in self.points]
        document = {"recipe": str(self.recipe), "runs": str(self.runs), "points": points}
        write_json(self.out / "sweep.json", document)

    def _work(
        self, start: Start, points: Mapping[str, Point], stage: str, progress: Progress, title: str
    ) -> Iterator[tuple[str, str, str]]:
        """Start a stage of each point; yields (key, run directory, error) as each ends."""
        total = len(points) if stage == "prepare" else len(self.points)
        done, futures = total - len(points), {}
        for key, point in points.items():
            log = self.out / "logs" / f"{key}.log"
            futures[start(stage, self.recipe, point.sets, self.runs, log)] = key
        progress(done, total, title)
        for future in as_completed(futures):
            done += 1
            progress(done, total, title)
            yield futures[future], *future.result()


_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

Ended = tuple[str, str]
"""Run directory, and the error in one line."""

Start = Callable[[str, Path, tuple[str, ...], Path, Path], Future[Ended]]


def _execute(stage: str, recipe: Path, sets: Sequence[str], runs: Path, log: Path) -> Ended:
    """A stage of a recipe, in a process of its own; all output goes to ``log``."""
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            outcome = getattr(training_stages, stage)(load_config(recipe, sets), runs, base=recipe.parent)
            return (str(outcome.path) if stage == "run_all" else ""), ""
        except Exception as error:
            traceback.print_exc()
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            text = " ".join(str(message).split()) or type(error).__name__
            return "", f"{text}; {REMEDY}" if out_of_memory(error) and REMEDY not in text else text


def _in_process(*task: Any) -> Ended:
    """Outcome of a task in a new process; a pool of one, so that a killed process ends no other task."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_belong, initargs=(os.getpid(),)) as pool:
        try:
            return pool.submit(_execute, *task).result()
        except BrokenProcessPool:
            return "", f"its process was killed, perhaps for want of memory; see {task[-1]}"


def _belong(parent: int) -> None:
    """Let this process end with the sweep, however that ends, and leave Ctrl-C to it."""
    os.setsid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform == "linux":  # at once, also while the interpreter is busy
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _processes(jobs: int) -> Iterator[Start]:
    """Start tasks, ``jobs`` at a time and one thread each; an exception in the block stops them all."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # new processes inherit it
    futures: list[Future[Ended]] = []
    with ThreadPoolExecutor(jobs) as queue:

        def start(*task: Any) -> Future[Ended]:
            futures.append(queue.submit(_in_process, *task))
            return futures[-1]

        try:
            yield start
        except BaseException:
            _stop(futures)
            raise
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})


def _stop(futures: Sequence[Future[Ended]]) -> None:
    """Interrupt the processes, which keep their last checkpoint; after ten seconds kill them."""
    for future in futures:
        future.cancel()
    interrupted: set[int] = set()
    patience = time.monotonic() + 10
    while wait(futures, timeout=0.1).not_done:
        for process in multiprocessing.active_children():
            if time.monotonic() > patience:
                process.kill()
            elif process.pid is not None and process.pid not in interrupted:
                interrupted.add(process.pid)
                os.kill(process.pid, signal.SIGINT)


@dataclass(frozen=True)
class SweepRow:
    """One setting of a sweep: its results over the seeds that are done."""

    values: dict[str, str]
    cells: dict[str, Cell]
    seeds: tuple[int, ...]
    failed: int


def sweep_rows(outcomes: Sequence[Outcome]) -> list[SweepRow]:
    """Results by setting, averaged over seeds with the intervals of ``robusthash table``."""
    settings: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        settings.setdefault(json.dumps(outcome.values), []).append(outcome)
    rows = []
    for members in settings.values():
        done = [outcome for outcome in members if outcome.state == "done"]
        results = [outcome.results() for outcome in done]
        shared = [name for name in results[0] if all(name in other for other in results)] if results else []
        cells = {name: cell_of([named[name] for named in results]) for name in shared}
        failed = sum(outcome.state == "failed" for outcome in members)
        rows.append(SweepRow(members[0].values, cells, tuple(outcome.seed for outcome in done), failed))
    return rows


def measure_of(outcomes: Sequence[Outcome]) -> str:
    """Name of the measure of a sweep's values, for its figure."""
    for outcome in outcomes:
        if outcome.state == "done":
            return headline_of(outcome.results()["clean"])
    raise ConfigError("no point of this sweep is done")


def sweep_markdown(rows: Sequence[SweepRow]) -> str:
    """A Markdown table: settings, results, seeds."""
    paths = list(rows[0].values)
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    lines = []
    for row in rows:
        cells = [row.cells[name].text() if name in row.cells else None for name in columns]
        lines.append([*row.values.values(), *cells, len(row.seeds), row.failed])
    return markdown_table([*paths, *columns, "seeds", "failed"], lines)
