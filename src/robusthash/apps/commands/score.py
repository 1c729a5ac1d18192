from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import note, plain, print_json, print_values


def score(
    query: Annotated[Path, Argument(help="Query codes (.npz).")],
    database: Annotated[Path, Argument(help="Database codes (.npz).")],
    protocol: Annotated[
        str, Option(help="A protocol by name or as YAML: '{name: house, empty: skip}'.")
    ] = "house",
    as_json: AsJson = False,
) -> None:
    """Score codes made by any program: every measure of the protocol, exact under ties.

    Each file holds `codes` (N, K) in -1/+1 or 0/1, or packed uint8 with `bits`; and `labels`, (N,) classes or
    (N, C) multi-hot.
    """
    from robusthash.apps.experiment.config import value_of
    from robusthash.metrics.code_scoring import read_codes
    from robusthash.metrics.code_scoring import score as score_codes
    from robusthash.metrics.protocol import load_protocol
    from robusthash.metrics.result_words import empty_note

    result = score_codes(read_codes(query), read_codes(database), load_protocol(value_of(protocol)))
    if as_json:
        print_json(plain(result))
        return
    print_values(f"{protocol}: {result.setting.queries} against {result.setting.database}", result)
    for text in filter(None, (empty_note(result), *result.notes)):
        note(text)
