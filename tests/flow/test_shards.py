"""Two processes share the work of an assessment at the same time; joined, it is the record of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import load_run
from robusthash.metrics.results import EvalResult, load_results

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"batch_size": 6},
    "runtime": {"device": "cpu", "threads": 1},
}


def record(run: Path) -> EvalResult:
    (result,) = load_results(run / "assess.json")
    return result


def without_times(result: EvalResult) -> dict[str, dict[str, float]]:
    return {line: {n: v for n, v in of.items() if n != "seconds"} for line, of in result.attacks.items()}


def test_two_processes_at_once_make_the_record_of_one(tmp_path):
    run = training_stages.train(make_config(CONFIG), tmp_path).path
    assessing.assess(load_run(run), "smoke")
    whole = record(run)
    (run / "assess.json").unlink()
    kept = sorted((run / "assess").rglob("*.npz"))
    assert len(kept) == 4
    for path in kept:
        path.unlink()

    command = [sys.executable, "-m", "robusthash", "assess", str(run), "--tier", "smoke", "--shard"]
    shards = [
        subprocess.Popen([*command, part], stderr=subprocess.PIPE, text=True) for part in ("0/2", "1/2")
    ]
    said = [shard.communicate(timeout=120)[1] for shard in shards]
    for number, shard in enumerate(shards):
        assert shard.returncode == 0, said[number]
        assert f"shard {number}/2 is done" in said[number]
    assert sorted((run / "assess").rglob("*.npz")) == kept, "each block once, and nothing left half written"
    assert not (run / "assess.json").exists(), "a shard alone has no result"
    written = {path: path.stat().st_mtime_ns for path in kept}

    assessing.assess(load_run(run), "smoke")
    joined = record(run)
    assert {path: path.stat().st_mtime_ns for path in kept} == written, "joining attacks nothing again"
    assert joined.values == whole.values
    assert joined.winner == whole.winner
    assert without_times(joined) == without_times(whole)
    assert joined.per_query.keys() == whole.per_query.keys()
    for name, values in whole.per_query.items():
        torch.testing.assert_close(joined.per_query[name], values, rtol=0, atol=0, equal_nan=True, msg=name)
    for part in ("setting", "interval", "reference", "notes", "perceptibility"):
        assert getattr(joined, part) == getattr(whole, part), part
