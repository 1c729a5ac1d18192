"""The stage of the checks: a run -> its flags; and the calibration of the checks themselves on masked
victims."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from robusthash.apps.experiment.run_directory import CHECKED, Run, write_json
from robusthash.apps.experiment.stages import Progress, context_of, load_victim, read_data, silent
from robusthash.apps.experiment.threat_options import threat_name, threat_on_data
from robusthash.attacks.published import mainstay
from robusthash.attacks.threat_model import Threat
from robusthash.data import load_data
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.outer_losses import SAATOuter
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.metrics.results import Flag
from robusthash.models.hasher import build_hasher
from robusthash.objectives.csq import CSQ
from robusthash.robustness.checks.base import CHECKS
from robusthash.robustness.checks.behaviour_checks import require_usable
from robusthash.robustness.checks.masked_defenses import Calibrated, calibrate
from robusthash.robustness.checks.model_checks import model_checks
from robusthash.training.loop import OptimConfig, TrainConfig, fit
from robusthash.training.recipe import HashingRecipe


def check_run(
    run: Run,
    progress: Progress = silent,
    *,
    threat: str | None = None,
    queries: int = 128,
    steps: int = 100,
    direction: str | None = None,
) -> tuple[Flag, ...]:
    """Run all checks of the victim of a run, in its first direction; also written to ``checks.json`` of the
    run.

    Args:
        threat: budget by name; the usual one of the query modality by default.
        queries: so many of the run's, chosen by content.
        direction: such as ``T2I``; the first of the run's by default.
    """
    context = run_context(run, progress, direction)
    flags = model_checks(context, _threat(context, threat), queries=queries, steps=steps)
    write_json(run.path / CHECKED, plain(flags))
    return flags


def run_context(run: Run, progress: Progress = silent, direction: str | None = None) -> EvaluationContext:
    """The bench of a run, after a few queries have shown that the model can be used at all."""
    victim, _ = load_victim(run)
    data = read_data(run.config, progress)
    few = data.query.batch(torch.arange(min(8, len(data.query)))).only(victim.modalities)
    require_usable(victim, few.to(victim.device))
    return context_of(
        run, victim, data, progress, direction or (run.config.evaluation.directions or (None,))[0]
    )


def _threat(context: EvaluationContext, name: str | None = None) -> Threat:
    return threat_on_data(name or threat_name(modality=context.direction[0]), context.data, "W2")


def plain(flags: tuple[Flag, ...]) -> list[dict[str, Any]]:
    """Flags as plain data, with what each value is."""
    return [{**asdict(flag), "title": CHECKS[flag.id].title} for flag in flags]


def calibration(
    run: Run | None = None, progress: Progress = silent, *, queries: int = 40, steps: int = 50
) -> tuple[tuple[Flag, ...], tuple[Calibrated, ...]]:
    """What the checks say of an honest victim, and of that victim masked in every way of the zoo.

    Args:
        run: whose victim is masked; by default a small CSQ model hardened by SAAT on the generated world,
            made anew.
    """
    context = toy_context(progress) if run is None else run_context(run, progress)
    threat = _threat(context)
    honest = model_checks(context, threat, queries=queries, steps=100)
    return honest, calibrate(context, threat, queries=queries, steps=steps)


def toy_context(
    progress: Progress = silent, *, bits: int = 32, width: int = 8, epochs: int = 20, hardening: int = 3
) -> EvaluationContext:
    """A small model, trained by CSQ and then hardened by SAAT, on the generated world: about ten seconds.

    It is hardened for half of the budget that is attacked, so that an attack still moves its AP and can be
    judged.
    """
    data = load_data("synthetic", seed=0)
    hasher = build_hasher(bits=bits, image={"name": "small", "width": width})
    progress(0, 2, "training a toy")
    config = TrainConfig(epochs=epochs, batch_size=32, optim={"hasher": OptimConfig(lr=0.05)}, device="cpu")
    fit(HashingRecipe(hasher, CSQ()), data, config)
    progress(1, 2, "training a toy")
    inner = mainstay(eps=4 / 255, steps=2, step_size=2.67 / 255, slope="one")
    harder = TrainConfig(
        epochs=hardening, batch_size=32, optim={"hasher": OptimConfig(lr=0.02)}, device="cpu"
    )
    fit(AdversarialTraining(hasher, CSQ(), inner, SAATOuter()), data, harder)
    progress(2, 2, "training a toy")
    return make_context(hasher, data, batch_size=64)


def as_markdown(rows: tuple[Calibrated, ...]) -> str:
    """The calibration as a Markdown table."""
    lines = [
        "| masked by | check meant | value | threshold | caught | also red |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        caught = "yes" if row.caught else "**no**"
        also = ", ".join(row.also)
        lines.append(
            f"| {row.name} | {row.meant} | {row.value:.4g} | {row.threshold:.4g} | {caught} | {also} |"
        )
    return "\n".join(lines)
