"""Time of a training step of trained runs, in turn: all load of the machine falls on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from robusthash.apps.experiment.dry_run_parts import StepClock
from robusthash.apps.experiment.model_stages import load_victim, read_data
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.training_stages import make_recipe, train_config
from robusthash.core.runtime import choose_device
from robusthash.data.base import RetrievalData
from robusthash.data.splits import stable_subset
from robusthash.training.loop import fit
from robusthash.training.recipe import Recipe

_STEPS = 4
"""Of each run in a round; the first, which starts the reader, is not counted."""


def step_times(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of each run, (rounds,) by label: the median of three steps in each round.

    Every run trains on from its weights on a part of its training set, and nothing of it is kept.

    Raises:
        FileNotFoundError: data of a run that are not there.
        RunError: a run without weights.
    """
    trainings = {label: (run, _some_batches(run)) for label, run in runs.items()}
    times: dict[str, list[float]] = {label: [] for label in runs}
    labels = list(runs)
    for number in range(rounds):
        for label in labels if number % 2 == 0 else labels[::-1]:
            times[label].append(_step_seconds(*trainings[label]))
    return times


def _some_batches(run: Run) -> RetrievalData:
    """The run's data with as many training items as its steps take."""
    data = read_data(run.config)
    items = _STEPS * run.config.training.batch_size
    share = _recipe_of(run).epoch_items(items) / items  # an epoch may pass its items several times
    train = data.train.take(stable_subset(data.train, math.ceil(items / share)))
    return replace(data, train=train)


def _recipe_of(run: Run) -> Recipe:
    hasher, objective = load_victim(run)
    return make_recipe(run.config, hasher, objective)


def _step_seconds(run: Run, data: RetrievalData) -> float:
    clock = StepClock(choose_device(run.config.runtime.device))
    clock.start()
    settings = replace(train_config(run.config), epochs=1, compile=False)
    fit(_recipe_of(run), data, settings, clock)
    return median(clock.steps()[1:])
