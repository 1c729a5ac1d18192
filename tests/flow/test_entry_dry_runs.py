"""Each table and figure of the papers at the small scale: one step of every part of each row."""

from __future__ import annotations

from pathlib import Path

import pytest

from robusthash.apps.reproduction.entry_runs import Recipes, Stored, make_plan
from robusthash.apps.reproduction.paper_entries import papers
from robusthash.apps.reproduction.reproduction import try_entry

ENTRIES = [
    (name, entry.id) for name, each in papers().items() for entry in each.entries if entry.small is not None
]


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_a_dry_run_of_an_entry(name: str, entry: str) -> None:
    found = papers()[name].entry(entry)
    recipes = Recipes(Path(__file__).resolve().parents[2] / "recipes")
    plan = make_plan(found, found.at("small"), recipes, Stored([]), seeds=1)
    trial = try_entry(plan, miniature=True, batch=4)
    assert len(trial.runs) == len(plan.runs)
    assert trial.seconds == pytest.approx(trial.seed_seconds)  # one seed, of which nothing is stored
    # a model that several rows start from is trained once
    assert trial.seed_seconds <= sum(tried.seconds for tried in trial.runs.values())
