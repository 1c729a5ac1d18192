"""Kills at random moments: every file stays readable, and the same call goes on to the same result.

A few kills of each kind, seeded; with ``ROBUSTHASH_KILLS=100`` that many, of slow work fewer, and the counts
go to ``kills.txt`` in the folder of temporary files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from robusthash.apps.experiment import (
    assess_run,
    evaluation_stages,
    evidence_run,
    parameter_sweep,
    training_stages,
)
from robusthash.apps.experiment.config import Config, make_config
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.metrics.results import EvalResult
from robusthash.robustness.evidence.bundles import read_bundle

KILLS = int(os.environ.get("ROBUSTHASH_KILLS", "2"))
PLAIN = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 12, "database": 90},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 4, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "pgd", "steps": 3}, {"name": "hag", "steps": 2}], "batch_size": 4},
    "runtime": {"device": "cpu", "threads": 1, "keep_epochs": 2},
}
CONFIG: Config = make_config(PLAIN)
Work = Callable[[Path], Any]


def train(folder: Path) -> Any:
    return training_stages.train(CONFIG, folder / "runs").card()["digest"]


def run_all(folder: Path) -> Any:
    return numbers(training_stages.run_all(CONFIG, folder / "runs").evaluated())


def evaluate(folder: Path) -> Any:
    more: list[dict[str, Any]] = [{"name": "pgd", "steps": 9}]
    return numbers(evaluation_stages.evaluate(run_in(folder), attacks=more))


def assess(folder: Path) -> Any:
    for tier in ("smoke", "fast"):
        if f"img-linf-8 {tier}" not in run_in(folder).assessed():
            assess_run.assess(run_in(folder), tier, queries=6, checked=False)
    return numbers(run_in(folder).assessed())


def export(folder: Path) -> Any:
    out = folder / "bundle"
    if not out.exists():
        evidence_run.export_evidence(run_in(folder), {"name": "pgd", "steps": 3}, out)
    evidence_run.verify_evidence(run_in(folder), out)
    return numbers(evidence_run.accepted(run_in(folder)))


def sweep(folder: Path) -> Any:
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**PLAIN, "evaluation": {"attacks": []}}))
    axes = [parameter_sweep.read_axis("training.epochs=2,3")]
    points = parameter_sweep.points_of(recipe, axes, [0])
    swept = parameter_sweep.Sweep(recipe, points, folder / "runs", folder / "swept", jobs=2)
    outcomes = swept.run()
    assert [outcome.state for outcome in outcomes] == ["done", "done"]
    return [numbers(outcome.results()) for outcome in outcomes]


WORK: dict[str, tuple[Work, bool, int]] = {  # whether it needs a run, and for how many kills it counts
    "train": (train, False, 1),
    "run": (run_all, False, 1),
    "evaluate": (evaluate, True, 1),
    "evidence": (export, True, 1),
    "assess": (assess, True, 2),
    "sweep": (sweep, False, 4),
}


def run_in(folder: Path) -> Run:
    (path,) = (folder / "runs" / "tiny").iterdir()
    return load_run(path)


def numbers(results: dict[str, EvalResult]) -> dict[str, Any]:
    """All that two results of the same work share; they may differ in seconds."""
    return {
        name: (result.values, {n: v.nan_to_num(-1).tolist() for n, v in result.per_query.items()})
        for name, result in sorted(results.items())
    }


def killed(work: Work, folder: Path, after: float) -> bool:
    """True where a process that does the work is killed before it is done, with the processes it started."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            work(folder)
            os._exit(0)
        os._exit(1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def check_files(folder: Path) -> int:
    """Read every file that is not hidden; their number."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in paths:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert arrays.files
                assert all(arrays[name] is not None for name in arrays.files)
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    for config in folder.rglob("config.yaml"):
        run = load_run(config.parent)
        if run.trained:
            run.load_model()
        if run.was_evaluated:
            run.evaluated()
        run.assessed()
        evidence_run.accepted(run)
    if (folder / "bundle").exists():
        read_bundle(folder / "bundle")
    return len(paths)


def working_in(folder: Path) -> list[int]:
    """Processes whose output goes below ``folder``."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and any(
                os.readlink(handle).startswith(str(folder)) for handle in (process / "fd").iterdir()
            ):
                found.append(int(process.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
@pytest.mark.parametrize("name", WORK)
def test_a_kill_at_any_moment_loses_nothing_and_changes_nothing(name: str, tmp_path: Path) -> None:
    work, needs_run, price = WORK[name]
    begin = tmp_path / "begin"
    begin.mkdir()
    if needs_run:
        run_all(begin)
    for folder in ("first", "whole"):
        shutil.copytree(begin, tmp_path / folder)
    if price == 1:  # what it imports is not to be timed
        work(tmp_path / "first")
    started = time.monotonic()
    wanted, seconds = work(tmp_path / "whole"), time.monotonic() - started
    moments, ended = random.Random(f"kills of {name}"), 0
    rounds = math.ceil(KILLS / price)
    for number in range(rounds):
        folder = tmp_path / str(number)
        shutil.copytree(begin, folder)
        while True:  # until it is done, or has been killed once and goes on
            was_killed = killed(work, folder, moments.uniform(0.02, 1.0) * seconds)
            ended += was_killed
            until = time.monotonic() + 10
            while working_in(folder) and time.monotonic() < until:
                time.sleep(0.02)
            assert not working_in(folder), "a child works on"
            check_files(folder)
            if not was_killed or moments.random() < 0.7:
                break
        assert work(folder) == wanted
        assert not list(folder.rglob(".*.part*")), "what was left half written is removed"
        check_files(folder)
        shutil.rmtree(folder)
    if os.environ.get("ROBUSTHASH_KILLS"):
        with (Path(os.environ.get("TMPDIR", "/tmp")) / "kills.txt").open("a") as report:
            report.write(f"{name}: {ended} kills in {rounds} rounds of {seconds:.2f} s\n")
