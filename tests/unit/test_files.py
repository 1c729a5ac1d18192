"""Atomic writing: the old file survives an exception, a kill and a full disk."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robusthash.core.atomic_files import (
    json_text,
    remove_leftovers,
    write_all_aside,
    write_aside,
    write_folder_aside,
    write_text,
)  # fmt: skip


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_new_content_replaces_old_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("old")
    with write_aside(path) as aside:
        assert aside.suffix == ".json"
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["value.json"]


def test_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), write_aside(path) as aside:
        aside.write_text("half, then a lone surrogate: \udcff", encoding="utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.json"]


def test_files_that_belong_together_change_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npz", tmp_path / "a.json"]
    for path in paths:
        path.write_text("old")
    with (
        pytest.raises(FileNotFoundError, match=r"a\.json: nothing was written"),
        write_all_aside(paths) as asides,
    ):
        asides[0].write_text("new")
    assert [path.read_text() for path in paths] == ["old", "old"]
    with write_all_aside(paths) as asides:
        for aside in asides:
            aside.write_text("new")
    assert [path.read_text() for path in paths] == ["new", "new"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"),
        write_aside(tmp_path / "nowhere/x"),
    ):
        pass


def test_an_error_of_another_file_keeps_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), write_aside(tmp_path / "x"):
        (tmp_path / "other.txt").read_text()


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the write itself fails half way."""
    path = tmp_path / "value.bin"
    path.write_text("old")
    child = run(
        "import resource, signal, sys, pathlib\n"
        "from robusthash.core.atomic_files import write_aside\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with write_aside(pathlib.Path(sys.argv[1]) / 'value.bin') as aside:\n"
        "        aside.write_bytes(bytes(100_000))\n"
        "except OSError as error:\n"
        "    print(error)\n",
        tmp_path,
    )
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert f"cannot write {path}" in said
    assert "before is unchanged" in said
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.bin"]


def test_a_kill_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    path.write_text("old")
    child = run(
        "import sys, time, pathlib\n"
        "from robusthash.core.atomic_files import write_aside\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with write_aside(folder / 'value.txt') as aside:\n"
        "    aside.write_text('half')\n"
        "    (folder / 'ready').touch()\n"
        "    time.sleep(60)\n",
        tmp_path,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert path.read_text() == "old"


def test_strict_json_has_words_for_what_it_lacks(tmp_path: Path) -> None:
    value = {"a": (1, float("inf")), "b": [{"c": float("-inf")}], "path": tmp_path, "n": None, "yes": True}
    read = json.loads(json_text(value))
    assert read == {"a": [1, "inf"], "b": [{"c": "-inf"}], "path": str(tmp_path), "n": None, "yes": True}
    with pytest.raises(ValueError, match=r"run\.losses\[1\] is NaN"):
        json_text({"losses": [0.0, float("nan")]}, "run")
    with pytest.raises(ValueError, match=r"value\.x is a set, which JSON does not hold"):
        json_text({"x": {1}})


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "bundle"
    with pytest.raises(FileNotFoundError), write_folder_aside(folder) as aside:
        (aside / "half").write_bytes((tmp_path / "none").read_bytes())
    assert not list((tmp_path / "deep").iterdir())
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process in (ended.pid, os.getppid()):
        left = tmp_path / "deep" / f".bundle.{process}-00.part"
        left.mkdir()
        (left / "half").write_text("half")
    folder.mkdir()  # an empty one may be there
    with write_folder_aside(folder) as aside:
        (aside / "whole").write_text("whole")
        assert not list(folder.iterdir())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert {path.name for path in folder.parent.iterdir()} == {"bundle", f".bundle.{os.getppid()}-00.part"}
    with pytest.raises(FileExistsError, match="is not empty"), write_folder_aside(folder):
        pass


def test_leftovers_are_those_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    names = (".a.17-ff.part.json", "deep/.b.c.17-ff.part", ".a.171-ff.part.json", "a.17-ff.part.json")
    for name in names:
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path, 17)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == set(names[2:])


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is there and is no regular file; name another"):
        write_text(tmp_path / "pipe", "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
