"""From a folder to a searched index: labelled or not, stopped on the way, called again, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import write_photographs

import robusthash as rh
from robusthash.apps.experiment.quickstart_run import duration, plan
from robusthash.apps.experiment.run_directory import load_run
from robusthash.data.copies import CHANGES, HELD_OUT, TRAINED
from robusthash.index import open_index

from .test_report import check_self_contained

SMALL = (
    *("data.size=32", "data.copies=12", "data.asked=6"),
    *("hasher.image.width=8", "training.epochs=6", "evaluation.attacks=[{name: pgd, steps: 2}]"),
)
LABELLED = (*SMALL[3:], "data.size=32", "evaluation.queries=4")
COUNT = 20


class Stopped(Exception):
    """Somebody pressed Ctrl-C."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), COUNT)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, summary, progress texts of the third call): stopped in training, then while it indexed."""
    out = tmp_path_factory.mktemp("quickstart")

    def stop_at(start: str, after: int) -> Any:
        def stop(done: int, total: int, text: str) -> None:
            if text.startswith(start) and done >= after:
                raise Stopped

        return stop

    for start, after in (("epoch 4", 1), ("encoding images", 0)):
        with pytest.raises(Stopped):
            rh.quickstart(folder, out, sets=SMALL, progress=stop_at(start, after))
    assert not (out / "quickstart.json").exists()
    texts: list[str] = []
    summary = rh.quickstart(folder, out, sets=SMALL, progress=lambda done, total, text: texts.append(text))
    return out, summary, texts


def test_a_stopped_quickstart_goes_on_and_indexes_each_image_once(folder: Path, made):
    out, summary, texts = made
    assert json.loads((out / "quickstart.json").read_text()) == json.loads(json.dumps(summary))
    assert not any(text.startswith("epoch") for text in texts)
    assert [line["epoch"] for line in load_run(summary["run"]).lines()] == list(range(6))
    with open_index(f"file:{summary['index']}", create=False) as index:
        assert index.count() == summary["indexed"] == COUNT


def test_recall_is_reported_by_kind_of_change(folder: Path, made):
    _, summary, _ = made
    rows = {row["copies"]: row for row in summary["copies"]}
    assert list(rows) == [*(change.name for change in CHANGES), TRAINED, HELD_OUT, "all"]
    assert rows["all"]["queries"] == 6 * len(CHANGES) == rows[TRAINED]["queries"] + rows[HELD_OUT]["queries"]
    clean = load_run(summary["run"]).evaluated()["clean"]
    assert rows["all"]["found first"] == clean.values["P@1"]
    assert rows["all"]["found first"] > 0.6 > 3 / COUNT
    assert rows["all"]["first under pgd"] <= 1
    page = check_self_contained(Path(summary["report"]).read_text(encoding="utf-8"))
    assert f"copies: 64 bits on {folder.name}" in page.words
    assert "no precision-recall curve" not in page.words
    assert "at four times the model's size" in page.words
    for name, row in rows.items():
        assert name in page.words
        assert f"{row['found first']:.3f}" in page.words


def test_the_example_is_searched_and_the_next_commands_work(call, folder: Path, made):
    _, summary, _ = made
    example = summary["example"]
    assert Path(example["copy of"]).parent == folder
    assert example["copy of"] in [hit["payload"]["path"] for hit in example["hits"]]
    assert list(summary["next"]) == ["search", "assess", "audit", "harden"]
    code, out, _ = call(*summary["next"]["search"].split()[1:], "-k", 5, "--json")
    assert code == 0
    assert [hit["id"] for hit in json.loads(out)] == [hit["id"] for hit in example["hits"]]


def test_the_command_prints_what_python_gives_and_trains_nothing_again(call, folder: Path, made):
    out, summary, _ = made
    sets = [word for text in SMALL for word in ("--set", text)]
    code, printed, told = call("quickstart", folder, "--out", out, *sets, "--json")
    assert code == 0
    assert f"{COUNT} images: each image is a class of its own" in told
    again = json.loads(printed)
    for key in ("run", "index", "indexed", "copies", "headline", "next"):
        assert again[key] == json.loads(json.dumps(summary))[key]
    code, printed, told = call("quickstart", folder, "--out", out, *sets)
    assert printed.splitlines()[-3:] == [f"{name}: {summary[name]}" for name in ("run", "index", "report")]
    for text in ("found first", "jpeg-50", HELD_OUT, "robusthash assess", "robusthash audit"):
        assert text in printed + told
    code, printed, told = call("evaluate", summary["run"])
    assert code == 0
    assert "copies that find their image" in printed


def test_an_image_that_came_is_indexed_and_the_model_stays(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "images")
    sets = (*SMALL, "evaluation.attacks=[]", "training.epochs=1")
    first = rh.quickstart(tmp_path / "images", tmp_path / "out", sets=sets)
    shutil.copy(folder / "0.jpg", tmp_path / "images" / "more.jpg")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    second = rh.quickstart(tmp_path / "images", tmp_path / "out", sets=sets)
    assert (second["run"], second["indexed"]) == (first["run"], COUNT + 1)
    assert (second["added"], second["unchanged"]) == (1, COUNT)
    assert [Path(one["file"]).name for one in second["skipped"]] == ["broken.jpg"]


def test_hardening_goes_on_from_the_run(call, made):
    out, summary, _ = made
    code, printed, told = call(*summary["next"]["harden"].split()[1:], "--set", "training.epochs=1")
    assert code == 0, told
    hardened = load_run(printed.strip().splitlines()[-1])
    assert hardened.config.training.outer["name"] == "saat"
    assert {path.parent.name for path in (out / "runs").glob("*/*")} == {"copies", "copies-saat"}
    assert "first under pgd" in printed


def labelled(folder: Path, target: Path, classes: int) -> Path:
    """Class folders ``c0``, ``c1``, ... of the photographs."""
    for number in range(COUNT):
        place = target / f"c{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{number}.jpg", place)
    return target


def test_class_folders_and_a_manifest_are_labels(folder: Path, tmp_path: Path):
    images = labelled(folder, tmp_path / "classes", 2)
    summary = rh.quickstart(images, tmp_path / "out", sets=LABELLED)
    assert "2 subfolders as classes (c0 and c1)" in summary["taken for"]
    assert summary["copies"] == []
    assert summary["indexed"] == COUNT
    assert {"clean", "pgd", "worst"} == set(summary["headline"])
    shutil.copytree(folder, tmp_path / "flat")
    lines = [json.dumps({"file": f"{n}.jpg", "labels": [f"c{n % 2}"]}) for n in range(COUNT)]
    (tmp_path / "flat" / "labels.jsonl").write_text("\n".join(lines))
    summary = rh.quickstart(tmp_path / "flat", tmp_path / "out", sets=LABELLED)
    assert "labels of labels.jsonl" in summary["taken for"]
    assert load_run(summary["run"]).config.data["manifest"] == str(tmp_path / "flat" / "labels.jsonl")


def test_what_a_folder_is_taken_for(folder: Path, tmp_path: Path):
    assert plan(folder).recipe == "copies"
    images = labelled(folder, tmp_path / "classes", 2)
    assert plan(images).recipe == "labels"
    assert plan(images, "none").recipe == "copies"
    shutil.copy(folder / "0.jpg", images)
    assert "1 images lie next to the subfolders" in plan(images).words
    one = labelled(folder, tmp_path / "one", 1)
    assert "one subfolder, 'c0'" in plan(one).words
    with pytest.raises(ValueError, match=r"holds 1 class folder, and labels need two.*--labels none"):
        plan(one, "folders")
    for name in ("a.csv", "b.csv"):
        (one / name).write_text("file,labels\n")
        if name == "a.csv":
            assert plan(one).data["manifest"] == str(one / "a.csv")
    with pytest.raises(ValueError, match=r"several manifests \(a.csv, b.csv\); name one by --manifest"):
        plan(one)


def test_a_folder_that_cannot_be_used_is_one_line(call, folder: Path, tmp_path: Path):
    few = tmp_path / "few"
    few.mkdir()
    for images, reason in ((tmp_path / "none", "no folder"), (few, "holds no image")):
        code, _, told = call("quickstart", images, "--out", tmp_path / "out")
        assert code == 1
        assert reason in told.splitlines()[-1]
        assert "Makes a search" not in told
    for number in range(3):
        shutil.copy(folder / f"{number}.jpg", few)
    code, _, told = call("quickstart", few, "--out", tmp_path / "out")
    assert code == 1
    assert "holds 3 images, and training without labels needs at least 10" in told.splitlines()[-1]


@pytest.mark.parametrize("name", ["none", "empty", "few"])
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path, name: str):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "few").mkdir()
    shutil.copy(folder / "0.jpg", tmp_path / "few")
    program = (
        "import sys; from robusthash.apps import cli; "
        "sys.modules['robusthash.apps.experiment.quickstart_run'] = None; "
        f"sys.argv = ['robusthash', 'quickstart', {str(tmp_path / name)!r}]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = {"none": "no folder", "empty": "holds no image", "few": "holds 1 file, and"}[name]
    assert said in done.stderr.splitlines()[-1]


def test_skipped_files_are_printed_once_and_the_time_is_that_of_the_folder(call, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    sets = [
        word for text in (*SMALL, "evaluation.attacks=[]", "training.epochs=1") for word in ("--set", text)
    ]
    code, _, told = call("quickstart", tmp_path / "images", "--out", tmp_path / "out", *sets)
    assert code == 0, told
    assert told.count("skipped as unreadable") == 1
    assert "about a minute on two free cores" in told


def test_the_time_goes_with_the_folder():
    said = [duration(count, "copies") for count in (20, 200, 250, 5000)]
    assert said == ["about a minute", "about 3 minutes", "about 4 minutes", "about 4 minutes"]


def test_the_recipes_of_the_repository_are_those_of_the_package():
    recipes = Path(__file__).parents[2] / "recipes"
    for name in ("copies.yaml", "copies-saat.yaml"):
        assert yaml.safe_load((recipes / name).read_text()) == {
            "extends": f"../src/robusthash/apps/recipes/{name}"
        }
