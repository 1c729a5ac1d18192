"""``robusthash compare`` on results of suites: paired numbers, and refusals that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run
from robusthash.metrics.results import Flag, save_results

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "runtime": {"device": "cpu"},
}
SMOKE = "img-linf-8 smoke"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two seeds that were assessed, the first evaluated as well."""
    root = tmp_path_factory.mktemp("runs")
    made = [training_stages.train(make_config(CONFIG, [f"runtime.seed={seed}"]), root) for seed in (0, 1)]
    evaluation_stages.evaluate(made[0])
    for run in made:
        assessing.assess(run, "smoke")
    return made[0], made[1]


def test_two_suite_results_are_compared_query_by_query(call, runs):
    first, second = (run.assessed()[SMOKE] for run in runs)
    code, out, err = call("compare", runs[0].path, runs[1].path, "--result", SMOKE, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["wMAP"]["mean"] == pytest.approx(first["wMAP"] - second["wMAP"])
    assert found["wMAP"]["queries"] == 24
    assert 0 < found["wMAP"]["p"] <= found["wMAP"]["p_holm"] <= 1
    assert found["wMAP"]["interval"][0] <= found["wMAP"]["mean"] <= found["wMAP"]["interval"][1]
    assert "UNRELIABLE" not in err


def test_results_of_a_run_are_its_evaluation_and_its_suites(call, runs):
    assert set(runs[0].evaluated()) == {"clean"}
    assert set(runs[0].assessed()) == {SMOKE}
    assert set(runs[0].results()) == {"clean", SMOKE}
    assert set(runs[1].results()) == {SMOKE}
    assert json.loads(call("evaluate", runs[0].path, "--json")[1])["results"].keys() == {"clean"}
    code, _, err = call("compare", runs[0].path, runs[1].path, "--result", "img-linf-8 smok")
    assert code == 1
    assert f"did you mean '{SMOKE}'" in err


def test_suites_of_unlike_settings_are_refused_by_field(call, runs, tmp_path):
    result = runs[1].assessed()[SMOKE]
    other = _copy(runs[1], tmp_path)
    for change, field in (
        ({"budget": "suite smoke, 2 lines"}, "budget"),
        ({"attacks": ("guided", "transfer other")}, "attacks"),
        ({"digests": {**result.setting.digests, "suite": "2-0"}}, "digests.suite"),
        ({"queries": "synthetic:query[20]"}, "queries"),
    ):
        save_results(other / "assess.json", [replace(result, setting=replace(result.setting, **change))])
        code, out, err = call("compare", runs[0].path, other, "--result", SMOKE)
        assert (code, out) == (1, "")
        assert f"they differ in {field};" in err
    digests = {**result.setting.digests, "suite": "dabfaa8925b3"}  # as the first scheme wrote it
    save_results(other / "assess.json", [replace(result, setting=replace(result.setting, digests=digests))])
    _, _, err = call("compare", runs[0].path, other, "--result", SMOKE)
    assert "digests.suite (identities by the schemes 1 and 2 of this package" in err
    assert call("compare", runs[0].path, tmp_path, "--result", SMOKE)[0] == 1


def test_a_red_flag_is_said_beside_the_difference(call, runs, tmp_path):
    other = _copy(runs[1], tmp_path)
    red = Flag("F4", 0.03, 0.005, "red", "masked gradients: add an adaptive line")
    save_results(other / "assess.json", [replace(runs[1].assessed()[SMOKE], flags=(red,))])
    code, _, err = call("compare", runs[0].path, other, "--result", SMOKE)
    assert code == 0
    assert "UNRELIABLE" in err
    assert str(other) in err.replace("\n", "")


def test_refused_worst_case_names_the_results_that_compare(call, runs, tmp_path):
    first, second = _copy(runs[0], tmp_path), _copy(runs[1], tmp_path)
    clean = runs[0].evaluated()["clean"]
    worst = replace(clean, name="worst", setting=replace(clean.setting, attacks=("guided",)))
    more = replace(worst, setting=replace(clean.setting, attacks=("guided", "hag")))
    for folder, low in ((first, worst), (second, more)):
        save_results(folder / "metrics.json", [clean, low])
    code, _, err = call("compare", first, second)
    assert code == 1
    assert "worst: these results cannot be compared: they differ in attacks" in err.replace("\n", " ")
    assert "--result clean" in err
    assert call("compare", first, second, "--result", "clean")[0] == 0


def _copy(run: Run, folder: Path) -> Path:
    """A run directory without results."""
    made = folder / run.id
    made.mkdir()
    (made / "config.yaml").write_text((run.path / "config.yaml").read_text())
    return made
