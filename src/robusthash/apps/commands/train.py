"""The verbs ``train`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from robusthash.apps.commands.options import AsJson, Device, Recipe, ResumeFrom, RunsFolder, Sets
from robusthash.apps.commands.terminal import note, print_json, print_lines, print_table, progress_bars

if TYPE_CHECKING:
    from robusthash.apps.experiment.config import Config
    from robusthash.apps.experiment.dry_run import DryRun


def train(
    recipe: Recipe,
    sets: Sets = None,
    runs: RunsFolder = Path("runs"),
    resume_from: ResumeFrom = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train the model of a recipe, or go on from its last checkpoint."""
    from robusthash.apps.experiment import training_stages
    from robusthash.apps.experiment.config import load_config
    from robusthash.core.processes import follows

    config = load_config(recipe, sets or ())
    note_continuation(config, resume_from)
    with progress_bars() as progress:
        run = training_stages.train(config, runs, progress, recipe.parent, resume_from)
    if follows():
        return
    card = run.card()
    if as_json:
        print_json({"run": str(run.path), **card})
        return
    last = [(name, value) for name, value in card["last"].items() if isinstance(value, float)]
    title = f"{card['name']}: {card['bits']} bits, {card['epochs']} epochs"
    print_table(title, ["last epoch", "value"], last)
    print_lines([run.path])


def note_continuation(config: Config, resume_from: Path | None) -> None:
    """Say so where a model that goes on from a shorter run is not that of a training from the start."""
    from robusthash.apps.experiment.training_stages import depends_on_total

    if resume_from is not None and (reasons := depends_on_total(config)):
        depends = f"{' and '.join(reasons)} depends on the number of epochs in all"
        note(
            f"{depends}: going on from {resume_from} is another model than training from the start, "
            "with an id of its own"
        )


def run(
    recipe: Recipe,
    sets: Sets = None,
    runs: RunsFolder = Path("runs"),
    resume_from: ResumeFrom = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Take one step of each part, write nothing, estimate the whole.")
    ] = False,
    miniature: Annotated[
        bool, Option("--miniature", help="Of a dry run: on a few generated items in the data's layout.")
    ] = False,
    batch: Annotated[int | None, Option(min=2, help="Of a dry run: items of a step, to be quicker.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and report one recipe; goes on where it was stopped, and skips what is done."""
    from robusthash.apps.commands.evaluate_command import print_evaluation
    from robusthash.apps.commands.train import note_continuation
    from robusthash.apps.experiment.config import load_config
    from robusthash.apps.experiment.training_stages import run_all
    from robusthash.core.processes import follows

    config = load_config(recipe, sets or ())
    if dry_run and resume_from is not None:
        raise ValueError("a dry run goes on from nothing: leave --resume-from or --dry-run out")
    if dry_run:
        from robusthash.apps.experiment import dry_run as trying

        with progress_bars() as progress:
            estimate = trying.dry_run(
                config, recipe.parent, miniature=miniature, batch=batch, progress=progress
            )
        _print_dry_run(estimate, as_json)
        return
    if miniature or batch is not None:
        raise ValueError("--miniature and --batch belong to a dry run: add --dry-run")
    note_continuation(config, resume_from)
    with progress_bars() as progress:
        finished = run_all(config, runs, progress, recipe.parent, resume_from)
    if not follows():
        print_evaluation(finished.path, as_json)


def _print_dry_run(estimate: DryRun, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({**asdict(estimate), "seconds": estimate.seconds})
        return
    sizes = ", ".join(f"{name} {size:,}" for name, size in estimate.sizes.items())
    rows = [["device", estimate.device], ["items", sizes]]
    for modality, count in estimate.parameters.items():
        rows.append([f"parameters, {modality}", f"{count / 1e6:.3f} million"])
        rows.append([f"multiply-adds of one {modality}", f"{estimate.macs[modality] / 1e6:,.1f} million"])
    rows.append(["weights and memory of training", _bytes(estimate.weight_bytes)])
    rows.append(["memory, peak", _bytes(estimate.peak_bytes)])
    rows.append([f"step of {estimate.batch}", _duration(estimate.step_seconds)])
    print_table(f"dry run of {estimate.name}", ["", "value"], rows)
    parts = [[p.name, p.timed, _duration(p.seconds), _duration(p.whole)] for p in estimate.parts]
    whole = ["all", "", "", _duration(estimate.seconds)]
    print_table("estimate", ["part", "timed", "took", "whole"], [*parts, whole])
    for text in estimate.notes:
        note(text)


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3f} s"
