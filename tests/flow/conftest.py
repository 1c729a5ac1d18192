"""The command line as a fixture."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from robusthash.apps import cli
from robusthash.apps.commands import terminal

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process, on a wide terminal: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robusthash", *map(str, arguments)])
        for screen in (terminal.console, terminal.answers):
            monkeypatch.setattr(screen, "width", 200)
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return run
