"""Progress without a terminal, threads on a busy machine, and remedies that stand next to faults alone."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import make_data, small_hasher

from robusthash.apps import cli
from robusthash.apps.commands import terminal
from robusthash.apps.commands.assess_command import print_assessment
from robusthash.core.runtime import silent, yield_when_busy
from robusthash.evaluation.evaluate import evaluate
from robusthash.metrics.results import Flag


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that ``time.monotonic`` gives, as the one item of a list."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_is_a_line_every_few_seconds_where_there_is_no_terminal(clock, capsys):
    told = []
    with terminal.progress_bars() as progress:
        for second in (0.0, 2.0, 4.9, 5.1, 9.0, 10.2, 16.5):
            clock[0] = 100 + second
            progress(int(second), 12, "epoch 1/3")
            told.append(capsys.readouterr().err)
    assert [bool(text) for text in told] == [False, False, False, True, False, True, True]
    assert told[3].strip() == "epoch 1/3: 5 of 12, 0.98/s, 0:00:07 left"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("load", "left"), [(0.2, 4), (3.5, 4), (4.0, 1), (10.0, 1)])
def test_one_thread_is_taken_on_a_busy_machine(threads, monkeypatch, load, left):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    torch.set_num_threads(4)
    yield_when_busy(silent)
    assert torch.get_num_threads() == left


def test_threads_fall_while_work_goes_on_and_its_own_load_does_not_count(threads, clock, monkeypatch):
    loads = [0.0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (loads[0], 0.0, 0.0))
    torch.set_num_threads(4)
    calls = []
    progress = yield_when_busy(lambda done, total, text: calls.append(text))
    for load, left in ((4.0, 4), (9.0, 1), (0.0, 1)):  # its own four, five more than those, none
        clock[0] += 60
        loads[0] = load
        progress(1, 2, "work")
        assert torch.get_num_threads() == left
    assert calls == ["work"] * 3


def test_the_demo_says_what_it_does_before_it_loads_anything():
    program = (
        "import sys; from robusthash.apps import cli; "
        "sys.modules['robusthash.apps.experiment.demo_run'] = None; sys.argv = ['robusthash', 'demo']; "
        "assert 'torch' not in sys.modules; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "twenty embedded photographs" in done.stderr.splitlines()[0]
    assert "demo/report.html" in done.stderr


WIDE = ["copies", "queries", "found first", "95 % interval", "in first 10"]
WIDE += [f"first under {name}" for name in ("mainstay", "guided-apgd", "pgd")] + ["worst 1/rank"]
ROWS = [
    ["brighter", 60, 0.98, "1.00..1.00", 1.0, 0.0333, 0.0, 0.1234, 0.5678],
    ["never trained on", 300, 0.5, "0.93 .. 0.98", 1.0, 0.0333, 0.0, 0.1234, 0.5678],
]


@pytest.mark.parametrize("width", [None, 80, 60])
def test_no_number_of_a_table_is_cut(capsys, monkeypatch, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:  # a terminal
        monkeypatch.setattr(terminal.answers, "width", width)
        monkeypatch.setattr(type(terminal.answers), "is_terminal", True)
    terminal.print_table("copies", WIDE, ROWS)
    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = told.splitlines()
    assert max(map(len, lines)) <= (width or 120)
    assert "\u2026" not in told
    for text in ("brighter", "1.00..1.00", "0.93 .. 0.98", "mainstay", "guided-apgd", "0.0333", "0.5678"):
        assert text in told
    assert ("continued" in told) == (width is not None)
    if width is None:
        assert any("0.93 .. 0.98" in line and "0.5678" in line for line in lines)


def test_text_in_a_table_wraps_and_a_long_path_folds(capsys):
    path = "/" + "a" * 300
    terminal.print_table(
        "checks", ["check", "value", "remedy"], [["F1", 0.5, "take it away " * 30], [path, 1, ""]]
    )
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 120
    assert "0.5000" in told
    assert told.count("a") > 300


def test_raised_checks_say_what_they_looked_at_and_passed_ones_are_a_line(capsys, monkeypatch):
    monkeypatch.setattr(terminal.answers, "width", 200)
    flags = (
        Flag("F1", 0.1, 0.5, "pass", "take more steps"),
        Flag("F16", math.inf, 0.5, "amber", "not run: no float64"),
        Flag("F2", 0.9, 0.5, "red", "take the gate away"),
        Flag("F3", 0.0, 0.5, "pass", "take more steps"),
    )
    print_assessment(replace(evaluate(small_hasher(), make_data()), curves={}, flags=flags))
    caught = capsys.readouterr()
    told = caught.out
    assert told.index("F2: share of queries whose input gradient is exactly 0") < told.index(
        "F16: share of bits"
    )
    assert "take the gate away" in told
    assert "not run" in told
    assert "inf" not in told
    assert "2 checks passed: F1, F3" in caught.err
    assert "take more steps" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train recipe.yaml", "the same command goes on from what was finished"),
        ("index build ix --images photos", "the same command goes on from what was finished"),
        ("encode --images=photos --out codes", "the same command goes on from what was finished"),
        ("audit https://search.example/api", "the same command goes on from what was finished"),
        ("index search ix a.jpg", "the same command starts over"),
        ("encode copy-hash photos", "the same command starts over"),
        ("audit phash", "the same command starts over"),
        ("serve ix", "stopped before it listened; nothing was served"),
    ],
)
def test_ctrl_c_speaks_of_the_verb_that_it_ends(words, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["robusthash", *words.split()])
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    caught = capsys.readouterr()
    assert stopped.value.code == 130
    assert said in caught.err
    assert caught.err.count("\n") == 1
    assert caught.out == ""


def test_every_verb_that_goes_on_is_a_verb():
    verbs = {verb for panel in cli.PANELS.values() for verb in panel}
    assert {name.split()[0] for name in (*cli.GOES_ON, *cli.GOES_ON_WITH)} <= verbs
