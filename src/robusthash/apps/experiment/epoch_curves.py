"""Convergence: what the log of a run says by epoch, and the MAP of the epochs whose weights were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from robusthash.apps.experiment.run_directory import Run, RunError
from robusthash.apps.experiment.stages import Progress, named_attacks, read_data, silent
from robusthash.attacks.base import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import choose_device, digest
from robusthash.data.splits import stable_subset
from robusthash.evaluation.context import make_context
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

    def add(name: str, epoch: int, value: float) -> None:
        epochs, values = curves.setdefault(name, ([], []))
        epochs.append(epoch + 1)
        values.append(value)

    for line in run.lines():
        terms = {key: value for key, value in line.items() if key not in ("epoch", "lr", "seconds", FIGURES)}
        add("loss", line["epoch"], sum(terms.values()))
        for name, value in {**terms, **line.get(FIGURES, {})}.items():
            add(name, line["epoch"], value)
        add("seconds", line["epoch"], line["seconds"])
    return curves


def robust_curves(
    run: Run, attack: Mapping[str, Any] | str, queries: int | None = None, progress: Progress = silent
) -> dict[str, dict[int, EvalResult]]:
    """Clean and attacked results of every kept epoch, by name and then epoch; a kill loses one.

    Args:
        attack: settings of one untargeted attack.
        queries: only so many, chosen by content.

    Raises:
        RunError: no epoch was kept, or the method learns its database codes, which are those of the last
            epoch.
    """
    epochs = run.kept_epochs()
    if not epochs:
        raise RunError(
            f"{run.path} kept no weights by epoch; train a run with --set runtime.keep_epochs=1 (the model is the same)"
        )
    if run.learned_database() is not None:
        raise RunError(f"{run.path} learned its database codes, and those of earlier epochs are not kept")
    ((name, settings),) = named_attacks([attack]).items()
    section = run.config.evaluation
    data = read_data(run.config, progress)
    asked = None if queries is None else data.query.take(stable_subset(data.query, queries)).fingerprint()
    identity = digest(
        [settings, asked, section.model_dump(mode="json", include={"protocol", "seed", "batch_size"})]
    )
    path = run.path / f"curves-{identity}.json"
    held = {result.name: result for result in load_results(path)} if path.is_file() else {}
    curves: dict[str, dict[int, EvalResult]] = {"clean": {}, name: {}}
    for number, epoch in enumerate(epochs):
        progress(number, len(epochs), f"{name} by epoch")
        if f"{epoch}: {name}" not in held:
            hasher, objective = run.load_epoch(epoch)
            device = choose_device(run.config.runtime.device)
            context = make_context(
                hasher.to(device),
                data,
                build("protocol", section.protocol),
                queries=queries,
                seed=section.seed,
                batch_size=section.batch_size,
            )
            made: Attack = build("attack", settings, objective=objective.to(device))
            held[f"{epoch}: clean"] = _named(score_clean(context), f"{epoch}: clean")
            held[f"{epoch}: {name}"] = _named(
                score_attack(context, made, attack_all(context, made)), f"{epoch}: {name}"
            )
            save_results(path, list(held.values()))
        for result in curves:
            curves[result][epoch] = held[f"{epoch}: {result}"]
    progress(len(epochs), len(epochs), f"{name} by epoch")
    return curves


def _named(result: EvalResult, name: str) -> EvalResult:
    return replace(result, name=name)


def values_of(results: Mapping[int, EvalResult]) -> tuple[str, Curve, tuple[list[float], list[float]]]:
    """Measure, curve and interval of results by epoch."""
    measure = headline_of(next(iter(results.values())))
    ends = [result.interval[measure] for result in results.values()]
    curve = [float(epoch) for epoch in results], [result[measure] for result in results.values()]
    return measure, curve, ([low for low, _ in ends], [high for _, high in ends])
