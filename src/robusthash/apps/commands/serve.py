"""The verb ``serve``, search over HTTP, and the verbs ``token``, its bearer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from robusthash.apps.commands.options import AsJson, Device, IndexRun, with_option_groups
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars


@dataclass(frozen=True)
class Address:
    """Options of the address that the service listens on."""

    host: Annotated[str, Option(help="Address to listen on; another than loopback needs --tokens.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(min=0, max=65535)] = 8765


@dataclass(frozen=True)
class AnswerLimits:
    """Options of the details of answers, and of the queries that get one."""

    answer: Annotated[
        str | None, Option(help="What answers show: ids, coarse, distances (default) or codes.")
    ] = None
    detection: Annotated[
        bool | None,
        Option("--detection/--no-detection", help="Refuse many queries of nearly one image (default)."),
    ] = None
    agreement: Annotated[
        int | None,
        Option(min=0, help="Refuse image queries whose code moves by more bits under JPEG or a small cut."),
    ] = None


@dataclass(frozen=True)
class PageOptions:
    """Options of the page of the service."""

    compare: Annotated[
        list[Path] | None, Option(help="Index by another model of the same images, for the page to compare.")
    ] = None
    attacks: Annotated[bool, Option("--attacks", help="Let the page attack a query here.")] = False
    demo: Annotated[
        bool, Option("--demo", help="Serve the two models of `robusthash demo`, made where they are missing.")
    ] = False


@with_option_groups
def serve(
    index: Annotated[
        str | None, Argument(help="Directory or address of the index; with --demo, folder of the demo.")
    ] = None,
    run: IndexRun = None,
    images: Annotated[
        Path | None, Option(help="Folder of the indexed images; those below it may be shown.")
    ] = None,
    address: Address = Address(),
    tokens: Annotated[Path | None, Option(help="Token file; see `robusthash token`.")] = None,
    answers: AnswerLimits = AnswerLimits(),
    settings: Annotated[Path | None, Option(help="YAML file of limits; see docs/serving.md.")] = None,
    page: PageOptions = PageOptions(),
    device: Device = None,
) -> None:
    """Serve search over HTTP, with a page at /: POST an image to /v1/search, get the nearest items.

    Only this machine reaches it unless --host says otherwise. Ctrl-C ends it when the requests under way are
    answered; SIGHUP opens the index again after it was replaced.
    """
    from robusthash.apps.service.serving import Serving, read_settings, serve_forever

    overrides: dict[str, Any] = {"host": address.host, "port": address.port}
    overrides |= {name: value for name, value in vars(answers).items() if value is not None}
    overrides |= {"attacks": True} if page.attacks or page.demo else {}
    compared = page.compare or []
    if page.demo:
        from robusthash.apps.service.demo_search import demo_parts

        is_trained = (Path(index or "demo") / "summary.json").is_file()
        trained = "the demo is there" if is_trained else "the demo is trained and attacked, some minutes"
        note(f"three phases: (1) {trained}; (2) its photographs are written and indexed by both models,")
        note(f"below a minute; (3) they are served at http://{address.host}:{address.port}/")
        with progress_bars() as progress:
            parts = demo_parts(Path(index or "demo"), progress)
        index, images, compared = str(parts.hardened), parts.images, [parts.undefended]
    if index is None:
        raise ValueError("serve takes the directory of an index, made by 'robusthash index build', or --demo")
    limits = read_settings(settings, overrides)
    note(f"loading the model and the index {index}")
    serve_forever(Serving.of(index, run, images, tokens, limits, compared, device), note)


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
