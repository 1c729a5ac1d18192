"""Convergence of a run: its log by epoch, and the MAP of the epochs whose weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robusthash.apps.experiment.evaluation_stages import context_of, named_attacks
from robusthash.apps.experiment.model_stages import read_data
from robusthash.apps.experiment.run_directory import Run, RunError
from robusthash.attacks.base import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, choose_device, digest, silent
from robusthash.data.base import RetrievalData
from robusthash.data.splits import stable_subset
from robusthash.evaluation.evaluate import attack_all, score_attack, score_clean
from robusthash.metrics.results import EvalResult, headline_of, load_results, save_results
from robusthash.training.recipe import FIGURES

Curve = tuple[list[float], list[float]]
"""Epochs (1 is after the first) and values."""


def log_curves(run: Run) -> dict[str, Curve]:
    """Every loss term, figure, the sum of the terms (``loss``), and the ``seconds`` of each epoch, by name.

    ``loss`` is of all optimiser groups together, as a critic's term counts into it too.
    """
    curves: dict[str, Curve] = {}
    for line in run.lines():
        terms = {key: value for key, value in line.items() if key not in ("epoch", "lr", "seconds", FIGURES)}
        columns = {"loss": sum(terms.values()), **terms, **line.get(FIGURES, {}), "seconds": line["seconds"]}
        for name, value in columns.items():
            epochs, values = curves.setdefault(name, ([], []))
            epochs.append(line["epoch"] + 1)
            values.append(value)
    return curves


def robust_curves(
    run: Run, attack: Mapping[str, Any] | str, queries: int | None = None, progress: Progress = silent
) -> dict[str, dict[int, EvalResult]]:
    """Clean and attacked results of every stored epoch, by name and then epoch; a kill loses one epoch.

    Args:
        attack: settings of one untargeted attack.
        queries: number of queries, chosen by content; all by default.

    Raises:
        RunError: no epoch is stored, or the method learns its database codes, which are those of the last
            epoch.
    """
    epochs = run.stored_epochs()
    if not epochs:
        remedy = "train a run with --set runtime.keep_epochs=1 (the model is the same)"
        raise RunError(f"{run.path} kept no weights by epoch; {remedy}")
    if run.learned_database() is not None:
        raise RunError(f"{run.path} learned its database codes, and those of earlier epochs are not kept")
    ((name, settings),) = named_attacks([attack]).items()
    data = read_data(run.config, progress)
    subset = None if queries is None else data.query.take(stable_subset(data.query, queries)).fingerprint()
    section = run.config.evaluation.model_dump(mode="json", include={"protocol", "seed", "batch_size"})
    path = run.path / f"curves-{digest([settings, subset, section])}.json"
    stored = {result.name: result for result in load_results(path)} if path.is_file() else {}
    curves: dict[str, dict[int, EvalResult]] = {"clean": {}, name: {}}
    for number, epoch in enumerate(epochs):
        progress(number, len(epochs), f"{name} by epoch")
        if f"{epoch}: {name}" not in stored:
            results = _evaluate_epoch(run, epoch, data, settings, queries)
            for label, result in zip(curves, results, strict=True):
                stored[f"{epoch}: {label}"] = replace(result, name=f"{epoch}: {label}")
            save_results(path, list(stored.values()))
        for label, curve in curves.items():
            curve[epoch] = stored[f"{epoch}: {label}"]
    progress(len(epochs), len(epochs), f"{name} by epoch")
    return curves


def _evaluate_epoch(
    run: Run, epoch: int, data: RetrievalData, settings: Mapping[str, Any], queries: int | None
) -> tuple[EvalResult, EvalResult]:
    """Clean and attacked result of the model after an epoch."""
    device = choose_device(run.config.runtime.device)
    hasher, objective = run.load_epoch(epoch)
    context = context_of(run, hasher.to(device), data, silent, whole=True)
    context = context if queries is None else context.some(queries)
    attack: Attack = build("attack", settings, objective=objective.to(device))
    return score_clean(context), score_attack(context, attack, attack_all(context, attack))


def values_of(results: Mapping[int, EvalResult]) -> tuple[str, Curve, tuple[list[float], list[float]]]:
    """Measure, curve and interval of results by epoch."""
    measure = headline_of(next(iter(results.values())))
    ends = [result.interval[measure] for result in results.values()]
    curve = [float(epoch) for epoch in results], [result[measure] for result in results.values()]
    return measure, curve, ([low for low, _ in ends], [high for _, high in ends])
