import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from robusthash.apps.commands.options import AsJson, Device, RunsFolder, Sets, with_option_groups
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.reproduction.entry_runs import EntryPlan
    from robusthash.apps.reproduction.reproduction import EntryTrial, Folders, Reproduction


@dataclass(frozen=True)
class Scope:
    """Options of the runs that an entry is made of."""

    scale: Annotated[
        Literal["small", "paper"], Option(help="small: no GPU needed. paper: their data and nets.")
    ] = "small"
    data_root: Annotated[Path | None, Option(help="Folder of the data sets.")] = None
    seeds: Annotated[int | None, Option(min=1, max=1000, help="Number of training seeds, from 0.")] = None
    stored: Annotated[bool, Option("--stored", help="Train nothing: show what results there are.")] = False


@dataclass(frozen=True)
class TrialOptions:
    """Options of a dry run."""

    dry_run: Annotated[
        bool, Option("--dry-run", help="Take one step of each part of each row, write nothing.")
    ] = False
    miniature: Annotated[bool, Option("--miniature", help="Of a dry run: generated items as data.")] = False
    batch: Annotated[int | None, Option(min=2, help="Of a dry run: items of a step.")] = None


@dataclass(frozen=True)
class FileOptions:
    """Options of the files that are read and written."""

    markdown: Annotated[Path | None, Option(help="Write the table as Markdown.")] = None
    latex: Annotated[Path | None, Option(help="Write the table as LaTeX.")] = None
    csv: Annotated[Path | None, Option(help="Write every cell as CSV.")] = None
    out: Annotated[Path | None, Option(help="Folder of the figures (needs the extra `figures`).")] = None
    recipes: Annotated[Path | None, Option(help="Folder of recipes; stored results lie next to it.")] = None
    runs: RunsFolder = Path("runs")


@with_option_groups
def reproduce(
    paper: Annotated[str | None, Argument(help="saat, saah, sfcl, drfgd or dsarh.")] = None,
    entry: Annotated[str | None, Argument(help="Table or figure: table-2.")] = None,
    listed: Annotated[bool, Option("--list", help="Every table and figure, with state and time.")] = False,
    claims: Annotated[bool, Option("--claims", help="The verdict on each claim of the papers.")] = False,
    scope: Scope = Scope(),
    trial: TrialOptions = TrialOptions(),
    files: FileOptions = FileOptions(),
    sets: Sets = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """A table or figure of a paper: runs what is missing, prints ours with the paper's values in brackets.

    Goes on where it was stopped. `reproduce --list` shows all entries, `reproduce PAPER` those of one paper.
    """
    from robusthash.apps.reproduction import reproduction

    folders = reproduction.Folders.of(files.recipes, files.runs, files.out)
    if claims:
        _show_claims(folders, paper, entry, as_json)
        return
    if listed or paper is None or entry is None:
        _show_list(reproduction.list_entries(folders, paper), as_json)
        return
    root = scope.data_root
    placed = [] if root is None else [f"data.root={json.dumps(str(root), ensure_ascii=False)}"]
    if any(each.partition("=")[0].strip() == "runtime.seed" for each in sets or ()):
        raise ValueError("runtime.seed is set by each row; --seeds N takes the training seeds 0 to N - 1")
    sets = [*placed, *(sets or ()), *([] if device is None else [f"runtime.device={device}"])]
    options: dict[str, Any] = {"scale": scope.scale, "seeds": scope.seeds, "sets": sets}
    places: dict[str, Any] = {"recipes": files.recipes, "runs": files.runs, "out": files.out}
    if scope.stored and trial.dry_run:
        raise ValueError("--stored shows what there is, and --dry-run tries what is to run; leave one out")
    if scope.stored and files.runs != Path("runs") and not files.runs.is_dir():
        raise ValueError(f"--runs {files.runs} is no folder, and nothing is stored there; name another")
    if trial.dry_run:
        plan, _ = reproduction.plan_of(paper, entry, folders, **options)
        with progress_bars() as progress:
            tried = reproduction.try_entry(
                plan, miniature=trial.miniature, batch=trial.batch, progress=progress
            )
        _show_trial(plan, tried, as_json)
        if trial.miniature:
            from robusthash.apps.experiment.dry_run import MINIATURE_TIMES

            note(MINIATURE_TIMES)
        return
    if trial.miniature or trial.batch is not None:
        raise ValueError("--miniature and --batch belong to a dry run: add --dry-run")
    _check_files(files)
    with progress_bars() as progress:
        result = reproduction.reproduce(
            paper, entry, **places, **options, stored_only=scope.stored, progress=progress
        )
    _export({files.markdown: result.markdown, files.latex: result.latex, files.csv: result.csv})
    _show(result, as_json)
    if files.out is not None and not result.drawn:
        reason = "no run of this entry is stored yet"
        if result.state != "not run":
            reason = "the stored results hold its numbers, and not what a figure would show"
        note(f"nothing is drawn in {files.out}: {reason}")


def _check_files(files: FileOptions) -> None:
    """Refuse files and folders that cannot be written, before the work."""
    exported = [path for path in (files.markdown, files.latex, files.csv) if path is not None]
    for path in exported:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and a file is needed; name one, such as {path / 'table'}")
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: {path.parent} is no folder; make it first")
        if exported.count(path) > 1:
            raise ValueError(f"{path} is named for two exports, of which one would stay; name one for each")
    for folder in filter(None, (files.out, files.runs)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, and a folder is needed; name another")
    if files.out is not None:
        from robusthash.apps.reports.charts import require_matplotlib

        require_matplotlib()


def _export(texts: dict[Path | None, Any]) -> None:
    from robusthash.core.atomic_files import write_text

    for path, text in texts.items():
        if path is not None:
            write_text(path, f"{text().strip()}\n")


def _show(result: "Reproduction", as_json: bool) -> None:
    for text in result.notes:
        note(f"passed over: {text}")
    if as_json:
        print_json(result.plain())
    else:
        title = f"{result.paper.name}, {result.entry.id}: {result.entry.title}"
        print_lines([f"{title} ({result.scale} scale, {result.state})", "", result.markdown(), *result.drawn])
    for command, error in result.failed.items():
        note(f"failed: {command}: {error}")
    if result.failed:
        raise ValueError(f"{len(result.failed)} runs failed; the same command runs them again")


def _show_list(listed: "list[Any]", as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json([asdict(each) for each in listed])
        return
    rows = []
    for each in listed:
        minutes = "" if each.seed_minutes is None else _duration(each.seed_minutes, each.measured)
        rows.append([f"{each.paper.lower()} {each.entry}", each.scale, each.state, minutes, each.title])
    columns = ["entry", "scale", "state", "one seed, one core", "what it is"]
    print_table("", columns, rows, right=False)
    note("times: training and attacks of the quickest stored seed of each row; about: estimated")
    note("small scale: a seed of an entry takes at most 40 minutes on one idle core")


def _duration(minutes: float, measured: bool) -> str:
    text = f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.0f} h"
    return text if measured else f"about {text}"


def _show_trial(plan: "EntryPlan", trial: "EntryTrial", as_json: bool) -> None:
    from dataclasses import asdict

    state = {f"{run.block}: {run.row}, seed {run.seed}": run for run in plan.runs}
    if as_json:
        runs = [
            {
                "row": name,
                "command": run.command,
                "stored": None if run.stored is None else str(run.stored.path),
            }
            for name, run in state.items()
        ]
        print_json(
            {"state": plan.state, "runs": runs, "tried": {n: asdict(t) for n, t in trial.runs.items()}}
        )
        return
    rows = [
        [name, "" if run.stored is None else str(run.stored.path), run.command] for name, run in state.items()
    ]
    print_table(f"{plan.entry.id}: {plan.state}", ["run", "stored", "command"], rows, right=False)
    times = [[name, f"{dry_run.seconds / 60:.1f}"] for name, dry_run in trial.runs.items()]
    print_table("minutes of a seed here", ["row", "with what it starts from"], times)
    each, rest = (f"{seconds / 60:.1f} min" for seconds in (trial.seed_seconds, trial.seconds))
    note(f"a seed of all rows: {each}; what is not stored: {rest}")


def _show_claims(folders: "Folders", paper: str | None, entry: str | None, as_json: bool) -> None:
    from robusthash.apps.reproduction import claims_ledger

    claims, stored = claims_ledger.claims_of(paper, entry), folders.stored()
    ledger = [claims_ledger.judge(claim, folders.recipes, stored) for claim in claims]
    for text in stored.unreadable:
        note(f"passed over: {text}")
    if as_json:
        print_json([judged.plain() for judged in ledger])
    else:
        print_lines([claims_ledger.ledger_markdown(ledger)])
