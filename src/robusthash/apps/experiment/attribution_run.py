"""Which frequencies trained runs search by."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from robusthash.analysis.band_attribution import BandAttribution, Worth, attribute_bands
from robusthash.apps.experiment.run_directory import Run, RunError, load_run
from robusthash.apps.experiment.stages import Progress, load_victim, read_data, silent
from robusthash.core.atomic_files import write_aside
from robusthash.core.registry import build
from robusthash.evaluation.context import make_context

ATTRIBUTION = "attribution.npz"


def labelled(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs by what figures and tables call them: their recipe, with the run's id where a recipe comes twice.

    Raises:
        ValueError: no run, or one run twice.
    """
    runs = [load_run(path) for path in paths]
    if not runs:
        raise ValueError("name at least one run directory")
    names = [run.config.name for run in runs]
    labels = [
        run.config.name
        if names.count(run.config.name) == 1
        else f"{run.config.name}/{run.path.resolve().name}"
        for run in runs
    ]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"the run {twice[0]} is named twice")
    return dict(zip(labels, runs, strict=True))


def attribute_runs(
    paths: Sequence[Path],
    out: Path,
    *,
    images: int = 32,
    permutations: int = 64,
    worth: Worth = "tau",
    top: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, BandAttribution]:
    """Attribute the search of each run to DCT bands; ``out/attribution.npz`` is written after each.

    Args:
        images: so many queries, chosen by content.
        seed: of the permutations: the same for every run, so that maps differ by their models alone.
    """
    runs = labelled(paths)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, BandAttribution] = {}
    for label, run in runs.items():
        if run.config.runtime.threads:
            torch.set_num_threads(run.config.runtime.threads)
        victim, _ = load_victim(run)
        context = make_context(
            victim,
            read_data(run.config, progress),
            build("protocol", run.config.evaluation.protocol),
            direction=("image", "image"),
            database=run.learned_database(),
            queries=images,
            progress=progress,
        )
        found[label] = attribute_bands(
            context,
            worth=worth,
            permutations=permutations,
            top=top,
            seed=seed,
            progress=lambda done, total, label=label: progress(done, total, f"bands of {label}"),  # type: ignore[misc]
        )
        save_attributions(out / ATTRIBUTION, found)
    return found


def save_attributions(path: Path, found: Mapping[str, BandAttribution]) -> None:
    """Write attributions by label into one ``.npz``: ``LABEL|values``, ``LABEL|errors``, ..."""
    arrays = {
        f"{label}|{name}": value for label, one in found.items() for name, value in one.arrays().items()
    }
    with write_aside(path) as aside:
        np.savez(aside, allow_pickle=False, **arrays)


def load_attributions(path: Path) -> dict[str, BandAttribution]:
    """Read what ``save_attributions`` wrote.

    Raises:
        RunError: a file that cannot be read.
    """
    grouped: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                label, _, name = key.rpartition("|")
                grouped.setdefault(label, {})[name] = arrays[key]
        return {label: BandAttribution.from_arrays(found) for label, found in grouped.items()}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({error}); run 'robusthash attribute' again") from None
