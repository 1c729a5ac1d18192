"""The command line ``robusthash``: its verbs by panel, and its errors.

Tables and progress go to stderr, ``--json`` data to stdout; an error is one line, no trace. A verb imports
what it needs when it is called: help, version and completion load typer and rich, and no more.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer

from robusthash.apps.commands.terminal import console, escape, note
from robusthash.core.out_of_memory import REMEDY, DoesNotFit, SmallerBatch, out_of_memory
from robusthash.version import __version__

PANELS = {
    "Try": ("demo", "quickstart", "list", "data"),
    "Train": ("run", "train"),
    "Measure": (
        *("evaluate", "assess", "attack", "questions", "transfer", "poison"),
        *("score", "compare", "table", "report"),
    ),
    "Audit": ("audit", "check", "evidence", "verify", "keep", "leaderboard"),
    "Search": ("encode", "index", "search"),
    "Study": ("sweep", "curves", "attribute", "cost", "figures"),
}
"""Verbs by what a user wants to do: a function, or a group as ``app``, in the file of the verb's name."""

FILES = {verb: f"{verb}_command" for verb in ("assess", "evaluate", "figures", "leaderboard", "list")}
"""Verbs whose name another file of the package has already."""

app = typer.Typer(
    help="Train, attack, defend, measure and serve search by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for panel, verbs in PANELS.items():
    for verb in verbs:
        module = import_module(f"robusthash.apps.commands.{FILES.get(verb, verb)}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb, rich_help_panel=panel)
        else:
            app.command(verb, rich_help_panel=panel)(getattr(module, verb))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"robusthash {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Entry point. An error that a user can act on is one line and exit code 1; usage 2, Ctrl-C 130."""
    previous = signal.signal(signal.SIGINT, _stop)
    try:
        with _smaller_batches_noted():
            app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        _refuse(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _refuse(error if isinstance(error, DoesNotFit) else _memory_error(error))
    finally:
        signal.signal(signal.SIGINT, previous)


def _refuse(text: object) -> None:
    console.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False, soft_wrap=True)
    sys.exit(1)


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
    going_on = "run, train, evaluate, assess, questions, sweep, demo, quickstart, index build and index add"
    note(f"stopped; {going_on} go on from what was finished")
    sys.exit(130)


if __name__ == "__main__":
    main()
