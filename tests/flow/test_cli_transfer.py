"""``robusthash transfer`` on runs of the small generated world, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import make_config

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 48, "query": 12, "database": 40},
    "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [], "batch_size": 8},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one recipe, and a model of other data."""
    root = tmp_path_factory.mktemp("runs")
    second = {**CONFIG, "runtime": {"device": "cpu", "seed": 1}}
    other = {**CONFIG, "name": "other", "data": {**CONFIG["data"], "seed": 5}}
    return [training_stages.train(make_config(config), root).path for config in (CONFIG, second, other)]


def test_a_table_of_two_runs(call, runs):
    code, out, _ = call("transfer", runs[0], runs[1], "--queries", 10, "--steps", 2, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["victims"] == found["surrogates"] == [f"tiny/{path.name}" for path in runs[:2]]
    assert found["queries"] == 10
    assert found["runs"][found["victims"][0]] == str(runs[0])
    assert len(found["worst"]) == len(found["worst"][0]) == 2
    code, out, _ = call("transfer", runs[0], runs[1], "--queries", 10, "--steps", 2)
    assert code == 0
    assert f"| tiny/{runs[1].name} | {found['worst'][1][0]:.4f} ({found['attacked'][1][0]:.4f}) |" in out


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ([0], [], "at least two runs, got 1"),
        ([0, 0], [], "is given twice"),
        ([0, 2], [], "differ in queries"),
        ([0, 1], ["--eps", "8"], "write 8/255, not 8"),
        ([0, 1], ["--eps", "small"], "takes a number such as 8/255, got 'small'"),
        ([0, 1], ["--norm", "l1"], "has no customary eps here; give eps"),
    ],
)
def test_refusals(call, runs, chosen, options, message):
    code, _, err = call("transfer", *[runs[number] for number in chosen], *options)
    assert code == 1
    assert message in " ".join(err.split())


def test_a_folder_that_is_no_run(call, runs, tmp_path):
    code, _, err = call("transfer", runs[0], tmp_path)
    assert code == 1
    assert "is not a run directory" in " ".join(err.split())
