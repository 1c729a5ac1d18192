"""``robusthash keep``: copies of results that every reading verb opens as runs, with nothing private and no
weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, results_copy, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run, write_json
from robusthash.apps.experiment.run_files import sealed
from robusthash.apps.experiment.stored_analyses import analysis_values, store_analysis
from robusthash.metrics.results import headline_of, save_results

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}, {"name": "dhta", "steps": 2}]},
    "runtime": {"device": "cpu"},
}
SMOKE = "img-linf-8 smoke"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds, evaluated and assessed."""
    root = tmp_path_factory.mktemp("runs")
    made = [training_stages.train(make_config(CONFIG, [f"runtime.seed={seed}"]), root) for seed in (0, 1)]
    for run in made:
        evaluation_stages.evaluate(run)
        assessing.assess(run, "smoke")
    return made


def copied(run: Run, folder: Path) -> Run:
    """A run directory of its own, to be changed."""
    return load_run(shutil.copytree(run.path, folder / run.id))


def keep(run: Run, out: Path) -> Path:
    return results_copy.keep(run, out).path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_holds_what_tables_need_and_no_weights(runs: list[Run], tmp_path: Path) -> None:
    run = runs[0]
    kept = load_run(keep(run, tmp_path))
    assert kept.path == tmp_path / "tiny" / run.id
    assert kept.results_only
    assert not run.results_only
    assert {path.suffix for path in kept.path.rglob("*")} == {".json", ".jsonl", ".npz", ".yaml"}
    assert kept.card() == run.card()
    assert kept.lines() == run.lines()
    assert kept.recipe == run.recipe
    found = kept.results()
    assert found.keys() == run.results().keys()
    for name, result in run.results().items():
        headline = headline_of(result)
        assert found[name].values == result.values
        assert found[name].interval == result.interval
        assert found[name].setting == result.setting
        assert torch.allclose(
            found[name].per_query[headline], result.per_query[headline], atol=1e-5, rtol=0.0
        )
        assert f"{headline}/8bit" not in found[name].per_query
    assert set(found["dhta"].per_query) == {"t-MAP"}
    assert set(found["hag"].per_query) == set(found["clean"].per_query) == {"MAP", "nDCG@100", "ACG@100"}
    assert set(found["worst"].per_query) == {"wMAP"}
    attacks = {f"MAP under {name}" for name in found[SMOKE].attacks if "MAP" in found[SMOKE].attacks[name]}
    assert set(found[SMOKE].per_query) - {"t-MAP"} == {"wMAP", "clean", *attacks}


def test_reading_verbs_take_a_copy_for_the_run(call, runs: list[Run], tmp_path: Path) -> None:
    code, out, err = call("keep", runs[0].path.parent, "--out", tmp_path)
    assert code == 0, err
    copies = out.split()
    assert copies == [str(tmp_path / "tiny" / run.id) for run in sorted(runs, key=lambda run: run.id)]
    columns = ["--column", "clean", "--column", "worst", "--column", "dhta", "--column", SMOKE]
    columns += ["--column", f"MAP under guided of {SMOKE} as guided"]
    assert call("table", tmp_path / "tiny", *columns) == call("table", *(run.path for run in runs), *columns)
    assert call("leaderboard", *copies)[0] == 0
    found = json.loads(call("compare", *copies, "--result", SMOKE, "--json")[1])["wMAP"]
    same = json.loads(call("compare", *sorted(str(r.path) for r in runs), "--result", SMOKE, "--json")[1])[
        "wMAP"
    ]
    assert found["mean"] == pytest.approx(same["mean"], abs=2e-5)
    assert call("report", copies[0])[0] == 0
    call("keep", runs[0].path.parent, "--out", tmp_path)
    assert (Path(copies[0]) / "report.html").is_file()


def test_what_needs_the_model_says_that_there_is_none(call, runs: list[Run], tmp_path: Path) -> None:
    copy = keep(runs[0], tmp_path)
    code, _, err = call("evaluate", copy)
    assert code == 1
    assert "keeps results without weights; train its recipe again" in err
    code, _, err = call("train", copy / "config.yaml", "--runs", tmp_path)
    assert code == 1
    assert "no run goes on there" in err


def test_kept_twice_is_the_same_and_analyses_stay(call, runs: list[Run], tmp_path: Path) -> None:
    run, out = copied(runs[0], tmp_path), tmp_path / "out"
    store_analysis(run, "bands", {"images": 4}, {"share": [0.5, 0.5]})
    store_analysis(run, "cost", {"images": 4}, {"seconds": 1.0})
    by_epoch = [replace(result, name=f"1: {name}") for name, result in run.evaluated().items()]
    save_results(run.path / "curves-ab12.json", by_epoch)
    copy = keep(run, out)
    first = contents(out)
    assert keep(run, out) == copy
    assert contents(out) == first
    lost = sorted(
        path.name for path in run.path.glob("*") if path.name.startswith(("bands", "cost", "curves"))
    )
    for name in lost:
        (run.path / name).unlink()
    code, printed, err = call("keep", run.path, "--out", out)
    assert (code, printed.split()) == (0, [str(copy)])
    assert contents(out) == first
    assert all(name in err for name in ("bands.json", "cost.json", "curves-ab12.json")), err
    assert analysis_values(load_run(copy), "bands")["share"].tolist() == [0.5, 0.5]


def test_of_another_model_nothing_stays_and_new_results_replace_old_ones(
    call, runs: list[Run], tmp_path: Path
) -> None:
    run, out = copied(runs[0], tmp_path), tmp_path / "out"
    store_analysis(run, "bands", {"images": 4}, {"share": [0.5, 0.5]})
    copy = keep(run, out)
    (run.path / "bands.json").unlink()
    (old,) = copy.glob("metrics-*.npz")
    shutil.copy(old, copy / "metrics-0123456789abcdef.npz")  # of an evaluation before
    found = json.loads(call("keep", run.path, "--out", out, "--json")[1])
    assert found["earlier copies"][str(copy)] == {"stayed": ["bands.json"], "removed": []}
    assert [path.name for path in copy.glob("metrics-*.npz")] == [old.name]
    card = json.loads((copy / "model.json").read_text())
    write_json(copy / "model.json", sealed({**card, "digest": "0" * 16}))
    code, _, err = call("keep", run.path, "--out", out)
    assert code == 0
    assert "removed, as it was of another model: bands.json" in err
    assert not (copy / "bands.json").exists()


def test_a_run_that_cannot_be_read_leaves_the_older_copy_whole(runs: list[Run], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path)
    keep(run, tmp_path / "out")
    before = contents(tmp_path / "out")
    next(run.path.glob("assess-*.npz")).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="does not belong to"):
        keep(run, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_paths_stay_at_home_and_the_id_as_it_was(runs: list[Run], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    config["data"] = {"name": "fashion-mnist", "root": "/secret/place/data"}
    config["hasher"]["image"] = {"name": "gfnet", "weights": "/secret/place/gfnet.pth"}
    config["training"]["init_from"] = "../secret/tiny.yaml"
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(run.path / "poison-x.json", {"inputs": ["/secret/place/attacked.npz"]})
    kept = load_run(keep(load_run(run.path), tmp_path / "out"))
    assert not any(b"secret" in content for content in contents(kept.path).values())
    assert kept.id == run.id == json.loads((kept.path / "kept.json").read_text())["id"]
    assert kept.config.data == {"name": "fashion-mnist"}
    assert kept.config.hasher.image == {"name": "gfnet", "weights": "gfnet.pth"}
    assert kept.config.training.init_from == "tiny.yaml"
    config["data"]["root"] = "elsewhere"
    assert Run(tmp_path, make_config(config)).recipe == load_run(run.path).recipe


def test_of_a_folder_runs_without_results_are_left_out(call, runs: list[Run], tmp_path: Path) -> None:
    waiting = copied(runs[0], tmp_path)
    for path in [*waiting.path.glob("metrics.*"), *waiting.path.glob("assess.*")]:
        path.unlink()
    copied(runs[1], tmp_path)
    code, out, err = call("keep", tmp_path, "--out", tmp_path / "out")
    assert code == 0
    assert out.split() == [str(tmp_path / "out" / "tiny" / runs[1].id)]
    assert f"{runs[0].id} has no results yet and is left out" in err
    assert call("keep", waiting.path, "--out", tmp_path / "out")[0] == 1


@pytest.mark.parametrize("file", ["config.yaml", "model.json", "metrics.json", "log.jsonl"])
def test_a_damaged_copy_is_made_again(runs: list[Run], tmp_path: Path, file: str) -> None:
    def read() -> None:
        run = load_run(copy)
        run.card()
        run.lines()
        run.evaluated()

    copy = keep(runs[0], tmp_path)
    read()
    (copy / file).unlink()
    with pytest.raises(RunError, match="; it is a copy: make it again with 'robusthash keep', or take it"):
        read()


@pytest.mark.parametrize("file", ["config.yaml", "model.json", "metrics.json"])
def test_a_copy_that_is_no_text_is_made_again(call, runs: list[Run], tmp_path: Path, file: str) -> None:
    copy = keep(runs[0], tmp_path)
    (copy / file).write_bytes(b"\xff\xfe")
    code, _, err = call("table", copy)
    assert code == 1
    assert "it is a copy: make it again with 'robusthash keep', or take it from the repository" in err


def test_what_is_no_run_with_results_is_refused(runs: list[Run], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path)
    with pytest.raises(RunError, match="already a kept copy"):
        keep(load_run(keep(run, tmp_path / "out")), tmp_path / "again")
    with pytest.raises(RunError, match="is a run directory, not a kept copy"):
        keep(runs[0], runs[0].path.parents[1])
    for path in [*run.path.glob("metrics.*"), *run.path.glob("assess.*")]:
        path.unlink()
    with pytest.raises(RunError, match="has no results to keep"):
        keep(run, tmp_path / "out")
    (run.path / "model.json").unlink()
    with pytest.raises(RunError, match="holds no trained model"):
        keep(run, tmp_path / "out")
