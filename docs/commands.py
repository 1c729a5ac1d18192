"""Output of public commands for the pages of this folder: a comment of a page holds
``show("robusthash ...")``.

cog runs it (``make tables``) from the top of the repository and puts command and output below the comment.
"""

from __future__ import annotations

import contextlib
import glob
import io
import shlex

from robusthash.apps.cli import app


def show(command: str) -> None:
    """The command, as a reader may type it, and its output as Markdown."""
    import cog  # made again by every run of cog

    command = command.strip()
    cog.outl(f"\n```\n{command}\n```\n\n{output(command)}\n")


def output(command: str) -> str:
    """What the command prints; names with wildcards are expanded in the order of their characters.

    Raises:
        ValueError: not a command of this project; and whatever the command itself refuses.
    """
    program, *words = shlex.split(command.replace("\\\n", " "))
    if program != "robusthash":
        raise ValueError(f"a page shows commands of robusthash, not of {program!r}")
    words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(words, standalone_mode=False)
    return printed.getvalue().strip()
