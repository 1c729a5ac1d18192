"""``robusthash hardening``: its parts on a small run, its file, and what it prints of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from service_parts import picture

from robusthash.apps.experiment import hardening_run
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.hardening_run import measure_hardening
from robusthash.apps.experiment.run_directory import load_run
from robusthash.apps.experiment.training_stages import train

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 8, "database": 40},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32},
    "runtime": {"device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder


def test_parts_are_measured_one_by_one_into_a_file(call, trained, photographs, tmp_path) -> None:
    out = tmp_path / "found.json"
    options = ("--queries", 4, "--budgets", "2,6", "--out", out, "--json")
    for parts in ("answers", "detection,agreement"):
        code, text, err = call("hardening", trained, "--parts", parts, "--photographs", photographs, *options)
        assert code == 0, err
    found = json.loads(out.read_text())
    assert found == json.loads(text)
    assert set(found["answers"]["square"]["shows"]) == {"codes", "distances", "coarse", "ids"}
    attackers = found["detection"]["attackers"]
    assert [one["search"] for one in attackers] == ["square"] * 6 + ["nes"] * 6
    assert all(one["answered"] == 6 and one["refused"] == 0 for one in attackers), "six are allowed"
    assert [one["kind"] for one in found["detection"]["traffic"]][-1] == "all of it"
    rows = {one["queries"]: one for one in found["agreement"]["rows"]}
    assert {"clean", "clean, jpeg-50", "hag", "hag with the changes"} <= set(rows)
    assert rows["guided-apgd"]["wMAP"] < rows["clean"]["wMAP"]
    within = found["agreement"]["within"]
    assert within[0] >= within[1]

    code, text, _ = call("hardening", out, "--parts", "detection")
    assert code == 0
    assert "| square | ten clients |" in text
    assert "hag with the changes" not in text


def test_passes_inside_each_attack_are_shown_and_rows_outlive_an_interrupt(
    trained, tmp_path, monkeypatch
) -> None:
    run, out, shown, begun = load_run(trained), tmp_path / "cut.json", {}, []
    attacked = hardening_run._attacked

    def interrupted(context, spec, passes, progress):
        begun.append(spec.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return attacked(context, spec, passes, progress)

    def progress(done: int, total: int, text: str) -> None:
        shown.setdefault(text, []).append((done, total))

    monkeypatch.setattr(hardening_run, "_attacked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_hardening(run, ["agreement"], out, 4, progress=progress)
    assert "agreement" not in json.loads(out.read_text())
    assert [len(set(shown[f"{name}: forward passes"])) for name in begun[:2]] == [100, 300]
    assert shown["hag: codes of the changes"][-1] == (4, 4)
    went_on = measure_hardening(run, ["agreement"], out, 4)
    assert begun[2:] == ["mainstay", "mainstay", *begun[4:]]
    assert len(begun) == 7
    assert went_on == json.loads(out.read_text())
    assert "unfinished" not in went_on
    assert went_on == measure_hardening(run, ["agreement"], tmp_path / "whole.json", 4)
    assert len(begun) == 13
    assert measure_hardening(run, ["agreement"], out, 3)["queries"] == {"agreement": 3}
    assert len(begun) == 19, "rows of other settings are not taken"


def test_learned_attacks_take_no_more_than_the_training_items(call, trained, tmp_path) -> None:
    options = ("--queries", 4, "--budgets", "20,500", "--out", tmp_path / "l.json", "--json")
    code, text, err = call("hardening", trained, "--parts", "learned", *options)
    assert code == 0, err
    rows = [(one["attack"], one["shows"], one["in all"]) for one in json.loads(text)["learned"]]
    assert rows == [(*kind, count) for kind in (("aach", "codes"), ("eqb2a", "ids")) for count in (20, 64)]


def test_refusals(call, trained, tmp_path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for source, options, message in (
        (trained, ["--parts", "detection"], "--photographs"),
        (trained, ["--parts", "speed"], "not speed"),
        (tmp_path / "other.json", [], "no file of 'robusthash hardening'"),
        (tmp_path, [], "is not a run directory"),
    ):
        code, _, err = call("hardening", source, *options)
        assert code == 1
        assert message in " ".join(err.split())


@pytest.mark.parametrize("content", ["[]", '{"run": "another"}'])
def test_a_file_of_something_else_is_left_alone(call, trained, tmp_path, content) -> None:
    out = tmp_path / "other.json"
    out.write_text(content)
    code, _, err = call("hardening", trained, "--parts", "agreement", "--queries", 2, "--out", out)
    assert code == 1
    assert "name another" in err
    assert out.read_text() == content


def test_an_unknown_part_of_a_file_is_refused(call, tmp_path) -> None:
    file = tmp_path / "of.json"
    file.write_text('{"run": "tiny", "threat": "img-linf-8", "queries": {}}')
    code, _, err = call("hardening", file, "--parts", "nope")
    assert code == 1
    assert "parts are" in err
