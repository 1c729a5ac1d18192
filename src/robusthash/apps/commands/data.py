from typing import Annotated

from typer import Argument, Typer

from robusthash.apps.commands.options import AsJson
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table

app = Typer(help="Look at data sets before training on them.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """A group of one verb stays a group."""


@app.command("check")
def check(
    name: Annotated[str, Argument(help="Data set as YAML or by name: photos, '{name: folder, root: DIR}'.")],
    as_json: AsJson = False,
) -> None:
    """Read a data set, check its splits, and print sizes and fingerprints."""
    from robusthash.apps.experiment.config import value_of
    from robusthash.core.registry import build
    from robusthash.data import RetrievalData

    data: RetrievalData = build("data", value_of(name))
    facts = data.describe()
    if as_json:
        print_json({**facts, "skipped": list(data.skipped)})
        return
    unlabelled = facts["unlabelled"]
    rows = [[split, len(part), unlabelled[split], part.fingerprint()] for split, part in data.splits.items()]
    title = f"{data.name}: {len(data.label_names)} labels, modalities {', '.join(data.modalities)}"
    print_table(title, ["split", "items", "without a label", "fingerprint"], rows)
    print_lines([f"training items in the database: {data.train_in_database}"])
    for system, relevant in {
        "": data,
        **{f" by {name}": data.by(name) for name in data.label_systems},
    }.items():
        if count := relevant.without_relevant():
            note(f"{count} of {len(data.query)} queries have no relevant item in the database{system}")
    if data.note:
        note(data.note)
