"""A library of image files in an index, by command line: what real folders hold, and what comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robusthash.apps.commands import index as index_verbs
from robusthash.apps.commands import terminal
from robusthash.apps.experiment import index_run
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.reports import picture_pages
from tests.index_kills import Writers, make_library, one_thread

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic"},
    "hasher": {"bits": 32, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Five pictures in two folders."""
    chance = np.random.default_rng(0)
    for name in ("cats/a.jpg", "cats/b.png", "dogs/c.jpg", "dogs/d.png", "dogs/e.jfif"):
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30))
        pixels.save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return tmp_path / "library"


@pytest.fixture
def add(call, trained, tmp_path, library):
    """Build the index of the library, then call ``index add`` on it; the answer as JSON."""
    assert call("index", "build", tmp_path / "ix", "--run", trained, "--images", library)[0] == 0

    def run(*words):
        code, out, err = call("index", "add", tmp_path / "ix", *words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def found(call, index, image, *words):
    code, out, err = call("search", index, image, "--json", *words)
    assert code == 0, err
    return json.loads(out)


def counts(info):
    return {key: info[key] for key in ("added", "updated", "unchanged", "count")}


def test_a_build_says_how_few_codes_are_different(trained, call, library, tmp_path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(5):
        (copies / f"{number}.png").write_bytes((library / "cats" / "b.png").read_bytes())
    words = ("index", "build", tmp_path / "ix", "--run", trained, "--images", copies)
    assert "5 images have 1 different code," in call(*words)[2]
    assert "different code" not in call(*words)[2], "nothing is encoded now"


def test_the_picture_comes_back(call, add, tmp_path, library):
    best = found(call, tmp_path / "ix", library / "dogs/d.png")[0]
    assert best == {"id": 3, "distance": 0, "payload": {"path": str(library / "dogs/d.png")}}
    out = call("search", tmp_path / "ix", library / "dogs/d.png")[1]
    table = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [cell.strip() for cell in table[0]][:3] == [str(library / "dogs/d.png"), "0", "3"]


def test_adding_again_reads_what_has_changed_and_nothing_else(add, library, monkeypatch):
    read: list[str] = []
    reader = index_run.iter_images
    monkeypatch.setattr(
        index_run, "iter_images", lambda paths, *a: read.extend(p.name for p in paths) or reader(paths, *a)
    )
    assert counts(add(library)) == {
        "added": 0, "updated": 0, "unchanged": 5, "count": 5
    }  # fmt: skip
    assert read == []
    os.utime(library / "cats/a.jpg", (1, 1))
    (library / "dogs/new.jpg").write_bytes((library / "cats/a.jpg").read_bytes())
    assert counts(add(library)) == {
        "added": 1, "updated": 1, "unchanged": 4, "count": 6
    }  # fmt: skip
    assert read == ["a.jpg", "new.jpg"]


def test_a_path_is_one_item_however_it_is_written(add, library, monkeypatch):
    monkeypatch.chdir(library / "dogs")
    assert add("../cats")["count"] == 5
    assert add("c.jpg", "--on-duplicate", "skip")["unchanged"] == 1


def test_error_and_its_advice(call, add, tmp_path, library):
    code, _, err = call("index", "add", tmp_path / "ix", library, "--on-duplicate", "error")
    assert code == 1
    assert f"5 of 5 images are in the index already (first: {library / 'cats/a.jpg'})" in err
    for advice in ("update", "skip"):
        assert add(library, "--on-duplicate", advice)["count"] == 5


def test_an_interrupted_build_goes_on(call, trained, tmp_path, monkeypatch):
    library, index, pieces = make_library(tmp_path / "library", 600), tmp_path / "ix", 0
    write = index_run._add_piece

    def stopped(*arguments):
        nonlocal pieces
        if pieces == 1:
            raise OSError("stopped")
        pieces += 1
        write(*arguments)

    monkeypatch.setattr(index_run, "_add_piece", stopped)
    words = ("index", "build", index, "--run", trained, "--images", library, "--json")
    assert call(*words)[0] == 1
    monkeypatch.undo()
    code, out, err = call(*words)
    assert code == 0, err
    assert {key: json.loads(out)[key] for key in ("added", "unchanged", "count")} == {
        "added": 344, "unchanged": 256, "count": 600
    }  # fmt: skip
    code, _, err = call("index", "build", index, "--run", trained, "--images", library / "000")
    assert code == 1
    assert "holds 600 items of another build; add images to it with 'index add'" in err
    assert json.loads(call("index", "add", index, library / "000", "--json")[1])["count"] == 600


def test_the_database_of_a_run_is_indexed_once(call, trained, tmp_path):
    counts = [
        json.loads(call("index", "build", tmp_path / "ix", "--run", trained, "--json")[1])["count"]
        for _ in range(2)
    ]
    assert counts == [200, 200]


def test_one_unreadable_file_in_a_last_piece_ends_nothing(call, trained, tmp_path):
    library = make_library(tmp_path / "library", 256)
    (library / "999.jpg").touch()
    code, out, err = call("index", "build", tmp_path / "ix", "--run", trained, "--images", library, "--json")
    assert code == 0, err
    info = json.loads(out)
    assert info["count"] == 256
    assert [one["file"] for one in info["skipped"]] == [str(library / "999.jpg")]


def test_a_hostile_folder_is_indexed_and_its_other_entries_are_named(call, add, tmp_path, library):
    os.mkfifo(library / "pipe.jpg")
    (library / "zero.jpg").symlink_to("/dev/zero")
    (library / "gone.jpg").symlink_to("nowhere")
    (library / "round.jpg").symlink_to("round.jpg")
    (library / "album.jpg").mkdir()
    (library / "album.jpg/in.png").write_bytes((library / "cats/b.png").read_bytes())
    (library / "text.jpg").write_text("no picture")
    name = os.fsdecode(os.fsencode(library) + b"/caf\xe9.jpg")
    os.link(library / "cats/a.jpg", name)
    info = add(library)
    assert (info["added"], info["count"]) == (2, 7)
    assert {os.path.basename(one["file"]) for one in info["skipped"]} == {
        "pipe.jpg", "zero.jpg", "gone.jpg", "round.jpg", "album.jpg", "text.jpg"
    }  # fmt: skip
    paths = [hit["payload"]["path"] for hit in found(call, tmp_path / "ix", name, "-k", 2)]
    assert paths == [str(library / "cats/a.jpg"), str(library / "caf\\xe9.jpg")]
    assert add(library)["unchanged"] == 7
    for image in ("pipe.jpg", "zero.jpg", "album.jpg", "round.jpg"):
        code, _, err = call("search", tmp_path / "ix", library / image)
        assert code == 1
        assert image in err
    err = call("index", "add", tmp_path / "ix", library)[2]
    assert f"skipped: {library / 'pipe.jpg'} (a pipe (fifo))" in err
    assert json.loads(call("index", "remove", tmp_path / "ix", "--path", library, "--json")[1]) == {
        "removed": 7, "items": 0
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_payload_of_a_file_is_kept_and_filters(call, add, tmp_path, library, kind):
    rows = [
        {"file": "cats/a.jpg", "labels": "cat;young", "country": "no", "code": "007"},
        {"file": "dogs/c.jpg", "labels": "dog", "country": "de", "code": "8"},
        {"file": "dogs/gone.jpg", "labels": "dog", "country": "", "code": "9"},
    ]
    file = tmp_path / f"about.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps({**row, "labels": row["labels"].split(";")}) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    info = add(library, "--payload", file)
    assert (info["updated"], info["unchanged"], info["without_payload"]) == (2, 3, 3)
    assert info["rows_without_file"] == [str(library / "dogs/gone.jpg")]
    index, image = tmp_path / "ix", library / "cats/a.jpg"
    hit = found(call, index, image, "-k", 1)[0]["payload"]
    labels = ["cat", "young"]
    assert hit == {"path": str(image), "labels": labels, "country": "no", "code": "007"}
    for where, count in (
        ("labels: young", 1),
        ("country: no", 1),
        ("code: 007", 1),
        ("code: 7", 0),
        ("code: 8", 1),
    ):
        assert len(found(call, index, image, "--where", f"{{{where}}}")) == count, where
    assert (
        "no item passes the filter {labels: cow}; items have labels cat, young, dog"
        in (call("search", index, image, "--where", "{labels: cow}")[2])
    )
    code, _, err = call("search", index, image, "--where", "{label: cat}")
    assert code == 1
    assert "no item of this index has the payload key 'label'; did you mean 'labels'" in err
    assert add(library)["unchanged"] == 5  # without the file: the payload stays
    os.utime(image, (1, 1))
    assert add(library)["updated"] == 1
    assert add(library)["unchanged"] == add(library, "--payload", file)["unchanged"] == 5
    assert found(call, index, image, "-k", 1)[0]["payload"]["labels"] == labels
    assert json.loads(call("index", "remove", index, "--where", "{labels: cat}", "--json")[1])["removed"] == 1


@pytest.mark.parametrize("where", ["{a: [", "cat", "[1]", "{}", "{a: &x [*x]}", "{1: {2: 3}}", "{a: {b: c}}"])
def test_a_filter_that_is_none_is_one_line(call, add, tmp_path, library, where):
    for words in (("search", tmp_path / "ix", library / "cats/a.jpg"), ("index", "remove", tmp_path / "ix")):
        code, out, err = call(*words, "--where", where)
        assert (code, out) == (1, "")
        assert len(err.strip().splitlines()) == 1
        assert "error:" in err
    assert found(call, tmp_path / "ix", library / "cats/a.jpg", "-k", 9).__len__() == 5


def test_numbers_and_null_of_a_payload_are_found_and_shown_as_written(call, add, tmp_path, library):
    rows = [
        {"file": "cats/a.jpg", "n": "2.0", "b": True, "z": None},
        {"file": "cats/b.png", "n": 2, "b": 1, "z": "a, b"},
        {"file": "dogs/c.jpg", "n": 2**63 + 1},
        {"file": "dogs/d.png", "n": 2**63},
    ]
    (tmp_path / "about.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add(library, "--payload", tmp_path / "about.jsonl")
    index, image = tmp_path / "ix", library / "cats/a.jpg"
    for where, ids in (
        ("n: 2", [0, 1]), ("n: 2.00", [0, 1]), ("n: 2e0", [0, 1]), (f"n: {2**63 + 1}", [2]),
        ("b: true", [0]), ("b: 1", [1]), ("z: null", [0]), ('z: "a, b"', [1]),
    ):  # fmt: skip
        hits = found(call, index, image, "--where", f"{{{where}}}")
        assert sorted(hit["id"] for hit in hits) == ids, where
    for where, has in (("b: 7", "b true, 1"), ("z: 7", 'z null, "a, b"')):
        err = call("search", index, image, "--where", f"{{{where}}}")[2]
        assert f"no item passes the filter {{{where}}}; items have {has}" in err


def test_a_payload_file_names_no_picture_of_its_own(call, add, tmp_path, library):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (9, 9), "red").save(secret)
    for name, value in (("path_hex", os.fsencode(secret).hex()), ("path", str(secret))):
        (tmp_path / "about.csv").write_text(f"file,{name}\ncats/a.jpg,{value}\n")
        code, _, err = call("index", "add", tmp_path / "ix", library, "--payload", tmp_path / "about.csv")
        assert code == 1
        assert f"about.csv, line 2: the index fills in '{name}' itself; rename the column" in err
    hit = {"id": 0, "distance": 0}
    for text, hexed, file in (
        ("a.jpg", os.fsencode(secret).hex(), "a.jpg"),
        ("a.jpg", "no hex", "a.jpg"),
        ("caf\\xe9.jpg", b"caf\xe9.jpg".hex(), os.fsdecode(b"caf\xe9.jpg")),
    ):
        payload = {"path": text, "path_hex": hexed, "path_note": "\x1b[31m red"}
        assert picture_pages._file_of(payload) == Path(file)
        picture_pages.write_search_page(tmp_path / "p.html", secret, [{**hit, "payload": payload}], tmp_path)
        page = (tmp_path / "p.html").read_text()
        assert "\x1b" not in page
        assert "path_note: \\x1b[31m red" in page


@pytest.mark.parametrize("told", ["null", "{}", "[]", '{"run": 5}', '{"run": null}', "{", '{"run": "gone"}'])
def test_an_index_that_tells_no_run_asks_for_one(call, add, trained, tmp_path, library, told):
    (tmp_path / "ix/run.json").write_text(told)
    for words in (
        ("search", tmp_path / "ix", library / "cats/a.jpg"),
        ("index", "add", tmp_path / "ix", library),
    ):
        code, _, err = call(*words)
        assert code == 1
        assert len(err.strip().splitlines()) == 1
        assert "name it with --run" in err
        assert call(*words, "--run", trained)[0] == 0


def test_choice_and_run_are_checked_when_nothing_is_new(call, add, tmp_path, library):
    other = train(
        make_config({**CONFIG, "hasher": {"bits": 32, "image": {"name": "small", "width": 5}}}),
        tmp_path / "runs",
    ).path
    for words, text in (
        (("--on-duplicate", "foo"), "is one of error, skip, update, got 'foo'"),
        (("--run", other), "do not fit an index of origin"),
    ):
        code, _, err = call("index", "add", tmp_path / "ix", library, *words)
        assert code == 1, words
        assert text in err


def test_removals_that_meet_nothing_say_so(call, add, tmp_path, library):
    names = [b"caf\xe9.jpg", b"d\xe9r/x.jpg", b"d\xe9r/y.jpg"]
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(library), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (9, 9), (number * 50, 9, 9)).save(os.fsdecode(path), "JPEG")
    assert add(library)["count"] == 8

    def remove(*words):
        code, out, err = call("index", "remove", tmp_path / "ix", *words, "--json")
        return json.loads(out) if code == 0 else (code, err)

    assert remove("--path", library / "caf\\xe9.jpg") == {"removed": 1, "items": 7}
    assert remove("--path", os.fsdecode(os.fsencode(library) + b"/d\xe9r/x.jpg")) == {
        "removed": 1,
        "items": 6,
    }
    assert remove("--path", os.fsdecode(os.fsencode(library) + b"/d\xe9r")) == {"removed": 1, "items": 5}
    for words, text in (
        (("--path", library / "cats/a.jpeg"), "no item is at or below .*a.jpeg; did you mean 'a.jpg'"),
        (("--path", "nix"), "no item is at or below nix; the index holds paths such as /"),
        ((999,), "no item has the id 999; nothing was removed of 5 items"),
    ):
        code, err = remove(*words)
        assert code == 1
        assert re.search(text, err), err
    (tmp_path / "about.csv").write_text("file,labels\ncats/a.jpg,cat\n")
    add(library, "--payload", tmp_path / "about.csv")
    code, err = remove("--where", "{labels: zebra}")
    assert code == 1
    assert "no item passes the filter {labels: zebra}; items have labels cat" in err
    assert remove(0, 999) == {"removed": 1, "items": 7, "missing": [999]}
    assert "not in the index: 999" in call("index", "remove", tmp_path / "ix", 1, 999)[2]


def test_pages_and_payload_files_are_regular_files(call, add, tmp_path, library, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for html in (".", "", tmp_path):
        code, _, err = call("search", "ix", library / "cats/a.jpg", "--html", html)
        assert code == 1
        assert "--html takes the name of a file such as found.html" in err
    os.mkfifo("about.csv")
    code, _, err = call("index", "add", "ix", library, "--payload", "about.csv")
    assert code == 1
    assert "about.csv is no regular file" in err


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_terminal_breaks_no_path(monkeypatch, capsys, width):
    monkeypatch.setattr(terminal.answers, "width", width)
    path = f"/photos/{'long name ' * 9}/a.jpg"
    index_verbs._print_hits(
        "nearest", [{"id": 1, "distance": 3, "payload": {"path": path, "labels": ["cat"]}}]
    )
    assert path in capsys.readouterr().out


def test_removal_by_path_and_ids_that_are_never_given_again(call, add, tmp_path, library):
    index = tmp_path / "ix"
    assert (
        json.loads(call("index", "remove", index, "--path", library / "dogs/e.jfif", "--json")[1])["items"]
        == 4
    )
    assert add(library)["added"] == 1
    assert found(call, index, library / "dogs/e.jfif", "-k", 1)[0]["id"] == 5
    assert json.loads(call("index", "remove", index, "--path", library / "dogs", "--json")[1])["items"] == 2
    code, _, err = call("index", "remove", index)
    assert code == 1
    assert "name ids, --path or --where" in err


def test_a_page_of_results_shows_pictures_and_escapes_names(call, add, tmp_path, library):
    strange = library / "<script>alert(1)<b>.png"
    Image.open(library / "cats/b.png").save(strange)
    add(library)
    (library / "cats/b.png").unlink()
    page = tmp_path / "found.html"
    code, out, err = call("search", tmp_path / "ix", strange, "-k", 6, "--html", page)
    assert (code, out.splitlines()[-1]) == (0, str(page)), err
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;b&gt;.png" in text
    assert text.count("data:image/png;base64") == 6  # the query and five results
    assert text.count("no picture") == 1  # whose file is gone


def test_max_pixels_and_workers_are_options_of_the_verbs_that_read(call, add, trained, tmp_path, library):
    Image.new("L", (200, 50)).save(library / "wide.png")
    limit = ("--max-pixels", 9999)
    for words in (
        ("index", "add", tmp_path / "ix", library / "wide.png"),
        ("encode", trained, library / "wide.png"),
        ("search", tmp_path / "ix", library / "wide.png"),
    ):
        code, _, err = call(*words, *limit)
        assert code == 1
        assert "raise max_pixels (--max-pixels on the command line) to 10000" in err.replace("\n", "")
        assert call(*words, "--max-pixels", 10_000)[0] == 0
    assert add(library, "--workers", 3)["count"] == 6


def test_encode_names_what_it_passes_over(call, trained, library):
    (library / "note.txt").write_text("hello")
    (library / "empty.jpg").touch()
    code, out, err = call("encode", trained, library)
    assert code == 0
    assert len(out.splitlines()) == 5
    for name in ("note.txt", "empty.jpg"):
        assert f"passed over: {library / name}" in err


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(call, trained, tmp_path, monkeypatch):
    library = make_library(tmp_path / "library", 300)
    monkeypatch.setattr(terminal, "_SECONDS", 0.0)
    err = call("index", "build", tmp_path / "ix", "--run", trained, "--images", library)[2]
    assert re.search(
        r"^encoding images: 256 of 300\nencoding images: 300 of 300, .*/s, 0:00:00 left$", err, re.M
    )


def test_two_adds_at_once_both_succeed(add, tmp_path):
    folders = [make_library(tmp_path / name, 40, side) for name, side in (("one", 24), ("two", 30))]
    command = [sys.executable, "-m", "robusthash", "index", "add", str(tmp_path / "ix")]
    with one_thread():
        adding = [subprocess.Popen([*command, str(folder)], stderr=subprocess.PIPE) for folder in folders]
    for process in adding:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert add(folders[0])["count"] == 5 + 80


def test_kills_lose_no_item_that_was_seen_and_double_none(trained, tmp_path):
    """A sample; ``tests/index_kills.py`` does the long counts."""
    writers = Writers(trained, make_library(tmp_path / "library", 1500), tmp_path / "ix", seed=1)
    with one_thread():
        writers.kill_at_random(4, 2, 0.3)
    writers.finished()
    assert writers.kills == 4
    assert writers.midway >= 1
