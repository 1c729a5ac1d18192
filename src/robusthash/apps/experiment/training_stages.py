"""The training stages of an experiment: from a config to a trained run."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment.config import Config, ConfigError, load_config, settings_of
from robusthash.apps.experiment.config_parts import check_parts
from robusthash.apps.experiment.evaluation_stages import check_evaluation, evaluate
from robusthash.apps.experiment.model_stages import prepare_process, read_data
from robusthash.apps.experiment.run_directory import (
    RESTART,
    TEXTS,
    Run,
    RunError,
    accept,
    load_run,
    open_run,
    run_folder,
    write_json,
)  # fmt: skip
from robusthash.apps.experiment.training_trackers import check_trackers, tracked
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_aside
from robusthash.core.directory_lock import LOCK, InUse, owned
from robusthash.core.processes import joined_processes, rank, wait_for_others
from robusthash.core.registry import build, check
from robusthash.core.runtime import Progress, choose_device, silent
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, build_hasher, purified, with_new_heads
from robusthash.objectives.base import HashObjective
from robusthash.training.loop import CheckpointError, TrainConfig, fit
from robusthash.training.recipe import Recipe

_PATIENCE = 5.0  # seconds that a run waits for its parent, where another process has that open


def run_all(
    config: Config,
    root: Path,
    progress: Progress = silent,
    base: Path = Path("."),
    resume_from: Path | None = None,
) -> Run:
    """Train, evaluate and report; what is done already is skipped, so the same call goes on after a kill.

    Args and errors as of ``train``. The config of a run that is trained is replaced once its results are.
    """
    from robusthash.apps.reports.run_report import write_report

    with joined_processes(), _opened(config, root, progress, base, resume_from) as (run, parent):
        _train(run, parent, progress)
        evaluate(run, progress)
        if rank() == 0:
            accept(run)
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
    with _opened(config, root, progress, base) as (run, parent):
        return run, parent


@contextmanager
def _opened(
    config: Config, root: Path, progress: Progress, base: Path, resume_from: Path | None = None
) -> Iterator[tuple[Run, Run | None]]:
    """The run of a config, owned inside of the block, and its parent; settings are checked before it is
    made.
    """
    choose_device(config.runtime.device)
    prepare_process(config)
    check_parts(config)
    check_trackers(config.runtime.loggers)
    parent = _parent(config, root, progress, base)
    ancestor = parent.card()["digest"] if parent else ""
    shorter = None if resume_from is None else load_run(resume_from)
    if shorter is not None:
        check_shorter(config, shorter)
        if depends_on_total(config) or shorter.id != _of_epochs(config, shorter).model_id(ancestor):
            ancestor = f"{ancestor} {shorter.card()['digest']}"
    if rank() > 0:
        wait_for_others()  # until the first has made the run
        yield Run(run_folder(config, root, ancestor), config), parent
        return
    folder = run_folder(config, root, ancestor)
    with owned(folder, "training"), _gone_if_refused(folder):
        origin = {"parent": parent, "resumed_from": shorter}
        run = open_run(config, root, ancestor, progress, {k: r.path for k, r in origin.items() if r})
        if shorter is not None and not run.trained and not run.checkpoint_file.is_file():
            _take_over(run, shorter)
        wait_for_others()
        yield run, parent


@contextmanager
def _gone_if_refused(folder: Path) -> Iterator[None]:
    """Remove a run folder that was empty, where settings or data are refused before anything is trained."""
    is_new = not any(path.name != LOCK for path in folder.iterdir())
    try:
        yield
    except (KeyError, ValueError, OSError):
        if is_new and not any((folder / name).exists() for name in ("log.jsonl", "checkpoint")):
            shutil.rmtree(folder)
        raise


def _parent(config: Config, root: Path, progress: Progress, base: Path) -> Run | None:
    origin = origin_of(config, base)
    if not isinstance(origin, tuple):
        return origin
    recipe, folder = origin
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return train(recipe, root, progress, folder)
        except InUse:  # another run of the same parent may only be looking whether it is trained
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def origin_of(config: Config, base: Path) -> Run | tuple[Config, Path] | None:
    """The run that training starts from, or the config of one to train first and its folder; None for a new
    net.
    """
    named = config.training.init_from
    if named is None:
        return None
    path = base / named if (base / named).exists() else Path(named)
    if not path.exists() and (base / "environment.json").is_file():  # the config of a run, trained again
        path = Path(load_run(base).origin.get("parent", path))
    is_recipe = path.suffix in (".yaml", ".yml")
    if not (path if is_recipe else path / "config.yaml").is_file():
        raise ConfigError(
            f"training.init_from is {named!r}, and there is no such {'file' if is_recipe else 'run'}: "
            "name the directory of a trained run, or the recipe file of one to train first"
        )
    if not is_recipe:
        return load_run(path)
    # the run to start from has the same data, seed, device and net as the one that starts there
    recipe = load_config(path)
    parts = ("image", "text") if _new_heads(config) else ("bits", "image", "text", "head")
    net = {part: getattr(config.hasher, part) for part in parts}
    hasher = recipe.hasher.model_copy(update=net)
    shared = {"data": config.data, "hasher": hasher, "runtime": config.runtime}
    return recipe.model_copy(update=shared), path.parent


def train(
    config: Config,
    root: Path,
    progress: Progress = silent,
    base: Path = Path("."),
    resume_from: Path | None = None,
) -> Run:
    """Train the model of ``config``, or go on from its last checkpoint; done already, it returns at once.

    Args:
        resume_from: a run of the same config with fewer epochs, from whose end training goes on. The model is
            that of a training from the start, bit for bit, unless something ``depends_on_total``: then it is
            a run of its own, with another id.

    Raises:
        InUse: another process works on the run.
        RunError: the run holds other weights than it trained, or ``resume_from`` is no such run.
        ValueError: a device that is not there; nothing is written then.
    """
    with joined_processes(), _opened(config, root, progress, base, resume_from) as (run, parent):
        done = run.trained
        _train(run, parent, progress)
        if done and rank() == 0:
            check_evaluation(run)
            accept(run)
    return run


def _train(run: Run, parent: Run | None, progress: Progress) -> None:
    """Train a run that is open; of several processes, which train together, the first writes its files."""
    config, described, first = run.config, run.path / "data.json", rank() == 0
    if run.trained:
        run.check_weights()
        if first and not described.is_file():
            write_json(described, read_data(config, progress).describe())
        return
    data = read_data(config, progress)
    if first:
        write_json(described, data.describe())
    if first and data.text_form is not None:
        write_json(run.path / TEXTS, data.text_form.plain())
    objective: HashObjective = build("objective", config.training.objective)
    check_against_data(config, data, objective)
    recipe = make_recipe(config, initial_hasher(config, data, parent), objective)
    try:
        with tracked(run) if first else nullcontext(_Follower(run.path, run.config)) as lines:
            log = fit(recipe, data, train_config(config), lines)
    except CheckpointError as error:
        raise RunError(f"checkpoint {run.checkpoint_file} {error}; {RESTART}") from None
    learned = recipe.database_codes()
    if first and learned is not None:
        run.save_database(learned)
    if first:
        run.save_model(recipe.hasher, objective, log, data.image_size)
    wait_for_others()


class _Follower(Run):
    """The run of a process that trains along and writes nothing."""

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Left to the first process."""

    def log(self, line: dict[str, Any]) -> None:
        """Left to the first process."""

    def progress(self, done: int, total: int, text: str) -> None:
        """Left to the first process."""


def _of_epochs(config: Config, shorter: Run) -> Config:
    """The config with as many epochs as a shorter run."""
    training = config.training.model_copy(update={"epochs": shorter.config.training.epochs})
    return config.model_copy(update={"training": training})


def check_shorter(config: Config, shorter: Run) -> None:
    """Refuse a run that a longer training of ``config`` cannot go on from.

    Raises:
        RunError: it is not trained, differs in more than its epochs, has no fewer, or kept no checkpoint.
    """
    shorter.check_weights()
    epochs, trained = config.training.epochs, shorter.config.training.epochs
    if epochs <= trained:
        raise RunError(
            f"{shorter.path} has {trained} epochs and the new run {epochs}: nothing is left to train; set "
            f"training.epochs above {trained}"
        )
    if _of_epochs(config, shorter).model_id() != shorter.config.model_id():
        raise RunError(
            f"{shorter.path} is of another data, hasher, training or seed than {config.name}; training goes "
            f"on with the same recipe and more epochs: robusthash train {shorter.path / 'config.yaml'} --set "
            f"training.epochs={epochs} --resume-from {shorter.path}"
        )
    if not shorter.checkpoint_file.is_file():
        raise RunError(
            f"{shorter.path} kept no checkpoint, as those of earlier versions; train from the start, without "
            "--resume-from"
        )


def depends_on_total(config: Config) -> list[str]:
    """Settings by which an epoch of training depends on their number in all, in words; empty where none does.

    Without them, a training that goes on from a shorter one gives what one from the start would.
    """
    training, notes = config.training, list[str]()
    if training.schedule.kind != "constant" or training.schedule.warmup:
        notes.append(f"the schedule of the learning rate ({training.schedule.kind})")
    for kind in ("recipe", "outer"):
        settings = getattr(training, kind)
        if settings is not None:
            card, options = check(kind, settings)
            parameters = inspect.signature(card.make).parameters
            default = parameters["warmup"].default if "warmup" in parameters else 0
            if options.get("warmup", default) or not card.make.__module__.startswith("robusthash."):
                notes.append(f"training.{kind} {card.name!r}, which may change with the share that is done")
    return notes


def _take_over(run: Run, shorter: Run) -> None:
    """Begin a run with the checkpoint and the log of a shorter one."""
    run.checkpoint_file.parent.mkdir(exist_ok=True)
    for line in shorter.lines():
        run.log(line)
    with write_aside(run.checkpoint_file) as aside:
        shutil.copyfile(shorter.checkpoint_file, aside)


def check_against_data(config: Config, data: RetrievalData, objective: HashObjective) -> None:
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


def initial_hasher(config: Config, data: RetrievalData, parent: Run | None) -> Hasher:
    """The hasher that training starts with: new, or the parent's with the purifiers of the config."""
    section, seed = config.hasher, config.runtime.seed
    if parent is None:
        return build_hasher(**dict(section), seed=seed, vocabulary=data.vocabulary)
    hasher, parts = parent.load_hasher(), {"image", "text", "head"}
    if _new_heads(config):
        hasher, parts = with_new_heads(hasher, section.bits, section.head, seed), {"image", "text"}
    if hasher.bits != section.bits:
        raise ConfigError(f"hasher.bits is {section.bits}, but {parent.path} was trained with {hasher.bits}")
    modalities = [name for name in ("image", "text") if getattr(section, name) is not None]
    if sorted(hasher.modalities) != sorted(modalities):
        raise ConfigError(f"hasher has {modalities}, but {parent.path} encodes {list(hasher.modalities)}")
    for part in section.model_fields_set & parts:
        settings, trained = getattr(section, part), getattr(parent.config.hasher, part)
        if settings is not None and (trained is None or settings_of(settings) != settings_of(trained)):
            raise ConfigError(
                f"hasher.{part} is {settings!r}, but {parent.path}, which training goes on from, was trained "
                f"with {trained!r}; train that net first and give its run as training.init_from"
            )
    if not section.purifiers:
        return hasher
    if hasher.purifiers:
        raise ConfigError(f"{parent.path} has purifiers already; start from the run without them")
    return purified(hasher, section.purifiers, section.sides, seed)


def _new_heads(config: Config) -> bool:
    """Tell whether the recipe replaces the heads of a run that it starts from."""
    return bool(getattr(check("recipe", config.training.recipe)[0].make, "new_heads", False))


def make_recipe(config: Config, hasher: Hasher, objective: HashObjective) -> Recipe:
    """The recipe that the training section names."""
    training = config.training
    attack = None if training.attack is None else build("attack", training.attack, objective=objective)
    outer = None if training.outer is None else build("outer", training.outer)
    return build("recipe", training.recipe, hasher=hasher, objective=objective, attack=attack, outer=outer)


def train_config(config: Config) -> TrainConfig:
    """The loop's settings."""
    own = {**dict(config.runtime), **dict(config.training)}
    return TrainConfig(**{name: own[name] for name in TrainConfig.__dataclass_fields__})
