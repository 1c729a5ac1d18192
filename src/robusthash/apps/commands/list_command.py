from typing import Annotated

from typer import Argument

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import print_json, print_table


def list(
    kind: Annotated[str | None, Argument(help="Only this kind: attack, objective, data, threat, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Everything that can be named in a recipe, with its paper, its evidence label and its state.

    The packaged model ``copy-hash`` too, which commands take in place of a run.

    Evidence: paper+code, paper, reconstruction, own or library.
    State: measured (on real data, in the documents) or tested.
    """
    from robusthash.apps.experiment.search_model import load
    from robusthash.core.registry import Card, catalogue, nearest

    packaged = "Hash for copies with its weights: robusthash hash, duplicates, index build --run copy-hash."
    model = Card(
        "model", "copy-hash", load, modality="image", supervised=False, summary=packaged, state="measured"
    )
    cards = [*catalogue(), model]
    kinds = {card.kind for card in cards}
    if kind is not None and kind not in kinds and kind.removesuffix("s") in kinds:
        kind = kind.removesuffix("s")
    if kind is not None and kind not in kinds:
        raise ValueError(f"no kind is called {kind!r}{nearest(kind, kinds)}")
    cards = [card for card in cards if kind in (None, card.kind)]
    if as_json:
        fields = ("kind", "name", "paper", "evidence", "state", "modality", "supervised", "targeted")
        print_json([{field: getattr(card, field) for field in (*fields, "summary")} for card in cards])
        return
    rows = [
        [f"{card.kind} {card.name}", card.evidence, card.state, card.paper, card.summary] for card in cards
    ]
    print_table("", ["name", "evidence", "state", "paper", "what it is"], rows, right=False)
