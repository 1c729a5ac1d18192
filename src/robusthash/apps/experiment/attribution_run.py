"""Frequencies that trained runs search by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robusthash.analysis.band_attribution import BandAttribution, attribute_bands
from robusthash.apps.experiment.evaluation_stages import loaded_context
from robusthash.apps.experiment.run_directory import Run, reading
from robusthash.apps.experiment.run_selection import labelled
from robusthash.apps.experiment.stored_analyses import store_analysis
from robusthash.core.atomic_files import write_arrays
from robusthash.core.limited_files import read_npz
from robusthash.core.runtime import Progress, silent

ATTRIBUTION = "attribution.npz"


def attribute_runs(
    paths: Sequence[Path], out: Path, queries: int = 32, progress: Progress = silent, **options: Any
) -> dict[str, BandAttribution]:
    """Attribute the search of each run to DCT bands; ``out/attribution.npz`` is written after each.

    The share of the bands with u + v <= N is stored in each run as ``share at N``.

    Args:
        queries: number of queries, chosen by content.
        options: of ``attribute_bands``: ``worth``, ``permutations``, ``top``, ``seed``; the same for every
            run, so that maps differ by their models alone.
    """
    runs = labelled(paths)
    out.mkdir(parents=True, exist_ok=True)
    attributions: dict[str, BandAttribution] = {}
    for label, run in runs.items():
        attributions[label] = _attribute(run, label, queries, progress, options)
        save_attributions(out / ATTRIBUTION, attributions)
    return attributions


def _attribute(
    run: Run, label: str, queries: int, progress: Progress, options: Mapping[str, Any]
) -> BandAttribution:
    context = loaded_context(run, progress, "I2I", queries)
    title = f"bands of {label}"
    bands = attribute_bands(context, **options, progress=lambda done, total: progress(done, total, title))
    share = {f"share at {order}": value for order, value in enumerate(bands.by_order()[0].tolist())}
    settings = {name: getattr(bands, name) for name in ("chosen", "worth", "top", "permutations", "seed")}
    store_analysis(run, "bands", {"queries": len(bands.defined), **settings}, share)
    return bands


def save_attributions(path: Path, attributions: Mapping[str, BandAttribution]) -> None:
    """Write attributions by label into one ``.npz``: ``LABEL|values``, ``LABEL|errors``, ..."""
    arrays = {
        f"{label}|{name}": value
        for label, one in attributions.items()
        for name, value in one.arrays().items()
    }
    write_arrays(path, **arrays)


def load_attributions(path: Path) -> dict[str, BandAttribution]:
    """Read the file of ``save_attributions``.

    Raises:
        RunError: a file that cannot be read.
    """
    grouped: dict[str, dict[str, np.ndarray]] = {}
    with reading(path, "run 'robusthash attribute' again"):
        for key, values in read_npz(path).items():
            label, _, name = key.rpartition("|")
            grouped.setdefault(label, {})[name] = values
        return {label: BandAttribution.from_arrays(named) for label, named in grouped.items()}
