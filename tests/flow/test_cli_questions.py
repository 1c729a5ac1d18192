"""``robusthash questions`` on a run of the small generated world: the curve, its figure, going on, and
refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.block_store import FolderStore
from robusthash.apps.experiment.config import make_config
from robusthash.attacks.oracle import QueryOracle

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 20, "database": 60},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}, "text": {"name": "mlp", "widths": [16]}},
    "training": {"objective": "csq", "epochs": 4, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [], "batch_size": 8, "queries": 3},
    "runtime": {"device": "cpu", "threads": 1},
}
ASKED = ("--queries", 16, "--budgets", "1,5,30", "--threat", "img-linf-24")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


def test_curves_fall_with_questions_and_rank_what_is_shown(call, trained, tmp_path):
    code, out, err = call("questions", trained, *ASKED, "--json", "--figure", tmp_path / "new" / "asked.pdf")
    assert code == 0, err
    found = json.loads(out)
    assert found["budgets"] == [1, 5, 30]
    assert found["queries"] == 16, "the 3 queries of the recipe are not meant"
    assert (found["search"], found["threat"], found["run"]) == ("square", "img-linf-24", str(trained))
    assert [shows["judge"] for shows in found["shows"].values()] == ["ap", "ap", "ap", "rank"]
    curves = {shows: of["wMAP"] for shows, of in found["shows"].items()}
    for name, values in curves.items():
        assert values == sorted(values, reverse=True), name
        assert values[0] == pytest.approx(found["clean"]), "the first question is about the clean query"
        ends = found["shows"][name]["interval"]
        assert all(low <= value <= high for value, (low, high) in zip(values, ends, strict=True))
    assert curves["codes"][-1] < found["clean"] - 0.02
    assert curves["distances"] == curves["codes"], "both tell the attacker the same AP"
    assert found["clean"] >= curves["coarse"][-1] >= curves["codes"][-1] - 0.02
    assert [Path(path).name for path in found["figures"]] == ["asked.pdf", "asked.png"]
    assert all(Path(path).stat().st_size > 1000 for path in found["figures"])


def test_the_table_is_of_the_same_numbers_and_asks_nothing_twice(call, trained, monkeypatch):
    _, out, _ = call("questions", trained, *ASKED, "--json")
    found = json.loads(out)

    def asked_again(oracle, batch):
        raise AssertionError("asked again")

    monkeypatch.setattr(QueryOracle, "_answer", asked_again)
    code, out, err = call("questions", trained, *ASKED)
    assert code == 0, err
    for value in (found["clean"], *found["shows"]["codes"]["wMAP"], *found["shows"]["ids"]["wMAP"]):
        assert f"{value:.4f}" in out
    code, out, _ = call("questions", trained, *ASKED, "--shows", "ids")
    assert code == 0
    assert "codes" not in out
    code, _, err = call("questions", trained, *ASKED[:-2])
    assert code == 3
    assert "asked again" in err


def test_a_stopped_search_goes_on_and_ends_the_same(call, trained, monkeypatch):
    options = ("--queries", 20, "--budgets", "4,9", "--search", "nes", "--shows", "codes", "--json")
    kept = FolderStore.save

    def stops(store, spec, restart, block, attacked):
        if block == 1:
            raise RuntimeError("killed")
        kept(store, spec, restart, block, attacked)

    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "save", stops)
        code, _, err = call("questions", trained, *options)
        assert code == 3
        assert "killed" in err
    assert len(list((trained / "questions").rglob("nes*/0/*.npz"))) == 1
    code, went_on, _ = call("questions", trained, *options)
    assert code == 0
    for path in (trained / "questions").rglob("nes*/0/*.npz"):
        path.unlink()
    _, afresh, _ = call("questions", trained, *options)
    assert json.loads(went_on) == json.loads(afresh)


def test_words_are_asked_about_too(call, trained):
    options = ("--direction", "T2I", "--threat", "txt-bow-2", "--queries", 6, "--budgets", "9", "--json")
    code, out, err = call("questions", trained, *options)
    assert code == 0, err
    assert json.loads(out)["search"] == "greedy-words"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--budgets", "100,10"], 1, "rising whole numbers from 1 on"),
        (["--budgets", "0,10"], 1, "rising whole numbers from 1 on"),
        (["--budgets", "10,many"], 1, "got '10,many'"),
        (["--threat", "txt-bow-3"], 1, "does not attack the image queries"),
        (["--threat", "img"], 1, "no threat is called 'img'"),
        (["--search", "squar"], 1, "'square'"),
        (["--search", "greedy-words"], 1, "use 'square'"),
        (["--figure", "asked.svg"], 1, "ends in .pdf or .png"),
        (["--shows", "logits"], 2, "logits"),
        (["--direction", "image"], 2, "I2T"),
    ],
)
def test_refusals(call, trained, options, status, message):
    code, _, err = call("questions", trained, "--queries", 4, "--budgets", "3", *options)
    assert code == status
    assert message in " ".join(err.split())


def test_a_folder_that_is_no_run(call, tmp_path):
    code, _, err = call("questions", tmp_path)
    assert code == 1
    assert "is not a run directory" in " ".join(err.split())
