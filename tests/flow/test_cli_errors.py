"""The last net of errors: every exception of a verb is one line, with an exit code that says whose fault it is."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from robusthash.apps import cli
from robusthash.apps.audit import measurement
from robusthash.apps.commands.options import AsJson  # noqa: F401 - the verbs are imported as a user's are
from robusthash.core import registry
from robusthash.core.atomic_files import write_aside
from robusthash.models.external.loaders import load_python


def fail(error: Exception):
    def failing(*given: object) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("x [/red] is wrong"), 1, "error: x [/red] is wrong"),
        (KeyError("no such thing is known"), 1, "error: no such thing is known"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 1, "error: a.png: No such file or directory"),
        (KeyError("hasher"), 3, "unexpected KeyError: 'hasher' (test_cli_errors.py"),
        (TypeError("int is not\niterable"), 3, "unexpected TypeError: int is not ("),
        (ZeroDivisionError("division by zero"), 3, "unexpected ZeroDivisionError: division by zero"),
        (IndexError(), 3, "unexpected IndexError ("),
        (RecursionError("maximum recursion depth"), 3, "unexpected RecursionError"),
        (sqlite3.OperationalError("disk I/O error"), 3, "unexpected OperationalError: disk I/O error"),
        (RuntimeError("shape mismatch"), 3, "unexpected RuntimeError: shape mismatch"),
        (MemoryError(), 1, "memory is not enough"),
    ],
)  # fmt: skip
def test_any_exception_is_one_line(call, monkeypatch, error, code, said):
    monkeypatch.setattr(registry, "catalogue", fail(error))
    got, out, err = call("list")
    assert (got, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert (cli.TRACE in err) == (code == 3)
    monkeypatch.setenv(cli.TRACE, "1")
    assert "Traceback" in call("list")[2]


def test_nobody_reads_the_output():
    program = [sys.executable, "-m", "robusthash", "list", "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == b""
        assert done.wait() in (0, 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/1"
        ),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_file(tmp_path: Path, error: Exception):
    (tmp_path / "resume.pt").write_text("old")
    said = r"cannot write .*resume\.pt: is the disk full"
    with pytest.raises(OSError, match=said), write_aside(tmp_path / "resume.pt"):
        raise error
    assert (tmp_path / "resume.pt").read_text() == "old"


def test_torch_says_of_a_full_disk_what_we_look_for():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(Exception, match=r"inline_container\.cc|No space left"):
        torch.save(torch.zeros(1 << 20), "/dev/full")


def test_the_current_folder_is_no_place_for_code_of_a_run(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(measurement, "run_audit", fail(ValueError("opened")))
    (tmp_path / "a:b").mkdir()
    for target in ("a:b", "none.pt", "phash"):
        assert call("audit", target)[0] == 1
        assert str(tmp_path) not in sys.path
    (tmp_path / "my_own_model.py").write_text("net = abs\n")
    assert load_python("my_own_model:net") is abs
    assert sys.path[-1] == str(tmp_path)  # last: it hides no other module
    monkeypatch.delitem(sys.modules, "my_own_model")


def test_a_file_that_cannot_be_written_is_named_without_numbers_of_the_system(call, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "run_audit", fail(OSError(2, "cannot write a.html: no such folder")))
    code, _, err = call("audit", "phash")
    assert (code, err) == (1, "error: cannot write a.html: no such folder\n")
