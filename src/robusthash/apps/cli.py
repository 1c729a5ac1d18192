"""Verbs by panel. Tables and progress go to stderr, ``--json`` data to stdout; an error is one line, no trace."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from robusthash.apps.verbs import (
    audit,
    blackbox,
    catalogue,
    checks,
    database,
    evidence,
    experiment,
    index,
    numbers,
    study,
    suite,
)
from robusthash.apps.verbs.terminal import console, escape
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
        app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        console.print(f"[bold red]error:[/] {escape(str(text))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, previous)


def _stopped(signum: int, frame: FrameType | None) -> None:
    console.print("stopped; what was finished is kept: run, train, evaluate, assess, sweep and demo go on from there")
    sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
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
        "report": experiment.report,
    },
    "Numbers that hold": {
        "assess": suite.assess,
        "check": checks.check,
        "audit": audit.audit,
        "transfer": blackbox.transfer,
        "poison": database.poison,
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
    "Search and catalogue": {"index": index.app, "list": catalogue.everything, "data": catalogue.app},
}

for panel, verbs in PANELS.items():
    for name, verb in verbs.items():
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(verb)

if __name__ == "__main__":
    main()
