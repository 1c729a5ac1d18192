"""Verbs by panel. Tables and progress go to stderr, ``--json`` data to stdout; an error is one line, no
trace.

What a verb needs is imported when it is called: help, version and completion load typer and rich, and no
more.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from robusthash.apps.commands import (
    assess_command,
    audit_command,
    blackbox,
    catalogue,
    checks,
    evidence,
    experiment,
    index_command,
    numbers,
    poison,
    study,
)
from robusthash.apps.commands.terminal import console, escape
from robusthash.core.out_of_memory import REMEDY, DoesNotFit, SmallerBatch, out_of_memory
from robusthash.version import __version__

app = typer.Typer(
    help="Train, attack, defend, measure and serve search by learned binary codes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point: an error that a user can mend is one line and exit code 1, a usage error 2, Ctrl-C 130."""
    previous = signal.signal(signal.SIGINT, _stopped)
    try:
        with _memory_noted():
            app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        _refused(error.args[0] if isinstance(error, KeyError) and error.args else error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _refused(error if isinstance(error, DoesNotFit) else _memory_short(error))
    finally:
        signal.signal(signal.SIGINT, previous)


def _refused(text: object) -> None:
    console.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False, soft_wrap=True)
    sys.exit(1)


def _memory_short(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    smaller = "take smaller batches (training.batch_size, evaluation.batch_size)"
    return f"memory does not suffice ({said}); {smaller}, {REMEDY}"


@contextmanager
def _memory_noted() -> Iterator[None]:
    """What was done in smaller batches than asked is a line on stderr; other warnings look as ever."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, SmallerBatch):
                console.print(escape(str(message)), highlight=False, soft_wrap=True)
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = shown
        warnings.simplefilter("always", SmallerBatch)
        yield


def _stopped(signum: int, frame: FrameType | None) -> None:
    kept = "run, train, evaluate, assess, questions, sweep and demo go on from there"
    console.print(f"stopped; what was finished is kept: {kept}", soft_wrap=True)
    sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"robusthash {__version__}\n")
        raise typer.Exit


PANELS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Experiments": {
        "demo": experiment.demo,
        "run": experiment.run_command,
        "train": experiment.train,
        "encode": experiment.encode,
        "evaluate": experiment.evaluate,
        "attack": experiment.attack_command,
        "score": numbers.score,
        "compare": numbers.compare,
        "table": numbers.table,
        "keep": numbers.keep,
        "report": experiment.report,
    },
    "Numbers that hold": {
        "assess": assess_command.assess,
        "check": checks.check,
        "audit": audit_command.audit,
        "transfer": blackbox.transfer,
        "questions": blackbox.questions,
        "poison": poison.poison,
        "verify": evidence.verify,
        "leaderboard": evidence.leaderboard,
        "evidence": evidence.app,
    },
    "Studies": {
        "sweep": study.sweep,
        "curves": study.curves,
        "figures": study.figures,
        "attribute": study.attribute,
        "cost": study.cost,
    },
    "Search and catalogue": {"index": index_command.app, "list": catalogue.everything, "data": catalogue.app},
}

for panel, verbs in PANELS.items():
    for name, verb in verbs.items():
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(verb)

if __name__ == "__main__":
    main()
