"""The stages of an experiment as functions of a config. They meet only in the run directory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robusthash.apps.experiment.config import Config, ConfigError, load_config
from robusthash.apps.experiment.run_directory import Run, RunError, load_run, open_run, write_json
from robusthash.apps.reports.branch_maps import save_branches
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_aside
from robusthash.core.hamming import pack
from robusthash.core.identity import identity
from robusthash.core.out_of_memory import warn
from robusthash.core.registry import build, check
from robusthash.core.runtime import choose_device
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData
from robusthash.evaluation.attack_block import Attacked, attack_block
from robusthash.evaluation.context import EvaluationContext, in_parts, make_context
from robusthash.evaluation.evaluate import score_attack, score_clean, worst
from robusthash.metrics.results import EvalResult, save_results
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher, View, build_hasher, purified
from robusthash.objectives.base import HashObjective
from robusthash.training.loop import TrainConfig, fit
from robusthash.training.recipe import Recipe

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, text: str) -> None:
    """No progress is shown."""


def _titled(progress: Progress, title: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, title)


def read_data(config: Config, progress: Progress = silent) -> RetrievalData:
    """The data set that the config names."""
    progress(0, 1, "reading data")
    data = build("data", config.data)
    progress(1, 1, "reading data")
    return data


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
    # the run to start from sees the same data, seed and device as the one that asks for it, and has the same
    # net
    recipe = load_config(path)
    net = {part: getattr(config.hasher, part) for part in ("bits", "image", "text", "head")}
    hasher = recipe.hasher.model_copy(update=net)
    recipe = recipe.model_copy(update={"data": config.data, "hasher": hasher, "runtime": config.runtime})
    return train(recipe, root, progress, path.parent)


def train(config: Config, root: Path, progress: Progress = silent, base: Path = Path(".")) -> Run:
    """Train the model of ``config``, or go on from its last checkpoint; done already, it returns at once."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    run, parent = prepare(config, root, progress, base)
    if run.trained:
        return run
    data = read_data(config, progress)
    write_json(run.path / "data.json", data.describe())
    training = config.training
    objective: HashObjective = build("objective", training.objective)
    hasher = _start(config, data, parent)
    recipe = make_recipe(config, hasher, objective)
    lines = fit(recipe, data, train_config(config), run)
    learned = recipe.database_codes()
    if learned is not None:
        run.save_database(learned)
    run.save_model(recipe.hasher, objective, lines, data.image_size)
    return run


def _start(config: Config, data: RetrievalData, parent: Run | None) -> Hasher:
    """The hasher that training starts with: new, or the parent's; the config's purifiers are put before
    it."""
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
    hasher, _ = parent.load_model()
    if hasher.bits != section.bits:
        raise ConfigError(f"hasher.bits is {section.bits}, but {parent.path} was trained with {hasher.bits}")
    wanted = [name for name in ("image", "text") if getattr(section, name) is not None]
    if sorted(hasher.modalities) != sorted(wanted):
        raise ConfigError(
            f"the hasher section has {wanted}, but {parent.path} encodes {list(hasher.modalities)}"
        )
    for part in section.model_fields_set & {"image", "text", "head"}:
        asked, there = getattr(section, part), getattr(parent.config.hasher, part)
        if asked is not None and _settings(asked) != _settings(there):
            raise ConfigError(
                f"hasher.{part} is {asked!r}, but {parent.path}, which training goes on from, was trained with "
                f"{there!r}; train that net first and give its run as training.init_from"
            )
    if not section.purifiers:
        return hasher
    if hasher.purifiers:
        raise ConfigError(f"{parent.path} has purifiers already; start from the run without them")
    return purified(hasher, section.purifiers, section.sides, seed)


def _settings(component: Any) -> dict[str, Any] | None:
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
    )


def load_victim(run: Run) -> tuple[Hasher, HashObjective]:
    """The trained model on the device of its config."""
    hasher, objective = run.load_model()
    device = choose_device(run.config.runtime.device)
    return hasher.to(device), objective.to(device)


def encode(run: Run, progress: Progress = silent) -> dict[str, Path]:
    """Codes of every split, one ``.npz`` each: ``codes`` packed, ``bits``, ``ids``, ``labels``."""
    hasher, _ = load_victim(run)
    origin, written = run.card()["digest"], {}
    (run.path / "codes").mkdir(exist_ok=True)
    for name, split in read_data(run.config, progress).splits.items():
        victim = hasher.for_database() if name == "database" else hasher
        encoded = encode_split(victim, split, progress=_titled(progress, f"encoding {name}"), origin=origin)
        for modality, codes in encoded.items():
            path = run.path / "codes" / f"{name}.{modality}.npz"
            arrays = {"codes": codes.packed.numpy(), "bits": np.array(codes.bits), "ids": codes.ids.numpy()}
            if split.labels is not None:
                arrays["labels"] = split.labels.to(torch.uint8).numpy()
            with write_aside(path) as aside:
                np.savez(aside, allow_pickle=False, **arrays)
            written[f"{name}.{modality}"] = path
    return written


_MODALITY = {"I": "image", "T": "text"}


def image_size(data: RetrievalData) -> tuple[int, int] | None:
    """Height and width of the images that queries are; None of texts and features."""
    pixels = data.query.batch(torch.arange(1)).inputs.get("image")
    return None if pixels is None or pixels.ndim != 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))


def context_of(
    run: Run,
    victim: Hasher,
    data: RetrievalData,
    progress: Progress,
    direction: str | None = None,
    whole: bool = False,
) -> EvaluationContext:
    """The bench of a run's evaluation section, in a direction such as ``I2T``.

    Args:
        whole: with all queries, whatever number of them the section takes.
    """
    section = run.config.evaluation
    ends = None if direction is None else (_MODALITY[direction[0]], _MODALITY[direction[-1]])
    return make_context(
        victim,
        data,
        build("protocol", section.protocol),
        direction=ends,
        database=run.learned_database() if ends is None or ends[1] == "image" else None,
        queries=None if whole else section.queries,
        seed=section.seed,
        batch_size=section.batch_size,
        progress=progress,
    )


def evaluate(
    run: Run, progress: Progress = silent, attacks: Sequence[Mapping[str, Any] | str] | None = None
) -> dict[str, EvalResult]:
    """Evaluate clean, under each attack, and in the worst case per query; resumes block by block.

    Args:
        attacks: instead of those of the config.

    Returns:
        By name: ``clean``, each attack, ``worst``, and where several directions or relevances were asked for,
        these before the name (``I2T mainstay``, ``I2T by class worst``). Also written to ``metrics.json``
        with ``metrics.npz`` beside it.
    """
    section = run.config.evaluation
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)
    victim, objective = load_victim(run)
    _check_evaluation(run, victim)
    data = read_data(run.config, progress)
    by_relevance = {name: data if name == "own" else data.by(name) for name in section.relevance}
    chosen = chosen_attacks(run, attacks)
    results: dict[str, EvalResult] = {}
    for relevance, relevant in by_relevance.items():
        for direction in section.directions or (None,):
            context = context_of(run, victim, relevant, progress, direction)
            found = _evaluate_context(run, context, objective, chosen, progress)
            prefix = "" if direction is None else f"{direction} "
            prefix += "" if relevance == "own" else f"by {relevance} "
            results |= {
                f"{prefix}{name}": described(result, f"{prefix}{name}", run) for name, result in found.items()
            }
    save_results(run.path / "metrics.json", list(results.values()))
    save_branches(run.path, victim, data.query)
    return results


def _check_evaluation(run: Run, victim: Hasher) -> None:
    """What the evaluation section asks of the victim, before any query is attacked.

    Raises:
        ConfigError: a direction of a modality that it does not encode, or an attack that overlooks a purifier
            it lacks.
    """
    section = run.config.evaluation
    for direction in section.directions or ():
        if missing := [
            m for m in (_MODALITY[direction[0]], _MODALITY[direction[-1]]) if m not in victim.modalities
        ]:
            raise ConfigError(
                f"evaluation.directions holds {direction}, and {run.path} does not encode {missing[0]!r}: "
                f"it has {list(victim.modalities)}"
            )
    for name in ("oblivious", "identity"):
        if getattr(section, name) and not victim.purifiers:
            raise ConfigError(
                f"evaluation.{name} overlooks a purifier, and {run.path} has none; use evaluation.attacks"
            )


Chosen = dict[str, tuple[View, dict[str, Any]]]


def chosen_attacks(run: Run, attacks: Sequence[Mapping[str, Any] | str] | None) -> Chosen:
    """The attacks by the name of their result, with the view of the victim that each differentiates."""
    section = run.config.evaluation
    chosen: Chosen = {
        n: ("white-box", s) for n, s in named_attacks(section.attacks if attacks is None else attacks).items()
    }
    if attacks is None:
        chosen |= {f"{n} (oblivious)": ("oblivious", s) for n, s in named_attacks(section.oblivious).items()}
        chosen |= {f"{n} (identity)": ("identity", s) for n, s in named_attacks(section.identity).items()}
    return chosen


def _evaluate_context(
    run: Run, context: EvaluationContext, objective: HashObjective, chosen: Chosen, progress: Progress
) -> dict[str, EvalResult]:
    """Clean, each attack that changes the query modality of the bench, and the worst case."""
    results = {"clean": score_clean(context)}
    for name, (view, settings) in chosen.items():
        attack: Attack = build("attack", settings, objective=objective)
        if context.direction[0] in attack.threat.balls:
            results[name] = score_attack(
                context, attack, attacked_queries(run, context, name, settings, attack, progress, view)
            )
    if len(results) > 1:
        results["worst"] = worst(
            context, results["clean"], {n: r for n, r in results.items() if n != "clean"}
        )
    return results


def attack_to_file(
    run: Run, settings: Mapping[str, Any] | str, out: Path, progress: Progress = silent
) -> EvalResult:
    """Attack the queries and write the attacked ``inputs`` (float32), their ``codes``, ``bits`` and
    ``labels``.

    A joint attack writes the image under these names, and the text of each pair as ``inputs_text`` and
    ``codes_text``.
    """
    victim, objective = load_victim(run)
    ((name, plain),) = named_attacks([settings]).items()
    attack: Attack = build("attack", plain, objective=objective)
    data, home = read_data(run.config, progress), victim.modalities[0]
    arrays: dict[str, Any] = {"bits": victim.bits}
    results: list[EvalResult] = []
    for modality in attack.threat.balls:
        direction = None if modality == home else f"{modality[0].upper()}2{home[0].upper()}"
        context = context_of(run, victim, data, progress, direction)
        attacked = attacked_queries(run, context, name, plain, attack, progress)
        ending = f"_{modality}" if results else ""
        arrays[f"inputs{ending}"] = attacked.inputs.numpy()
        arrays[f"codes{ending}"] = pack(attacked.signs[:, 0]).numpy()
        arrays["labels"] = context.query_labels.to(torch.uint8).numpy()
        results.append(score_attack(context, attack, attacked))
    with write_aside(out) as aside:
        np.savez(aside, allow_pickle=False, **arrays)
    return described(results[0], name, run)


def named_attacks(attacks: Sequence[Mapping[str, Any] | str]) -> dict[str, dict[str, Any]]:
    """Attack settings under names that tell them apart: ``mainstay``, ``mainstay (slope one)``,
    ``mainstay on text``, ``mainstay #2``."""
    named: dict[str, dict[str, Any]] = {}
    for settings in attacks:
        card, options = check("attack", settings)
        name = (
            f"{card.name} on {options['modality']}"
            if options.get("modality", "image") != "image"
            else card.name
        )
        like = options.get("like", "mainstay")
        name += "" if like == "mainstay" else f" like {like if isinstance(like, str) else like.get('name')}"
        name += " (slope one)" if options.get("slope") == "one" else ""
        number = 2
        while name in named:
            name, number = f"{name.partition(' #')[0]} #{number}", number + 1
        named[name] = {"name": settings if isinstance(settings, str) else settings["name"], **options}
    return named


def attacked_queries(
    run: Run,
    context: EvaluationContext,
    name: str,
    settings: Mapping[str, Any],
    attack: Attack,
    progress: Progress,
    view: View = "white-box",
) -> Attacked:
    """The attacked queries, block by block; finished blocks are read from the run directory."""
    searched = [context.queries.fingerprint(), context.data.database.fingerprint()]
    where = [attack.settings(), *searched, run.config.evaluation.batch_size, context.seed]
    usual = context.direction == (context.victim.modalities[0],) * 2 and view == "white-box"
    where += [] if usual else [context.direction, view]
    where += [context.protocol.settings()["targets"]] if attack.targeted else []
    folder = run.path / "attacks" / f"{attack.name}-{identity(where)}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "config.json",
        {"settings": dict(settings), "threat": attack.threat.name, "budget": attack.budget},
    )
    paths = [folder / f"{block}.npz" for block in range(context.blocks)]
    fitted = attack if all(path.is_file() for path in paths) else context.fitted(attack)
    blocks, parts, seen = list[Attacked](), context, context.victim.seen_by(view)

    def attacked(part: EvaluationContext, block: int, _: slice) -> Attacked:
        return attack_block(part, fitted, block, seen)

    for block, path in enumerate(paths):
        if path.is_file():
            blocks.append(read_block(path))
        else:
            done, parts = in_parts(context, parts, block, attacked, warn)
            blocks.append(Attacked.join(done))
            with write_aside(path) as aside:
                np.savez(aside, allow_pickle=False, **blocks[-1].arrays())
        progress(block + 1, context.blocks, name)
    return Attacked.join(blocks)


def read_block(path: Path) -> Attacked:
    """A block of attacked queries, as it was kept.

    Raises:
        RunError: a file that cannot be read; it is named.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Attacked.from_arrays({name: arrays[name] for name in arrays.files})
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(
            f"attacked queries {path} are damaged ({error}); delete the file to attack them again"
        ) from None


def described(result: EvalResult, name: str, run: Run) -> EvalResult:
    """The result under its name, with the fields of its setting that describe the model."""
    training, card = run.config.training, run.card()
    objective = training.objective if isinstance(training.objective, str) else training.objective["name"]
    setting = replace(
        result.setting,
        model=f"{card['name']}/{card['id']}",
        objective=objective,
        training_attack="" if training.attack is None else json.dumps(training.attack, sort_keys=True),
        digests={**result.setting.digests, "model": card["digest"]},
    )
    return replace(result, name=name, setting=setting)


def database_codes(run: Run, progress: Progress = silent) -> Codes:
    """Codes of the database split: those that the method learned, else by the run's hasher."""
    learned = run.learned_database()
    if learned is not None:
        return learned
    hasher, _ = load_victim(run)
    split = read_data(run.config, progress).database
    modality = hasher.modalities[0]
    return encode_split(
        hasher.for_database(),
        split,
        modality=modality,
        progress=_titled(progress, "encoding the database"),
        origin=run.card()["digest"],
    )[modality]


def run_all(config: Config, root: Path, progress: Progress = silent, base: Path = Path(".")) -> Run:
    """Train, evaluate and report; what is done already is skipped, so the same call goes on after a kill."""
    from robusthash.apps.reports.run_report import write_report

    run = train(config, root, progress, base)
    evaluate(run, progress)
    write_report(run)
    return run
