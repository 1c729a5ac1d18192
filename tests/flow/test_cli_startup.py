"""Libraries that command lines load: none for help and completion, torch alone for the catalogue and for
results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from robusthash.apps import cli
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config

HEAVY = (
    "torch",
    "torchvision",
    "scipy",
    "sklearn",
    "skimage",
    "pandas",
    "matplotlib",
    "faiss",
    "transformers",
)
PROGRAM = f"""
import json, sys
from robusthash.apps import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["robusthash", *words]
    try:
        cli.main()
    except SystemExit as leaving:
        assert not leaving.code, words
print()
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32},
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}]},
    "runtime": {"device": "cpu"},
}


def run_attacks(*lines: tuple[object, ...], **environment: str) -> tuple[str, list[str]]:
    """Stdout of command lines that one new process runs, and the heavy libraries loaded at its end."""
    words = json.dumps([list(map(str, line)) for line in lines])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    printed, _, loaded = done.stdout.rstrip().rpartition("\n")
    return printed, json.loads(loaded)


def verbs(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb and every group of verbs, as the words of its command line."""
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*words, name))


def test_help_and_version_load_no_library() -> None:
    every = list(verbs(typer.main.get_command(cli.app)))
    assert len(every) > 30
    assert {("list",), ("encode",), ("search",)} < set(every)
    assert ("index", "search") in every
    printed, loaded = run_attacks(("--version",), *((*words, "--help") for words in every))
    assert printed.count("Usage") == len(every)
    assert loaded == []


def test_completion_loads_no_library() -> None:
    environment = {"_ROBUSTHASH_COMPLETE": "complete_bash", "COMP_WORDS": "robusthash l", "COMP_CWORD": "1"}
    printed, loaded = run_attacks((), **environment)
    assert sorted(printed.split()) == ["leaderboard", "list"]
    assert loaded == []


def test_the_catalogue_loads_torch_alone() -> None:
    """Every registered class is imported; what builds a network of torchvision or reads a data set is not
    run."""
    printed, loaded = run_attacks(("list", "--json"))
    cards = {(card["kind"], card["name"]) for card in json.loads(printed)}
    assert {
        ("image-encoder", "resnet18"),
        ("recipe", "hashing"),
        ("outer", "saah"),
        ("threat", "img-linf-8"),
    } <= cards
    assert loaded == ["torch"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    made = [training_stages.train(make_config(CONFIG, [f"runtime.seed={seed}"]), root) for seed in (0, 1)]
    for run in made:
        evaluation_stages.evaluate(run)
    return [run.path for run in made]


@pytest.mark.parametrize("verb", ["compare", "table", "leaderboard", "keep"])
def test_reading_results_loads_torch_alone(verb: str, runs: list[Path], tmp_path: Path) -> None:
    """Results hold tensors, so torch stays; no model is built, and no library of images or statistics is
    needed."""
    line = (verb, *runs, "--out", tmp_path) if verb == "keep" else (verb, *runs)
    assert run_attacks(line)[1] == ["torch"]
