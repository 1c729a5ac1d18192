"""Sweeps: one recipe over values of its settings and over seeds, as ordinary runs on several processes.

Each point is a child process that runs ``robusthash run`` with the point's overrides on one thread, so that
it can be stopped, gone on with and looked at like any run. The sweep itself keeps only ``sweep.json`` and the
children's output.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import yaml

from robusthash.apps.experiment.config import Config, ConfigError, load_config
from robusthash.apps.experiment.run_directory import load_run, write_json
from robusthash.apps.experiment.stages import Progress, silent
from robusthash.apps.experiment.tables import Cell, cell_of
from robusthash.core.runtime import digest
from robusthash.metrics.results import EvalResult, headline_of, load_results

State = Literal["waiting", "done", "failed"]
_LOOK = 0.2  # seconds between looks at the children


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
        found = tuple(
            yaml.safe_dump(value, default_flow_style=True).strip() for value in yaml.safe_load(listed)
        )
        values = tuple(value.removesuffix("...").strip() for value in found)
    else:
        values = tuple(value.strip() for value in listed.split(","))
    if len(set(values)) < len(values) or not all(values):
        raise ValueError(f"--over {text}: every value once, and none empty")
    if path == "runtime.seed":
        raise ValueError("seeds are swept by --seeds 0,1,2, so that the table can average over them")
    if path.partition(".")[0] in ("evaluation", "runtime", "name"):
        raise ValueError(
            f"--over {path} makes no other model, and all points would share one run; sweep settings of data, hasher "
            "or training, and set the rest with --set"
        )
    return Axis(path, values)


def whole_numbers(text: str) -> list[int]:
    """``0,1,2``.

    Raises:
        ValueError: anything else.
    """
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


@dataclass(frozen=True)
class Outcome:
    """How a point stands."""

    values: dict[str, str]
    seed: int
    key: str
    state: State = "waiting"
    run: str = ""
    error: str = ""


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
    points = []
    for chosen in itertools.product(*(axis.values for axis in axes)):
        values = {axis.path: value for axis, value in zip(axes, chosen, strict=True)}
        for seed in seeds:
            swept = [f"{path}={value}" for path, value in values.items()]
            whole = (*sets, *swept, f"runtime.seed={seed}", "runtime.threads=1")
            points.append(Point(values, seed, whole, load_config(recipe, whole)))
    models: dict[str, Point] = {}
    for point in points:
        identity = point.config.model_id(point.config.training.init_from or "")
        if identity in models:
            raise ValueError(
                f"the points {models[identity].name!r} and {point.name!r} are the same model; name one"
            )
        models[identity] = point
    return points


class Sweep:
    """A recipe over its points, on several processes.

    Args:
        recipe: the file; it is read again by each child.
        runs: folder of all runs, where points and their parents lie.
        out: folder of ``sweep.json`` and of what the children print.
        jobs: children at a time.
    """

    def __init__(self, recipe: Path, points: Sequence[Point], runs: Path, out: Path, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.recipe, self.points, self.runs, self.out, self.jobs = recipe, list(points), runs, out, jobs
        self.outcomes = {point.key: Outcome(point.values, point.seed, point.key) for point in self.points}

    def run(self, progress: Progress = silent) -> list[Outcome]:
        """Run what is not done yet; a failing point is noted with its error and the others go on.

        Left by an exception (Ctrl-C), all children are stopped first; the same call goes on.
        """
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self._recall()
        open_points = [point for point in self.points if self.outcomes[point.key].state != "done"]
        with _children() as start:
            parents = self._parents(open_points)
            blocked: dict[str, str] = {}
            jobs = {key: self._command("train", path, sets) for key, (path, sets) in parents.items()}
            for key, code, log in self._work(
                start, jobs, lambda done, total: progress(done, total, "parents")
            ):
                if code:
                    blocked[key] = f"its parent {parents[key][0]} failed: {_last_line(log)}"
            commands = {
                point.key: self._command("run", self.recipe, point.sets)
                for point in open_points
                if self._parent_key(point) not in blocked
            }
            for point in open_points:
                if (key := self._parent_key(point)) in blocked:
                    self._note(point.key, "failed", error=blocked[key])
            done_before = len(self.points) - len(commands)
            total = len(self.points)
            for key, code, log in self._work(
                start, commands, lambda done, _: progress(done_before + done, total, "points of the sweep")
            ):
                if code:
                    self._note(key, "failed", error=_last_line(log))
                else:
                    self._note(key, "done", run=log.with_suffix(".out").read_text().strip().splitlines()[-1])
        return [self.outcomes[point.key] for point in self.points]

    def _recall(self) -> None:
        """Take over points that an earlier call finished, where their results still stand."""
        path = self.out / "sweep.json"
        if not path.is_file():
            return
        by_key = {point.key: point for point in self.points}
        for entry in json.loads(path.read_text())["points"]:
            known = Outcome(**entry)
            whole = known.state == "done" and all(
                (Path(known.run) / name).is_file() for name in ("config.yaml", "metrics.json")
            )
            # the run may since have been evaluated under another config
            if whole and known.key in by_key and load_run(known.run).config == by_key[known.key].config:
                self.outcomes[known.key] = known

    def _note(self, key: str, state: State, run: str = "", error: str = "") -> None:
        old = self.outcomes[key]
        self.outcomes[key] = Outcome(old.values, old.seed, key, state, run, error)
        document = {
            "recipe": str(self.recipe),
            "runs": str(self.runs),
            "points": [asdict(self.outcomes[point.key]) for point in self.points],
        }
        write_json(self.out / "sweep.json", document)

    def _parent_file(self, point: Point) -> Path | None:
        """The recipe that the point starts from, if it is one: two points must not train it at the same
        time."""
        named = point.config.training.init_from
        if named is None or Path(named).suffix not in (".yaml", ".yml"):
            return None
        beside = self.recipe.parent / named
        return beside if beside.exists() else Path(named)

    def _parent_key(self, point: Point) -> str:
        path = self._parent_file(point)
        shared = [str(path), point.config.data, point.config.runtime.model_dump(mode="json")]
        return "" if path is None else f"parent-{digest(shared)}"

    def _parents(self, points: Sequence[Point]) -> dict[str, tuple[Path, tuple[str, ...]]]:
        """Recipe and overrides of each run that points start from, as training a point would train it."""
        found: dict[str, tuple[Path, tuple[str, ...]]] = {}
        for point in points:
            path = self._parent_file(point)
            if path is not None:
                data, runtime = (
                    json.dumps(point.config.data),
                    json.dumps(point.config.runtime.model_dump(mode="json")),
                )
                found[self._parent_key(point)] = (path, (f"data={data}", f"runtime={runtime}"))
        return found

    def _command(self, verb: str, recipe: Path, sets: Sequence[str]) -> list[str]:
        options = [part for override in sets for part in ("--set", override)]
        return [sys.executable, "-m", "robusthash", verb, str(recipe), *options, "--runs", str(self.runs)]

    def _work(
        self,
        start: Callable[[Sequence[str], Path], subprocess.Popen[bytes]],
        commands: Mapping[str, Sequence[str]],
        progress: Callable[[int, int], None],
    ) -> Iterator[tuple[str, int, Path]]:
        """Run commands, ``jobs`` at a time; yields (key, exit code, log) as each ends."""
        waiting, done = list(commands), 0
        running: dict[str, subprocess.Popen[bytes]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                key = waiting.pop(0)
                running[key] = start(commands[key], self.out / "logs" / f"{key}.err")
            progress(done, len(commands))
            ended = [key for key, child in running.items() if child.poll() is not None]
            for key in ended:
                done += 1
                yield key, running.pop(key).returncode, self.out / "logs" / f"{key}.err"
            if not ended:
                time.sleep(_LOOK)
        progress(done, len(commands))


@contextmanager
def _children() -> Iterator[Callable[[Sequence[str], Path], subprocess.Popen[bytes]]]:
    """Start children in sessions of their own; those that still run when the block is left are stopped."""
    started: list[subprocess.Popen[bytes]] = []
    files: list[IO[bytes]] = []

    def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        streams = log.with_suffix(".out").open("wb"), log.open("wb")
        files.extend(streams)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=streams[0],
            stderr=streams[1],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops them all, wherever it came from
        )
        started.append(child)
        return child

    try:
        yield start
    finally:
        for child in started:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGINT)  # a run keeps its last checkpoint and says so
        for child in started:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        for file in files:
            file.close()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error:").strip() if lines else f"no message; see {log}"


@dataclass(frozen=True)
class SweepRow:
    """One setting of a sweep: its results over the seeds that are done."""

    values: dict[str, str]
    cells: dict[str, Cell]
    seeds: tuple[int, ...]
    failed: int


def sweep_rows(outcomes: Sequence[Outcome]) -> list[SweepRow]:
    """Results by setting, averaged over seeds with the intervals of ``robusthash table``."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(json.dumps(outcome.values), []).append(outcome)
    rows = []
    for members in groups.values():
        done = [outcome for outcome in members if outcome.state == "done"]
        found = [{r.name: r for r in load_results(Path(outcome.run) / "metrics.json")} for outcome in done]
        shared: list[str] = (
            [name for name in found[0] if all(name in results for results in found)] if found else []
        )
        rows.append(
            SweepRow(
                values=members[0].values,
                cells={name: cell_of([results[name] for results in found]) for name in shared},
                seeds=tuple(outcome.seed for outcome in done),
                failed=sum(outcome.state == "failed" for outcome in members),
            )
        )
    return rows


def measure_of(outcomes: Sequence[Outcome], result: str = "clean") -> str:
    """What the values of a sweep are, as its figure names them."""
    for outcome in outcomes:
        if outcome.state == "done":
            found: EvalResult = next(
                r for r in load_results(Path(outcome.run) / "metrics.json") if r.name == result
            )
            return headline_of(found)
    raise ConfigError("no point of this sweep is done")


def sweep_markdown(rows: Sequence[SweepRow]) -> str:
    """A Markdown table: settings, results, seeds."""
    paths = list(rows[0].values)
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    lines = [
        f"| {' | '.join([*paths, *columns, 'seeds', 'failed'])} |",
        "|" + " --- |" * (len(paths) + len(columns) + 2),
    ]
    for row in rows:
        cells = [row.cells[name].text() if name in row.cells else "-" for name in columns]
        lines.append(
            f"| {' | '.join([*row.values.values(), *cells, str(len(row.seeds)), str(row.failed)])} |"
        )
    return "\n".join(lines)
