"""The training stages of an experiment: from a config to a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment.config import Config, ConfigError, load_config
from robusthash.apps.experiment.model_stages import read_data, set_threads
from robusthash.apps.experiment.run_directory import TEXTS, Run, load_run, open_run, write_json
from robusthash.attacks.base import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, silent
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, build_hasher, purified
from robusthash.objectives.base import HashObjective
from robusthash.training.loop import TrainConfig, fit
from robusthash.training.recipe import Recipe


def run_all(config: Config, root: Path, progress: Progress = silent, base: Path = Path(".")) -> Run:
    """Train, evaluate and report; what is done already is skipped, so the same call goes on after a kill."""
    from robusthash.apps.experiment.evaluation_stages import evaluate
    from robusthash.apps.reports.run_report import write_report

    run = train(config, root, progress, base)
    evaluate(run, progress)
    write_report(run)
    return run


def prepare(
    config: Config, root: Path, progress: Progress = silent, base: Path = Path(".")
) -> tuple[Run, Run | None]:
    """The run of a config and the run it starts from, which is trained first where it is a recipe file.

    Args:
        root: the folder of all runs.
        base: where a relative ``init_from`` is looked for first (the folder of the recipe file).
    """
    parent = _parent(config, root, progress, base)
    return open_run(config, root, parent.card()["digest"] if parent else "", progress), parent


def _parent(config: Config, root: Path, progress: Progress, base: Path) -> Run | None:
    named = config.training.init_from
    if named is None:
        return None
    path = base / named if (base / named).exists() else Path(named)
    if path.suffix not in (".yaml", ".yml"):
        return load_run(path)
    # the run to start from has the same data, seed, device and net as the one that starts there
    recipe = load_config(path)
    net = {part: getattr(config.hasher, part) for part in ("bits", "image", "text", "head")}
    hasher = recipe.hasher.model_copy(update=net)
    shared = {"data": config.data, "hasher": hasher, "runtime": config.runtime}
    return train(recipe.model_copy(update=shared), root, progress, path.parent)


def train(config: Config, root: Path, progress: Progress = silent, base: Path = Path(".")) -> Run:
    """Train the model of ``config``, or go on from its last checkpoint; done already, it returns at once."""
    set_threads(config)
    run, parent = prepare(config, root, progress, base)
    if run.trained:
        return run
    data = read_data(config, progress)
    write_json(run.path / "data.json", data.describe())
    if data.text_form is not None:
        write_json(run.path / TEXTS, data.text_form.plain())
    objective: HashObjective = build("objective", config.training.objective)
    _check_evaluation(config, data, objective)
    recipe = make_recipe(config, _initial_hasher(config, data, parent), objective)
    log = fit(recipe, data, train_config(config), run)
    learned = recipe.database_codes()
    if learned is not None:
        run.save_database(learned)
    run.save_model(recipe.hasher, objective, log, data.image_size)
    return run


def _check_evaluation(config: Config, data: RetrievalData, objective: HashObjective) -> None:
    """Refuse, before the training, relevances and budgets that the evaluation after it would refuse."""
    section = config.evaluation
    for name in section.relevance:
        if name not in ("own", *data.label_systems):
            has = ["own", *data.label_systems]
            raise ConfigError(f"evaluation.relevance holds {name!r}, and {data.name} has {has}")
    one = data.train.batch(torch.zeros(1, dtype=torch.int64))
    for settings in (*section.attacks, *section.oblivious, *section.identity):
        attack: Attack = build("attack", settings, objective=objective)
        attack.check_inputs(one.inputs)


def _initial_hasher(config: Config, data: RetrievalData, parent: Run | None) -> Hasher:
    """The hasher that training starts with: new, or the parent's with the purifiers of the config."""
    section, seed = config.hasher, config.runtime.seed
    if parent is None:
        return build_hasher(
            bits=section.bits,
            image=section.image,
            text=section.text,
            head=section.head,
            seed=seed,
            vocabulary=data.vocabulary,
            purifiers=section.purifiers,
            sides=section.sides,
        )
    hasher = parent.load_hasher()
    if hasher.bits != section.bits:
        raise ConfigError(f"hasher.bits is {section.bits}, but {parent.path} was trained with {hasher.bits}")
    modalities = [name for name in ("image", "text") if getattr(section, name) is not None]
    if sorted(hasher.modalities) != sorted(modalities):
        raise ConfigError(f"hasher has {modalities}, but {parent.path} encodes {list(hasher.modalities)}")
    for part in section.model_fields_set & {"image", "text", "head"}:
        settings, trained = getattr(section, part), getattr(parent.config.hasher, part)
        if settings is not None and _options(settings) != _options(trained):
            raise ConfigError(
                f"hasher.{part} is {settings!r}, but {parent.path}, which training goes on from, was trained "
                f"with {trained!r}; train that net first and give its run as training.init_from"
            )
    if not section.purifiers:
        return hasher
    if hasher.purifiers:
        raise ConfigError(f"{parent.path} has purifiers already; start from the run without them")
    return purified(hasher, section.purifiers, section.sides, seed)


def _options(component: Any) -> dict[str, Any] | None:
    """A component's settings in one form: a bare name is a name without options."""
    return {"name": component} if isinstance(component, str) else component


def make_recipe(config: Config, hasher: Hasher, objective: HashObjective) -> Recipe:
    """The recipe that the training section names."""
    training = config.training
    attack = None if training.attack is None else build("attack", training.attack, objective=objective)
    outer = None if training.outer is None else build("outer", training.outer)
    return build("recipe", training.recipe, hasher=hasher, objective=objective, attack=attack, outer=outer)


def train_config(config: Config) -> TrainConfig:
    """The loop's settings."""
    training = config.training
    return TrainConfig(
        epochs=training.epochs,
        batch_size=training.batch_size,
        optim=training.optim,
        schedule=training.schedule,
        augment=training.augment,
        clip=training.clip,
        seed=config.runtime.seed,
        device=config.runtime.device,
        precision=training.precision,
        batchnorm=training.batchnorm,
        accumulate=training.accumulate,
        checkpoint_minutes=config.runtime.checkpoint_minutes,
        compile=config.runtime.compile,
    )
