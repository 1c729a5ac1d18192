"""The report's pictures before and after, the run's parent, and the command that made it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flow.test_report import check_self_contained
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.model_stages import load_victim, read_data
from robusthash.apps.experiment.results_copy import keep
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.apps.reports.example_searches import EXAMPLES, load_examples
from robusthash.apps.reports.run_report import write_report
from robusthash.core.hamming import distance
from robusthash.core.runtime import silent

RECIPE = {
    "data": {"name": "synthetic", "train": 64, "query": 12, "database": 96, "texts": False},
    "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32},
    "evaluation": {
        "attacks": [{"name": "pgd", "steps": 2}, {"name": "mainstay", "steps": 4, "step_size": "4/255"}]
    },
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tuned run with a parent, made by a command line and evaluated."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/usr/bin/robusthash", "run", "own recipe.yaml"])
        parent = training_stages.train(make_config({"name": "parent", **RECIPE}), root)
        tuned = {**RECIPE, "training": {**RECIPE["training"], "init_from": str(parent.path)}}
        made = training_stages.train(make_config({"name": "tuned", **tuned}), root)
    evaluation_stages.evaluate(made)
    return made


def test_the_pictures_are_those_of_the_strongest_attack_and_of_its_search(run: Run) -> None:
    found, results = load_examples(run.path), run.evaluated()
    assert found is not None
    assert found["attack"] == min(("pgd", "mainstay"), key=lambda name: results[name]["MAP"])
    victim, _ = load_victim(run)
    context = evaluation_stages.context_of(run, victim, read_data(run.config), silent)
    assert len(found["searches"]) == 3
    for search in found["searches"]:
        at = search["position"]
        per_query = [float(results[name].per_query["MAP"][at]) for name in ("clean", found["attack"])]
        assert search["ap"] == pytest.approx(per_query)
        far = distance(context.query_codes.packed[at : at + 1], context.codes.packed)[0]
        assert [hit["far"] for hit in search["found"][0]] == far.sort().values[:5].tolist()
        shown = context.queries.batch(torch.tensor([at])).inputs["image"][0]
        assert torch.equal(search["images"], (shown * 255).round().to(torch.uint8))
        moved = (search["attacked"].float() - search["images"].float()).abs().max()
        assert 0 < moved <= 9  # 8/255, and the rounding
        assert search["found"][0][0]["name"] in context.data.label_names


def test_the_page_shows_them_with_parent_and_command(run: Run) -> None:
    page = check_self_contained(write_report(run).read_text(encoding="utf-8"))
    for words in (
        "Before and after",
        "its change ×",
        "started from the run",
        "robusthash run 'own recipe.yaml'",
    ):
        assert words in page.words
    assert run.origin["parent"] in page.words
    pictures = [a for name, a in page.tags if name == "img" and a["src"].startswith("data:image/png")]
    assert len(pictures) == 3 * (3 + 2 * 5)
    links = {a["href"][1:] for name, a in page.tags if name == "a" and a["href"].startswith("#")}
    assert links == {"examples", "results-1", "changed", "training", "setting", "commands"}
    assert links <= {a.get("id") for _, a in page.tags}


def test_names_in_the_pictures_are_text(run: Run, tmp_path: Path) -> None:
    arrays = dict(np.load(run.path / EXAMPLES))
    hostile = "<script>alert(1)</script>"
    arrays["clean_names"] = np.full_like(arrays["clean_names"], hostile, dtype="<U40")
    copy = copied(run, tmp_path)
    np.savez(copy.path / EXAMPLES, **arrays)
    page = write_report(copy).read_text(encoding="utf-8")
    assert hostile not in page
    check_self_contained(page)
    (copy.path / EXAMPLES).write_bytes(b"PK damaged")
    with pytest.raises(RunError, match=r"examples\.npz is damaged"):
        write_report(copy)
    (copy.path / EXAMPLES).unlink()
    assert "Before and after" not in write_report(copy).read_text(encoding="utf-8")


def copied(run: Run, folder: Path) -> Run:
    import shutil

    shutil.copytree(run.path, folder / run.id)
    return replace(run, path=folder / run.id)


def test_added_attacks_take_the_pictures_only_if_they_are_stronger(run: Run, tmp_path: Path) -> None:
    copy = copied(run, tmp_path)
    before = (copy.path / EXAMPLES).read_bytes()
    evaluation_stages.evaluate(
        copy, attacks=[{"name": "mainstay", "steps": 1, "eps": 0.1 / 255, "step_size": 0.1 / 255}]
    )
    assert (copy.path / EXAMPLES).read_bytes() == before
    evaluation_stages.evaluate(
        copy, attacks=[{"name": "mainstay", "steps": 20, "eps": 64 / 255, "step_size": 8 / 255}]
    )
    found = load_examples(copy.path)
    assert found is not None
    assert found["attack"] == "mainstay (img-linf-64)"


def test_a_kept_copy_holds_no_command(run: Run, tmp_path: Path) -> None:
    assert (
        json.loads((run.path / "environment.json").read_text())["command"]
        == "robusthash run 'own recipe.yaml'"
    )
    target = keep(load_run(run.path), tmp_path / "kept").path
    assert "command" not in json.loads((target / "environment.json").read_text())
