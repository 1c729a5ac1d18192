"""The verb ``check``: a table or JSON, and exit code 1 where a check is red."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from robusthash.apps.experiment import assess_run as checking
from robusthash.apps.experiment import model_stages, training_stages
from robusthash.apps.experiment.config import make_config

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "multilabel": False, "texts": False},
    "hasher": {"bits": 32, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 25, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


def test_check_gives_json_and_a_file_and_passes_an_honest_run(call, trained):
    code, out, _ = call("check", trained, "--queries", 24, "--steps", 60, "--json")
    flags = json.loads(out)["flags"]
    assert [flag["id"] for flag in flags if flag["level"] == "red"] == []
    assert code == 0
    assert json.loads((trained / "checks.json").read_text()) == flags
    assert {"id", "value", "threshold", "level", "remedy", "title"} == set(flags[0])


def test_a_red_check_is_exit_code_1_and_says_what_to_do(call, trained, monkeypatch):
    honest = model_stages.load_hasher

    def stale(run):
        victim = honest(run)
        victim.declared = "randomised"
        return victim

    monkeypatch.setattr(checking, "load_hasher", stale)
    code, out, err = call("check", trained, "--queries", 8, "--steps", 3, "--eps", "2/255")
    assert code == 1
    assert "F23" in out, err
    assert "'randomised' is declared" in " ".join(out.replace("│", " ").split())


def test_a_model_that_returns_nan_is_one_line(call, trained, monkeypatch):
    honest = model_stages.load_hasher

    def ill(run):
        victim = honest(run)
        with torch.no_grad():
            next(victim.heads["image"].parameters()).fill_(float("nan"))
        return victim

    monkeypatch.setattr(checking, "load_hasher", ill)
    code, _, err = call("check", trained)
    assert code == 1
    assert "NaN or infinite" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("check",), 2, "Missing argument"),
        (("check", "nowhere"), 1, "nowhere"),
        (("check", "nowhere", "--norm", "l3"), 2, "'l3'"),  # refused by the parser of the command line
    ],
)
def test_bad_calls_are_one_line(call, arguments, status, message):
    code, _, err = call(*arguments)
    assert code == status
    assert message in err
