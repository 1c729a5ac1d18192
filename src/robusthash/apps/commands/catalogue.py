"""The verbs ``list`` and ``data``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from robusthash.apps.commands.terminal import AsJson, console, escape, print_json, print_table

app = typer.Typer(help="Look at data sets before training on them.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """A group of one verb stays a group."""


def everything(
    kind: Annotated[
        str | None, typer.Argument(help="Only this kind, e.g. attack, objective, outer, data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Everything that can be named in a recipe, with its paper, its evidence label and its state.

    Evidence: paper+code, paper, reconstruction, own or library.
    State: measured (on real data, in the documents) or tested.
    """
    from robusthash.core.registry import catalogue, nearest

    cards = catalogue()
    kinds = {card.kind for card in cards}
    if kind is not None and kind not in kinds:
        raise ValueError(f"no kind is called {kind!r}{nearest(kind, kinds)}")
    chosen = [card for card in cards if kind in (None, card.kind)]
    if as_json:
        fields = (
            "kind",
            "name",
            "paper",
            "evidence",
            "state",
            "modality",
            "supervised",
            "targeted",
            "summary",
        )
        print_json([{field: getattr(card, field) for field in fields} for card in chosen])
        return
    rows = [
        [f"{card.kind} {card.name}", card.evidence, card.state, card.paper, card.summary] for card in chosen
    ]
    table = Table()
    for column in ("name", "evidence", "state", "paper", "what it is"):
        table.add_column(column, justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


@app.command("check")
def data_check(
    name: Annotated[
        str, typer.Argument(help="Data set as YAML or by name: photos, '{name: folder, root: DIR}'.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read a data set, check its splits, and print sizes and fingerprints."""
    from robusthash.apps.experiment.config import value_of
    from robusthash.core.registry import build
    from robusthash.data import RetrievalData

    data: RetrievalData = build("data", value_of(name))
    described = data.describe()
    if as_json:
        print_json(described)
        return
    unlabelled = described["unlabelled"]
    rows = [[split, len(part), unlabelled[split], part.fingerprint()] for split, part in data.splits.items()]
    print_table(
        f"{data.name}: {len(data.label_names)} labels, modalities {', '.join(data.modalities)}",
        ["split", "items", "without a label", "fingerprint"],
        rows,
    )
    console.print(f"training items in the database: {data.train_in_database}")
    if data.note:
        console.print(data.note)
