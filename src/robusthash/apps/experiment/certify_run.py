"""The stage behind ``robusthash certify``: certificates of a run, with the votes kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.apps.experiment.evaluation_stages import context_of
from robusthash.apps.experiment.model_stages import load_hasher, read_data, set_threads
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_files import RunError, reading, write_json
from robusthash.apps.experiment.stored_certificates import CERTIFIED, certificates
from robusthash.core.atomic_files import write_aside
from robusthash.core.identity import identity
from robusthash.core.limited_files import read_npz
from robusthash.core.processes import owned_together
from robusthash.core.runtime import Progress, silent
from robusthash.evaluation.context import EvaluationContext
from robusthash.robustness.certificates.certified_map import Method, certify, checked_budgets


@dataclass(frozen=True)
class TensorFolder:
    """Small tensors as files of a folder, each complete or not there."""

    root: Path

    def __call__(self, name: str, work: Callable[[], Tensor]) -> Tensor:
        path = self.root / f"{name}.npz"
        if path.is_file():
            with reading(path, "delete the file to compute it again"):
                return torch.from_numpy(read_npz(path, ("values",))["values"])
        values = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            np.savez(aside, allow_pickle=False, values=values.numpy())
        return values


def certify_run(
    run: Run,
    method: Method = "smoothing",
    *,
    queries: int | None = 100,
    direction: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Certify a run, or go on where it was stopped, and add the result to its ``certified.json``.

    Of a kept copy, which has no weights, the stored certificate of the same method and noise is read.

    Args:
        method, queries, options: as of ``certify``.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.

    Returns:
        The certificate as plain data, with the ``recipe`` and the digest of the ``model``.

    Raises:
        InUse: another process certifies the run.
        RunError: a kept copy without it; an earlier ``certified.json`` that cannot be read.
    """
    if run.results_only:
        return _stored(run, method, direction, options)
    checked_budgets(method, **options)  # before data are read and encoded
    with owned_together(run.path, "certification"):
        others = certificates(run)
        set_threads(run.config)
        data = read_data(run.config, progress)
        context = context_of(run, load_hasher(run), data, progress, direction, whole=True)
        context = context if queries is None else context.some(queries)
        folder = TensorFolder(run.path / "certificates" / _identity(run, context, method, options))
        result = certify(context, method, queries=None, kept=folder, progress=progress, **options).plain()
        result["name"] = f"{direction or ''} {result['name']}".strip()
        result |= {"recipe": run.config.name, "model": run.card()["digest"]}
        write_json(run.path / CERTIFIED, {**others, result["name"]: result})
    return result


def _stored(run: Run, method: Method, direction: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    sigma = f" {options.get('sigma', 0.25):g}" if method == "smoothing" else ""
    name, held = f"{direction or ''} {method}{sigma}".strip(), certificates(run)
    if name not in held:
        has = f"it has {', '.join(held)}" if held else "it has none"
        raise RunError(
            f"{run.path} is a kept copy without the certificate {name!r} ({has}); "
            "give the run that it was made of"
        )
    return held[name]


def _identity(run: Run, context: EvaluationContext, method: Method, options: Mapping[str, Any]) -> str:
    """Digest of all that votes and codes depend on, but attack and budget: those name the files."""
    noise = [options.get("sigma", 0.25), options.get("samples", 1000)] if method == "smoothing" else []
    items = [context.queries.fingerprint(), context.data.database.fingerprint(), context.direction]
    return identity([run.card()["digest"], method, noise, items, context.seed])
