"""One choice of queries by content: of a data set listed class by class, every door asks the same queries."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import robusthash as rh
from robusthash.apps.experiment import assess_run as checking
from robusthash.apps.experiment import attribution_run as attribution
from robusthash.apps.experiment import evaluation_stages, model_stages, training_stages
from robusthash.apps.experiment import oracle_run as questioning
from robusthash.apps.experiment import transfer_run as transferring
from robusthash.apps.experiment.attribution_run import load_attributions
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.epoch_curves import robust_curves
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.core.runtime import silent
from robusthash.data.splits import stable_subset
from robusthash.metrics.results import load_results

KINDS, QUERIES, ASKED = 6, 5, 12  # the first 12 of the 30 queries hold 3 of the 6 classes


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of six classes, and two manifests of them: class by class, and in another order."""
    root, rows = tmp_path_factory.mktemp("images"), []
    numbers = np.random.default_rng(0)
    for kind in range(KINDS):
        pattern = numbers.integers(40, 200, (4, 4, 3))
        for number in range(10 + QUERIES):
            noisy = pattern.repeat(4, 0).repeat(4, 1) + numbers.integers(-40, 40, (16, 16, 3))
            name = f"{kind}-{number}.png"
            Image.fromarray(noisy.astype(np.uint8)).save(root / name)
            rows.append(
                {"file": name, "labels": [f"kind {kind}"], "split": "test" if number < QUERIES else "train"}
            )
    (root / "ordered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random.Random(0).shuffle(rows)
    (root / "shuffled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(images: Path, seed: int = 0, manifest: str = "ordered", **evaluation: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {
            "name": "folder",
            "root": str(images),
            "manifest": str(images / f"{manifest}.jsonl"),
            "size": 16,
        },
        "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
        "training": {"objective": "csq", "epochs": 1, "batch_size": 16, "optim": {"hasher": {"lr": 0.05}}},
        "evaluation": {"attacks": [{"name": "hag", "steps": 1}], "batch_size": 8, **evaluation},
        "runtime": {"device": "cpu", "threads": 1, "seed": seed, "keep_epochs": 1},
    }


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    return [training_stages.train(make_config(config(images, seed, queries=ASKED)), root) for seed in (0, 1)]


@pytest.fixture(scope="module")
def expected(runs) -> str:
    """The fingerprint of the choice."""
    queries = model_stages.read_data(runs[0].config).query
    return queries.take(stable_subset(queries, ASKED)).fingerprint()


def kinds(labels: torch.Tensor) -> int:
    return int(labels.any(0).sum())


def seen(monkeypatch, module: Any, name: str) -> list[Any]:
    """The first argument of every call of a function of a module, which still does its work."""
    calls: list[Any] = []
    own: Callable[..., Any] = getattr(module, name)

    def spy(first: Any, *others: Any, **named: Any) -> Any:
        calls.append(first)
        return own(first, *others, **named)

    monkeypatch.setattr(module, name, spy)
    return calls


def test_the_choice_covers_the_classes_in_whatever_order_the_queries_are_listed(images):
    ordered, shuffled = (
        rh.load_data(**config(images, manifest=name)["data"]) for name in ("ordered", "shuffled")
    )
    assert kinds(ordered.query.labels[:ASKED]) == 3, "the first ones are of a few classes"
    chosen = ordered.query.take(stable_subset(ordered.query, ASKED))
    assert chosen.labels.sum(0).tolist() == [ASKED / KINDS] * KINDS
    assert ordered.query.fingerprint() != shuffled.query.fingerprint()
    hasher = rh.build_hasher(bits=8, image={"name": "small", "width": 4})
    contexts = [rh.make_context(hasher, data, queries=ASKED) for data in (ordered, shuffled)]
    assert {context.queries.fingerprint() for context in contexts} == {chosen.fingerprint()}
    assert contexts[0].chosen == f"{ASKED} of {KINDS * QUERIES} by content"
    again = rh.make_context(hasher, ordered).some(ASKED)
    assert (again.queries.fingerprint(), again.chosen) == (chosen.fingerprint(), contexts[0].chosen)
    assert torch.equal(again.query.packed, contexts[0].query.packed)
    assert rh.make_context(hasher, ordered, queries=KINDS * QUERIES).chosen == "all"


def test_python_recipe_and_assess_ask_the_same_queries_and_say_so(call, runs, expected):
    data = model_stages.read_data(runs[0].config)
    victim = model_stages.load_hasher(runs[0])
    results = [
        rh.evaluate(victim, data, queries=ASKED),
        rh.assess(rh.make_context(victim, data, queries=ASKED), "smoke"),
    ]
    code, out, err = call("evaluate", runs[0].path)
    assert code == 0, err
    assert f"queries: {ASKED} of {KINDS * QUERIES} by content" in out
    results += load_results(runs[0].path / "metrics.json")
    code, out, err = call("assess", runs[0].path, "--tier", "smoke", "--queries", ASKED)
    assert code == 0, err
    assert f"{ASKED} queries ({ASKED} of {KINDS * QUERIES} by content)" in " ".join(out.split())
    results += load_results(runs[0].path / "assess.json")
    assert len(results) == 6
    assert {result.setting.digests["queries"] for result in results} == {expected}
    assert {result.setting.chosen for result in results} == {f"{ASKED} of {KINDS * QUERIES} by content"}
    whole = rh.evaluate(victim, data)
    assert (whole.setting.chosen, len(whole.per_query["MAP"])) == ("all", KINDS * QUERIES)


def test_results_that_do_not_say_how_queries_were_chosen_compare_with_those_that_do(runs):
    data, (victim, _) = model_stages.read_data(runs[0].config), model_stages.load_victim(runs[0])
    result = rh.evaluate(victim, data, queries=ASKED)
    plain = {**vars(result.setting)}
    del plain["chosen"]
    older = type(result.setting)(**plain)
    assert older.chosen == ""
    assert older.differs(result.setting) == []
    assert older.query_description == "folder:query[12]"
    assert result.setting.query_description == "folder:query[12], 12 of 30 by content"


def test_verbs_that_compare_models_or_look_into_one_ask_them_too(call, runs, expected, monkeypatch, tmp_path):
    first, second = (run.path for run in runs)
    contexts = []
    found = seen(monkeypatch, transferring, "transfer_matrix")
    code, out, err = call("transfer", first, second, "--queries", ASKED, "--steps", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["chosen"] == f"{ASKED} of {KINDS * QUERIES} by content"
    contexts += list(found[0].values())
    found = seen(monkeypatch, attribution, "attribute_bands")
    code, _, err = call(
        "attribute", first, "--images", ASKED, "--permutations", 4, "--worth", "ap", "--out", tmp_path
    )
    assert code == 0, err
    (kept,) = load_attributions(tmp_path / "attribution.npz").values()
    assert kept.chosen == f"{ASKED} of {KINDS * QUERIES} by content"
    contexts += found
    found = seen(monkeypatch, questioning, "oracle_curve")
    code, out, err = call(
        "questions", first, "--queries", ASKED, "--budgets", "2", "--shows", "codes", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["chosen"] == f"{ASKED} of {KINDS * QUERIES} by content"
    contexts += found
    found = seen(monkeypatch, checking, "model_checks")
    _, out, _ = call("check", first, "--queries", ASKED, "--steps", 2)
    assert "checks of" in out
    contexts += found
    assert len(contexts) == 5
    assert {context.queries.fingerprint() for context in contexts} == {expected}


def test_curves_by_epoch_ask_them_and_take_nothing_kept_for_another_choice(runs, expected):
    run, attack = runs[0], {"name": "hag", "steps": 1}
    found = robust_curves(run, attack, ASKED)
    assert {r.setting.digests["queries"] for by_epoch in found.values() for r in by_epoch.values()} == {
        expected
    }
    assert len(list(run.path.glob("curves-*.json"))) == 1
    robust_curves(run, attack, ASKED)
    assert len(list(run.path.glob("curves-*.json"))) == 1, "kept"
    assert len(robust_curves(run, attack, ASKED - 1)["clean"][1].per_query["MAP"]) == ASKED - 1
    assert len(list(run.path.glob("curves-*.json"))) == 2


def test_a_part_of_a_class_ordered_bench_is_chosen_for_the_checks(runs):
    """The checks look at some of the queries of a bench: not at its first ones, which would be of a few
    classes."""
    context = evaluation_stages.context_of(
        load_run(runs[0].path),
        model_stages.load_hasher(runs[0]),
        model_stages.read_data(runs[0].config),
        silent,
        whole=True,
    )
    assert kinds(context.some(KINDS).query_labels) == KINDS
