"""``robusthash table``: who shares a row, and the caption that says what was attacked, and how."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from robusthash.apps import stages
from robusthash.apps.config import make_config
from robusthash.apps.runs import Run, load_run
from robusthash.apps.tables import captions, make_rows
from robusthash.evaluation.results import load_results, save_results

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}, {"name": "mainstay", "steps": 2}]},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    stages.evaluate(made)
    return made


def sibling(run: Run, folder: Path, name: str, settings: dict[str, object], **changes: object) -> Path:
    """A copy of a run with other settings (by dotted path) in its config, and other fields in its worst case."""
    made = Path(shutil.copytree(run.path, folder / name))
    config = yaml.safe_load((made / "config.yaml").read_text())
    for path, value in settings.items():
        section, key = path.split(".")
        config[section][key] = value
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    found = load_results(made / "metrics.json")
    changed = [replace(r, setting=replace(r.setting, **changes)) if r.name == "worst" else r for r in found]
    save_results(made / "metrics.json", changed)
    return made


def test_runs_share_a_row_only_where_the_seed_alone_differs(call, run, tmp_path):
    seed = sibling(run, tmp_path, "seed", {"runtime.seed": 1})
    longer = sibling(run, tmp_path, "longer", {"hasher.bits": 16})
    slower = sibling(run, tmp_path, "slower", {"hasher.bits": 16, "training.epochs": 9})
    code, out, err = call("table", run.path, longer, seed, slower, "--column", "worst")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:5]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("tiny, hasher.bits=12, training.epochs=2", "2"),
        ("tiny, hasher.bits=16, training.epochs=2", "1"),
        ("tiny, hasher.bits=16, training.epochs=9", "1"),
    ]
    assert [row.name for row in make_rows([run.path, seed])] == ["tiny"]
    assert load_run(seed).recipe == run.recipe != load_run(longer).recipe


def test_a_seed_that_is_given_twice_is_refused(call, run, tmp_path):
    again = sibling(run, tmp_path, "again", {})
    code, _, err = call("table", run.path, again)
    assert code == 1
    assert "training seeds [0, 0] of one recipe repeat" in err


def test_the_caption_names_attacks_and_budget(call, run, tmp_path):
    budget = run.evaluated()["worst"].setting.budget
    said = f"worst: img-linf-8, the lowest AP of each query under hag, mainstay; budget: {budget}."
    other = sibling(run, tmp_path, "other", {"hasher.bits": 16})
    out = call("table", run.path, other, "--column", "clean", "--column", "worst")[1]
    assert [line for line in out.splitlines() if line][4:] == [said]
    rows = json.loads(call("table", run.path, "--json")[1])
    assert rows[0]["attacked"]["clean"] == ""
    assert rows[0]["attacked"]["worst"] == said.removeprefix("worst: ").removesuffix(".")
    assert not captions(make_rows([run.path]), ["clean"])


@pytest.mark.parametrize("changes", [{"attacks": ("hag",)}, {"budget": "more steps"}, {"threat": "img-linf-4"}])
def test_rows_that_were_attacked_differently_are_said_apart(run, tmp_path, changes):
    other = sibling(run, tmp_path, "other", {"hasher.bits": 16}, **changes)
    lines = captions(make_rows([run.path, other]), ["clean", "worst"])
    assert [line.partition(": ")[0] for line in lines] == [
        "worst of tiny, hasher.bits=12",
        "worst of tiny, hasher.bits=16",
        "Columns whose rows do not compare, since they were attacked differently",
    ]
    assert lines[0] != lines[1]
    for value in changes.values():
        assert (value if isinstance(value, str) else value[0]) in lines[1]


def test_seeds_that_were_attacked_differently_leave_the_cell_empty(run, tmp_path):
    seed = sibling(run, tmp_path, "seed", {"runtime.seed": 1}, threat="img-linf-4")
    (row,) = make_rows([run.path, seed])
    assert "worst" not in row.cells
    assert "worst" not in row.attacked
    assert captions([row], ["clean", "worst"])[-1].startswith("-: not evaluated in every seed")
