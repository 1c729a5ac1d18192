"""Cards of runs and of exported models are believed only where weights, config and directory agree."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import robusthash as rh
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.apps.experiment.run_files import sealed

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "size": 16, "train": 24, "query": 8, "database": 16},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 12},
    "evaluation": {"attacks": [{"name": "hag", "steps": 1}]},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(made)
    return made


@pytest.fixture(scope="module")
def other(trained: Run) -> Run:
    made = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), trained.path.parents[1])
    evaluation_stages.evaluate(made)
    return made


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Path:
    """A copy, in its place, that a test may change."""
    return Path(shutil.copytree(trained.path, tmp_path / "runs" / "tiny" / trained.id))


@pytest.fixture
def exported(trained: Run, tmp_path: Path) -> Path:
    rh.load(trained.path, device="cpu").save(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, seal: str = "stale", **changes: object) -> None:
    """Change fields of a card (``...`` leaves one out); its seal is left, made again or left out."""
    path = folder / "model.json"
    card = {**json.loads(path.read_text()), **changes}
    card = {name: value for name, value in card.items() if value is not ...}
    if seal != "stale":
        card = sealed(card)
    if seal == "none":
        del card["card"]
    path.write_text(json.dumps(card))


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# ---------------------------------------------------------------------------------------------- exports


def test_an_export_carries_the_digest_of_its_run_and_no_other(
    trained: Run, other: Run, exported: Path
) -> None:
    assert rh.load(exported).origin == trained.card()["digest"]
    edit(exported, "new", digest=other.card()["digest"])
    with pytest.raises(RunError, match="and that of the weights " + str(trained.card()["digest"])):
        rh.load(exported)
    edit(exported, "new", digest=other.card()["digest"], files=...)
    with pytest.raises(RunError, match="and that of the weights "):
        rh.load(exported)


def test_an_export_of_an_earlier_version_is_loaded_and_its_digest_not_believed(
    other: Run, exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(exported, "none", digest=other.card()["digest"], files=...)
    model = rh.load(exported, device="cpu")
    assert model.origin not in (other.card()["digest"], "")
    assert "save the model again from its run" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": 5}, "digest is 5"),
        ({"digest": None}, "digest is None"),
        ({"digest": "<b>0000000000000000</b>"}, "digest is '<b>"),
        ({"digest": ...}, "it lacks digest"),
        ({"texts": ...}, "it lacks texts"),
        ({"texts": 3}, "texts is 3"),
        ({"weights": ...}, "it lacks weights"),
        ({"bits": 8}, "bits is 8, and its hasher has 12"),
        ({"bits": True}, "bits is True"),
        ({"modalities": ["text"]}, "modalities is"),
        ({"image_size": [8, 16]}, r"image_size is \[8, 16\], and a model encodes squares"),
        ({"image_size": []}, r"image_size is \[\], and it encodes images alone"),
        ({"image_size": ["16", 16]}, "image_size is"),
        ({"hasher": 5}, "it names no hasher"),
    ],
)
def test_a_bad_field_of_an_export_is_named(exported: Path, changes: dict[str, object], words: str) -> None:
    for seal in ("new", "none"):
        edit(exported, seal, **changes)
        with pytest.raises(RunError, match=rf"^the card \S+model\.json is damaged \(.*{words}.*; save the"):
            rh.load(exported)


def test_an_edited_size_of_an_export_is_noticed(exported: Path) -> None:
    edit(exported, image_size=[8, 8])
    with pytest.raises(RunError, match="a field was changed after it was written"):
        rh.load(exported)


def test_an_export_that_is_a_pipe_is_refused(exported: Path) -> None:
    make_pipe(exported / "hasher.safetensors")
    with pytest.raises(RunError, match="no regular file"):
        rh.load(exported)


def test_another_model_is_not_replaced_unasked(trained: Run, other: Run, exported: Path) -> None:
    model = rh.load(other.path, device="cpu")
    with pytest.raises(FileExistsError, match=r"holds another model, .*overwrite=True"):
        model.save(exported)
    assert rh.load(exported).origin == trained.card()["digest"]
    model.save(exported, overwrite=True)
    model.save(exported)
    assert rh.load(exported).origin == model.origin == other.card()["digest"]


def test_weights_that_changed_since_are_not_saved_under_the_old_digest(trained: Run, tmp_path: Path) -> None:
    model = rh.load(trained.path, device="cpu")
    with torch.no_grad():
        next(model.hasher.parameters()).add_(1)
    with pytest.raises(ValueError, match="may have changed"):
        model.save(tmp_path / "changed")
    rh.SearchModel(model.hasher, model.side).save(tmp_path / "changed")
    assert rh.load(tmp_path / "changed").origin != trained.card()["digest"]


def test_a_model_without_a_size_says_that_it_has_none(trained: Run) -> None:
    with pytest.raises(ValueError, match="images of no known size"):
        rh.SearchModel(trained.load_hasher(), 0).encode(torch.zeros(3, 16, 16))


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("seal", ["stale", "none"])
@pytest.mark.parametrize(
    "changes",
    [{"image_size": [8, 8]}, {"image_size": [8, 16]}, {"bits": 16}, {"seconds": None}, {"name": "another"}],
)
def test_an_edited_card_of_a_run_is_noticed(call, run: Path, changes: dict[str, object], seal: str) -> None:
    edit(run, seal, **changes)
    with pytest.raises(RunError, match=r"the model card \S+model\.json is damaged"):
        rh.load(run)
    code, _, err = call("table", run)
    assert (code, err.count("\n")) == (1, 1), err


def test_a_card_of_an_earlier_version_is_read(run: Path, trained: Run) -> None:
    edit(run, "none", weights=...)
    assert rh.load(run).origin == trained.card()["digest"]


def test_a_card_of_another_run_is_refused_in_its_place(run: Path, other: Run) -> None:
    shutil.copyfile(other.path / "model.json", run / "model.json")
    shutil.copytree(other.path / "checkpoint", run / "checkpoint", dirs_exist_ok=True)
    with pytest.raises(RunError, match=f"it is of the run {other.id}, and the directory of {run.name}"):
        rh.load(run)


def test_results_of_other_weights_are_refused(call, run: Path, other: Run) -> None:
    for path in other.path.glob("metrics*"):
        shutil.copyfile(path, run / path.name)
    for words in (("table", run), ("compare", run, other.path)):
        code, _, err = call(*words)
        assert (code, err.count("\n")) == (1, 1), err
        assert f"is of the weights {other.card()['digest']}" in err
    (run / "metrics.json").unlink()
    evaluation_stages.evaluate(load_run(run))
    assert call("table", run)[0] == 0


def test_results_that_are_a_pipe_are_refused(call, run: Path) -> None:
    make_pipe(next(run.glob("metrics-*.npz")))
    code, _, err = call("table", run)
    assert code == 1
    assert "is no regular file" in err


@pytest.mark.parametrize("result", [0, -1])
def test_an_edited_headline_is_noticed(call, run: Path, result: int) -> None:
    path = run / "metrics.json"
    held = json.loads(path.read_text())
    values = held["results"][result]["values"]
    key = next(name for name in values if name in ("MAP", "wMAP"))
    values[key] = 0.99
    path.write_text(json.dumps(held))
    code, _, err = call("table", run)
    assert code == 1
    assert f"{key} is 0.99, and its queries have the mean" in err


def test_a_headline_without_its_interval_is_named(call, run: Path) -> None:
    path = run / "metrics.json"
    held = json.loads(path.read_text())
    held["results"][0]["interval"] = {}
    path.write_text(json.dumps(held))
    for verb in ("table", "report"):
        code, _, err = call(verb, run)
        assert code == 1
        assert "'clean' holds no MAP with an interval" in err


# ---------------------------------------------------------------------------------------------- entries


def test_an_entry_is_of_the_name_within_its_recipe(call, run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    shutil.copyfile(run / "config.yaml", recipe)
    words = ("evidence", "entry", run, "--recipe", recipe, "--out", tmp_path / "reg")
    code, out, err = call(*words)
    assert code == 0, err
    code, _, err = call("verify", out.strip(), "--run", run)
    assert code == 0, err
    for more in (("--set", "training.epochs=2"), ("--set", "name=another")):
        code, _, err = call(*words, *more)
        assert code == 1
        assert "makes another model" in err
