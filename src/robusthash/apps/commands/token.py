"""The verbs ``token``: bearer tokens of the search service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table

app = Typer(help="Make, list and remove tokens of the search service.", no_args_is_help=True)
_File = Annotated[Path, Option("--tokens", help="Token file.")]
_TOKENS = Path("tokens.json")


@app.command()
def new(
    name: Annotated[str, Argument(help="Name of the client.")],
    scopes: Annotated[
        str, Option(help="By commas: read, write, audit (past the guards of queries).")
    ] = "read",
    tokens: _File = _TOKENS,
) -> None:
    """Make a token and print it, once: the file holds its digest alone."""
    from robusthash.apps.service.tokens import TokenFile

    text = TokenFile(tokens).add(name, [scope.strip() for scope in scopes.split(",") if scope.strip()])
    note(f"The token of {name}, which nobody can print again:")
    print_lines([text])


@app.command(name="list")
def show(tokens: _File = _TOKENS, as_json: AsJson = False) -> None:
    """List names and scopes."""
    from robusthash.apps.service.tokens import TokenFile

    held = TokenFile(tokens).tokens()
    if as_json:
        print_json([{"name": token.name, "scopes": token.scopes} for token in held])
        return
    print_table(str(tokens), ["name", "scopes"], [[token.name, ", ".join(token.scopes)] for token in held])


@app.command()
def remove(name: Annotated[str, Argument(help="Name of the client.")], tokens: _File = _TOKENS) -> None:
    """Remove a token; a running service accepts it until POST /v1/reload, SIGHUP, or its next start."""
    from robusthash.apps.service.tokens import TokenFile

    TokenFile(tokens).remove(name)
    until = "POST /v1/reload with a write token, SIGHUP (kill -HUP), or its next start"
    note(f"{name} is removed from {tokens}; a running service accepts it until {until}")
