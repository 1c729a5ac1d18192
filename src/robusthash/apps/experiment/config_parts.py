"""The parts that a config names, made once without data: options that they cannot take are found at once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from robusthash.apps.experiment.config import Component, Config, ConfigError
from robusthash.core.out_of_memory import out_of_memory
from robusthash.core.registry import build
from robusthash.models.hasher import Hasher, build_hasher


def check_parts(config: Config) -> None:
    """Make all parts of a config: hasher (without memory or pretrained weights), objective, attacks, recipe.

    The state of the global random streams is left as it was.

    Raises:
        ConfigError: options that a part cannot be made with, under the section that holds them.
    """
    training, evaluation = config.training, config.evaluation
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        hasher = _checked_hasher(config)
        objective = _build("training.objective", "objective", training.objective)
        inner = training.attack and _build("training.attack", "attack", training.attack, objective=objective)
        outer = training.outer and _build("training.outer", "outer", training.outer)
        if hasher is not None:  # a recipe refuses parts that do not fit together
            together = {"hasher": hasher, "objective": objective, "attack": inner, "outer": outer}
            _build("training", "recipe", training.recipe, **together)
        for section in ("attacks", "oblivious", "identity"):
            for place, settings in enumerate(getattr(evaluation, section)):
                _build(f"evaluation.{section}.{place}", "attack", settings, objective=objective)
    random.setstate(python)
    np.random.set_state(numpy)


def _checked_hasher(config: Config) -> Hasher | None:
    """The whole hasher, on torch's device without memory; None where an encoder needs a file."""
    section = config.hasher
    encoders = {name: _without_weights(getattr(section, name)) for name in ("image", "text")}
    texts = encoders["text"]
    if (isinstance(texts, dict) and texts["name"] == "transformer") or not any(encoders.values()):
        return None
    parts: dict[str, Any] = {**section.model_dump(include={"bits", "head", "purifiers", "sides"}), **encoders}
    with torch.device("meta"):
        hasher = _guarded("hasher", lambda: build_hasher(**parts, vocabulary=1))
    for name, values in hasher.named_parameters():
        if values.numel() == 0:
            modality = "text" if name.startswith("encoders.text") else "image"
            settings = getattr(section, modality)
            raise ConfigError(f"hasher.{modality}: no width may be 0, got {settings!r} ({name} is empty)")
    return hasher


def _without_weights(component: Component | None) -> Component | None:
    if not isinstance(component, dict):
        return {"name": component} if component else None
    return {key: _without_weights(value) if isinstance(value, dict) else value
            for key, value in component.items() if key not in ("weights", "config")}  # fmt: skip


def _build(place: str, kind: str, settings: Component, **context: Any) -> Any:
    return _guarded(place, lambda: build(kind, settings, **context))


def _guarded(place: str, make: Any) -> Any:
    """The result of ``make``; its errors stand under the place of the settings."""
    try:
        return make()
    except (ValueError, KeyError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = str(error.args[0] if error.args else error).partition("\n")[0]
        raise ConfigError(f"{place}: {reason}") from None
