"""Numbers of analyses of a run, in small files of its directory: bands, cost, transfer, epochs.

``attribute``, ``cost`` and ``transfer`` write ``bands.json``, ``cost.json`` and ``transfer.json``; ``curves``
writes ``curves-DIGEST.json``. Kept copies of runs have them too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robusthash.apps.experiment.run_directory import Run, RunError, reading, write_json
from robusthash.core.limited_files import read_json
from robusthash.metrics.results import EvalResult, headline_of

Analysis = Literal["bands", "cost", "transfer", "epochs"]
ANALYSES: tuple[Analysis, ...] = get_args(Analysis)
CURVES = "curves-*.json"

_SCHEMA = "robusthash.analysis/1"
_VERBS = {"bands": "attribute", "cost": "cost", "transfer": "transfer"}

logger = logging.getLogger(__name__)


def store_analysis(
    run: Run, kind: Analysis, settings: Mapping[str, Any], values: Mapping[str, float | Sequence[float]]
) -> None:
    """Write the numbers of one analysis into the directory of its run, in place of earlier ones.

    A directory that cannot be written to is named in a warning: the analysis itself is not lost.

    Args:
        settings: what was measured and how.
        values: by name, a number or one of each query; NaN becomes null.
    """
    plain = {name: _plain(value) for name, value in values.items()}
    facts = {"schema": _SCHEMA, "model": run.card()["digest"], "settings": dict(settings), "values": plain}
    try:
        write_json(run.path / f"{kind}.json", facts)
    except OSError as error:
        logger.warning("%s is not stored: %s", run.path / f"{kind}.json", error)


def _plain(value: float | Sequence[float]) -> Any:
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return round(value, 6) if math.isfinite(value) else None


def has_analysis(run: Run, kind: Analysis) -> bool:
    """True where the run has the file of an analysis."""
    if kind == "epochs":
        return any(run.path.glob(CURVES))
    return (run.path / f"{kind}.json").is_file()


def analysis_values(run: Run, kind: Analysis) -> dict[str, Tensor]:
    """Numbers of an analysis by name, (1,) or (queries,) float64; none where it was not made.

    ``epochs``: ``last clean``, ``best clean``, ``last ATTACK``, ``best ATTACK`` of each query, after the last
    epoch and after that of the highest mean.

    Raises:
        RunError: a file that cannot be read, or is of other weights than the model card.
    """
    if not has_analysis(run, kind):
        return {}
    if kind == "epochs":
        return _of_epochs(run)
    path = run.path / f"{kind}.json"
    with reading(path, f"write it again: robusthash {_VERBS[kind]} {run.path}"):
        facts = read_json(path)
        if facts["schema"] != _SCHEMA:
            raise ValueError(f"its schema is {facts['schema']!r}, not {_SCHEMA!r}")
        values = {name: _tensor(value) for name, value in facts["values"].items()}
    if facts["model"] != (digest := run.card()["digest"]):
        raise RunError(f"{path} is of the weights {facts['model']}, and the model card says {digest}")
    return values


def _tensor(value: Any) -> Tensor:
    numbers = value if isinstance(value, list) else [value]
    return torch.tensor([math.nan if n is None else float(n) for n in numbers], dtype=torch.float64)


def _of_epochs(run: Run) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for file in sorted(run.path.glob(CURVES)):
        curves: dict[str, dict[int, EvalResult]] = {}
        for label, result in run.stored(file.name).items():
            number, _, name = label.partition(": ")
            curves.setdefault(name, {})[int(number)] = result
        for name, by_epoch in curves.items():
            measure = headline_of(next(iter(by_epoch.values())))
            best = max(by_epoch, key=lambda epoch: by_epoch[epoch][measure])
            for word, epoch in (("last", max(by_epoch)), ("best", best)):
                values.setdefault(f"{word} {name}", by_epoch[epoch].per_query[measure].to(torch.float64))
    return values
