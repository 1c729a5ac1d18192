"""The command line ``robusthash``: its verbs by panel, and its errors.

Tables and progress go to stderr, ``--json`` data to stdout; an error is one line, no trace. A verb imports
what it needs when it is called: help, version and completion load typer and rich, and no more.

Exit codes: 0 done, 1 refused or failed for a reason that the line says, 2 usage, 3 a fault of this program,
130 Ctrl-C. ``TRACE`` in the environment shows where an error came from.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from robusthash.apps.commands.terminal import note, warn
from robusthash.core.out_of_memory import REMEDY, DoesNotFit, SmallerBatch, out_of_memory
from robusthash.version import __version__

PANELS = {
    "Try": ("demo", "quickstart", "list", "data"),
    "Train": ("run", "train"),
    "Measure": (
        *("evaluate", "assess", "attack", "questions", "hardening", "detect", "transfer", "poison"),
        *("score", "compare", "table", "report"),
    ),
    "Audit": ("audit", "check", "certify", "evidence", "verify", "keep", "leaderboard"),
    "Search": ("hash", "duplicates", "encode", "index", "search", "serve", "token", "export"),
    "Study": ("reproduce", "sweep", "curves", "attribute", "cost", "figures"),
}
"""Verbs by what a user wants to do."""

_SHARED = {
    "analyses": ("attribute", "cost", "curves", "transfer"),
    "evaluate_command": ("evaluate", "attack"),
    "evidence": ("verify",),
    "hash": ("duplicates",),
    "index": ("search",),
    "questions": ("hardening",),
    "quickstart": ("demo",),
    "serve": ("token",),
    "stored_results": ("keep", "report", "figures", "leaderboard"),
    "table": ("compare", "score"),
    "train": ("run",),
    **{f"{verb}_command": (verb,) for verb in ("assess", "list")},
}
FILES = {verb: file for file, verbs in _SHARED.items() for verb in verbs}
"""Files of ``commands`` by verb, where a file of several verbs, or another name, holds it."""

app = typer.Typer(
    help="Train, attack, defend, measure and serve search by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for panel, verbs in PANELS.items():
    for verb in verbs:
        module = import_module(f"robusthash.apps.commands.{FILES.get(verb, verb)}")
        if hasattr(module, verb):
            app.command(verb, rich_help_panel=panel)(getattr(module, verb))
        else:
            app.add_typer(module.app, name=verb, rich_help_panel=panel)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"robusthash {__version__}\n")
        raise typer.Exit


TRACE = "ROBUSTHASH_TRACE"
"""Environment variable: if set, the trace of an error is printed above its line."""

_LONGEST = 4000  # characters of an error, which may hold a value of any length
_REPORTED = (ValueError, KeyError, OSError, ImportError, FloatingPointError)
"""Errors whose text is written for users; others, which nothing expected, are faults of this program."""


def main() -> None:
    """Entry point. Every error is one line; see the exit codes above."""
    # of several processes one that ends makes torch print its stack in the others, next to our line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):  # names that are no UTF-8
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    previous, log, notes = signal.signal(signal.SIGINT, _stop), logging.getLogger("robusthash"), _Notes()
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        with _smaller_batches_noted():
            app()
    except Exception as error:
        _refuse(error)
    finally:
        signal.signal(signal.SIGINT, previous)
        log.removeHandler(notes)
        log.setLevel(level)


class _Notes(logging.Handler):
    """Lines of the package's log, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _refuse(error: Exception) -> None:
    if os.environ.get(TRACE):
        traceback.print_exc()
    expected = isinstance(error, _REPORTED)
    if isinstance(error, DoesNotFit):
        expected, text = True, str(error)
    elif isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
        expected, text = True, _memory_error(error)
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror  # a text of ours, which "[Errno 2]" explains to nobody
    elif isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        text = str(error.args[0])
    else:
        text = str(error).strip()
        if not expected or not text or isinstance(error, KeyError):
            expected, text = False, _unforeseen(error)
    if not _reported_elsewhere(error):
        warn("error", text if len(text) < _LONGEST else f"{text[:_LONGEST]} ...")
    sys.exit(1 if expected else 3)


def _reported_elsewhere(error: Exception) -> bool:
    """True in a process of ``torchrun`` whose first one prints the same error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    from robusthash.core.processes import another_says

    return another_says(error)


def _unforeseen(error: Exception) -> str:
    """An error that nobody wrote for users, in a line: what, where, and how to see more."""
    reason = next(iter(str(error).strip().splitlines()), "")[:300]
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    what = f"{type(error).__name__}{f': {reason}' if reason else ''}"
    return f"unexpected {what} ({where}); {TRACE}=1 shows the trace, which a report of this fault should hold"


def _memory_error(error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    smaller = "take smaller batches (training.batch_size, evaluation.batch_size)"
    return f"memory is not enough ({reason}); {smaller}, {REMEDY}"


@contextmanager
def _smaller_batches_noted() -> Iterator[None]:
    """A ``SmallerBatch`` warning is a line on stderr; other warnings look as ever."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, SmallerBatch):
                note(message)
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", SmallerBatch)
        yield


def _stop(signum: int, frame: FrameType | None) -> None:
    note(_stopped())
    sys.exit(130)


GOES_ON = (
    *("run", "train", "evaluate", "assess", "certify", "questions", "hardening", "sweep", "reproduce"),
    *("demo", "quickstart"),
)
"""Verbs that go on from what was finished; others start over."""

GOES_ON_WITH = ("encode --images", "index build", "index add", "audit http")
"""Verbs that do so where a word of theirs begins like this."""


def _stopped() -> str:
    """The last words of the command that Ctrl-C ended."""
    verb, *words = [*sys.argv[1:], ""]
    if verb == "serve":
        return "stopped before it listened; nothing was served"
    if verb in GOES_ON or any(f"{verb} {word}".startswith(GOES_ON_WITH) for word in words):
        return "stopped; the same command goes on from what was finished"
    return "stopped; the same command starts over"


if __name__ == "__main__":
    main()
