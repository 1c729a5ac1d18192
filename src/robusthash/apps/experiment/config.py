"""The typed experiment config: YAML in and out, overrides by path, errors that name the field."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import nn

from robusthash.apps.experiment.config_values import (
    ConfigError,
    Seed,
    checked,
    explained,
    fields_of,
    numbers,
    shortened,
    value_of,
)
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_text
from robusthash.core.limited_files import read_yaml
from robusthash.core.plugins import PluginError, module_folders
from robusthash.core.registry import build, check
from robusthash.core.runtime import digest
from robusthash.defenses.base import check_needs
from robusthash.training.loop import OptimConfig, Schedule
from robusthash.training.optimiser_groups import BASE, MODALITIES, NAMES, unknown, unset

_FILES = 20  # that extend each other


def is_folder_name(name: str) -> bool:
    """True for one component of a path that leads nowhere else."""
    return re.fullmatch(r"\w[\w.-]{0,99}", name) is not None


Component = dict[str, Any] | str
"""``name`` or ``{name: ..., options}`` of a registered kind."""


def settings_of(component: Mapping[str, Any] | str) -> dict[str, Any]:
    """A component with its name and options, also where a bare name is given."""
    return {"name": component} if isinstance(component, str) else dict(component)


def _of_kind(kind: str) -> BeforeValidator:
    """Validator of a component: a registered name, and options that its signature takes."""

    def known(value: Any) -> Any:
        value = numbers(value)
        try:
            check(kind, value)
        except PluginError:  # no fault of the config
            raise
        except (KeyError, ImportError) as error:  # pydantic reports ValueError alone
            raise ValueError(error.args[0]) from None
        return value

    return BeforeValidator(known)


def _build(kind: str, settings: Component, **context: Any) -> Any:
    """``registry.build`` for validators: an unknown name inside of the options is a ValueError too."""
    try:
        return build(kind, settings, **context)
    except KeyError as error:
        raise ValueError(error.args[0]) from None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_type(cls, value: Any, field: ValidationInfo) -> Any:
        return checked(value, cls.model_fields[field.field_name or ""].annotation)


class HasherSection(Section):
    """Bits, encoders, head and purifiers."""

    bits: int = Field(32, ge=1)
    image: Annotated[Component, _of_kind("image-encoder")] | None = "small"
    text: Annotated[Component, _of_kind("text-encoder")] | None = None
    head: Annotated[Component, _of_kind("head")] = "tanh"
    purifiers: dict[str, Annotated[Component, _of_kind("purifier")]] = {}
    sides: Literal["query", "both"] = "both"  # what purifiers purify

    def plain(self) -> dict[str, Any]:
        """Plain data, without what a hasher that purifies nothing has no use for."""
        return self.model_dump(mode="json", exclude=None if self.purifiers else {"purifiers", "sides"})


def _completed(groups: Any) -> Any:
    """Settings of optimiser groups, those of a part of the hasher over those of ``hasher``; null is none."""
    groups = numbers(groups)
    if isinstance(groups, Mapping):
        groups = {name: group for name, group in groups.items() if group is not None}
    whole = groups.get(BASE, {}) if isinstance(groups, Mapping) else None
    whole = dataclasses.asdict(whole) if isinstance(whole, OptimConfig) else whole
    if not isinstance(whole, Mapping):
        return groups  # the fields report the error
    parts = {name: group for name, group in groups.items() if name in NAMES and isinstance(group, Mapping)}
    return {**groups, **{name: {**whole, **group} for name, group in parts.items()}}


class TrainingSection(Section):
    """Settings of training. The signature of the recipe says whether it takes ``attack`` and ``outer``.

    ``optim`` holds the settings of each optimiser group: ``hasher``, where there are any ``critic``,
    ``purifier``, ``guide``, and parts of the hasher (``training.optimiser_groups``), which take from
    ``hasher`` what they leave out.
    """

    recipe: Annotated[Component, _of_kind("recipe")] = "hashing"
    objective: Annotated[Component, _of_kind("objective")] = "csq"
    outer: Annotated[Component, _of_kind("outer")] | None = None
    attack: Annotated[Component, _of_kind("attack")] | None = None
    optim: Annotated[
        dict[str, Annotated[OptimConfig, fields_of(OptimConfig)]], BeforeValidator(_completed)
    ] = {"hasher": OptimConfig()}
    schedule: Annotated[Schedule, fields_of(Schedule)] = Schedule()
    epochs: int = Field(20, ge=1, le=1_000_000)
    batch_size: int = Field(64, ge=1)
    augment: Literal["none", "flip-crop"] = "none"
    clip: float = Field(0.0, ge=0)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    accumulate: int = Field(1, ge=1)
    batchnorm: Literal["train", "frozen"] = "train"
    init_from: str | None = None  # a run directory, or the recipe file of a run to train first

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        card, _ = check("recipe", self.recipe)
        accepted = inspect.signature(card.make).parameters
        for key in ("attack", "outer"):
            is_set = getattr(self, key) is not None
            if key in accepted and accepted[key].default is inspect.Parameter.empty and not is_set:
                raise ValueError(f"recipe {card.name!r} needs {key!r}")
            if key not in accepted and is_set:
                remedy = "adversarial training is recipe: adversarial"
                raise ValueError(f"recipe {card.name!r} takes no {key!r}; {remedy}")
        if getattr(card.make, "starts_trained", False) and self.init_from is None:
            raise ValueError(
                f"recipe {card.name!r} goes on from a trained hasher: set training.init_from to a run, or to "
                "the recipe file of one"
            )
        groups: tuple[str, ...] | None = getattr(card.make, "groups", None)
        self._check_groups(groups)
        self._check_attack(guide_learns="guide" in (groups or ()))
        return self

    def _check_groups(self, groups: tuple[str, ...] | None) -> None:
        """``optim`` against the groups that the recipe may have; the loop knows which of them it has."""
        if groups is not None and groups[0] not in self.optim:
            raise ValueError(unset(groups[0]))
        parts = NAMES if groups is not None and BASE in groups else ()
        for name, optim in self.optim.items():
            if groups is not None and name not in (*groups, BASE, *parts):
                raise ValueError(unknown(name, [*groups, *parts]))
            if optim.lr == 0 and name not in (BASE, *NAMES):
                raise ValueError(
                    f"optim.{name}.lr is 0, which freezes parts of the hasher and no other group"
                )

    def _check_attack(self, guide_learns: bool) -> None:
        """The inner attack gives what the outer loss needs; a guide that learns has optimiser settings."""
        attack = self.inner_attack()
        if attack is None:
            return
        if not any(ball.eps for ball in attack.threat.balls.values()):
            raise ValueError("attack has an eps of 0, so that nothing would be attacked; 8/255 is usual")
        if guide_learns and isinstance(attack.guide, nn.Module) and "guide" not in self.optim:
            raise ValueError(unset("guide"))
        if self.outer is not None:
            check_needs(attack, _build("outer", self.outer), build("objective", self.objective))

    def inner_attack(self) -> Attack | None:
        """The inner attack, made without data.

        Raises:
            ValueError: options that it does not take.
        """
        if self.attack is None:
            return None
        attack: Attack = _build("attack", self.attack, objective=_build("objective", self.objective))
        return attack


class EvaluationSection(Section):
    """A protocol, and attacks each evaluated alone and in the worst case per query.

    Every direction is evaluated under the attacks that change its query modality, and by every relevance:
    ``own`` is the data set's, other names are its other label systems.
    """

    protocol: Annotated[Component, _of_kind("protocol")] = "house"
    attacks: list[Annotated[Component, _of_kind("attack")]] = []
    oblivious: list[Annotated[Component, _of_kind("attack")]] = []  # gradients without the purifiers
    identity: list[Annotated[Component, _of_kind("attack")]] = []  # purifiers' gradients taken as identity
    directions: list[Literal["I2I", "I2T", "T2I", "T2T"]] | None = None  # the first modality to itself
    relevance: list[str] = ["own"]
    queries: int | None = Field(None, ge=1)  # chosen by content as in `assess`; all by default
    batch_size: int = Field(250, ge=1)
    seed: Seed = 0

    @field_validator("relevance")
    @classmethod
    def _some(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("names none, and nothing would be evaluated; leave it out for the default")
        return names

    @field_validator("protocol")
    @classmethod
    def _usable(cls, protocol: Component) -> Component:
        _build("protocol", protocol)  # it checks its values when it is made
        return protocol


class RuntimeSection(Section):
    """Seed, device, threads, workers, and checkpoints that stay."""

    seed: Seed = 0
    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    keep_epochs: int | None = Field(None, ge=1)  # keep the weights every N epochs, for `curves --robust`
    checkpoint_minutes: float = Field(0.0, ge=0)  # between checkpoints inside an epoch; 0: at its end alone
    compile: bool = False  # the encoders, by torch.compile
    workers: int = Field(0, ge=0)  # processes that decode image files; 0: threads
    cache_gib: float | None = Field(None, ge=0)  # of decoded images in memory; as the data set says
    loggers: list[Literal["tensorboard", "wandb"]] = []  # that get the numbers of each epoch too


class Config(Section):
    """One experiment, from data to index."""

    name: str
    data: Annotated[Component, _of_kind("data")] = "photos"
    hasher: HasherSection = HasherSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    runtime: RuntimeSection = RuntimeSection()

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        """The name is a folder below ``runs/``, and no other place."""
        if not is_folder_name(name):
            raise ValueError(
                "a name has up to 100 letters, digits, '.', '_' and '-', and begins with none of '.' and '-'"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for name in self.training.optim:
            modality = name.partition("-")[0]
            if name in NAMES and modality in MODALITIES and getattr(self.hasher, modality) is None:
                raise ValueError(f"training.optim.{name} needs hasher.{modality}, which is not set")
        attack = self.training.inner_attack()
        if attack is None:
            return self
        for modality in attack.threat.balls:
            if getattr(self.hasher, modality, None) is None:
                raise ValueError(
                    f"the inner attack {attack.name!r} changes {modality}s, and this hasher encodes none: "
                    f"set hasher.{modality}, or take another training.attack"
                )
        return self

    def model_id(self, ancestor: str = "") -> str:
        """Digest of all that makes the trained model: data, hasher, training, seed, and the run it started
        from."""
        training = self.training.model_dump(mode="json", exclude={"init_from"})
        # options that came later count where they are not the default: the ids of earlier runs stay
        for name, default in (("batchnorm", "train"), ("accumulate", 1)):
            if training[name] == default:
                del training[name]
        for optim in training["optim"].values():
            if optim["frozen_epochs"] == 0:
                del optim["frozen_epochs"]
        model = {"data": self.data, "hasher": self.hasher.plain(), "training": training}
        return digest([model, self.runtime.seed, ancestor], 10)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: a missing file, no YAML, an unknown key (the nearest is offered), a bad value.
    """
    raw, folders = read_recipe(Path(path))
    with module_folders(folders):
        return make_config(raw, overrides, where=str(path))


def read_recipe(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """Plain content of a recipe file, with its name, and the folders of the files that it comes from."""
    files: list[Path] = []
    raw = _read(path, files)
    raw.setdefault("name", path.stem)
    return raw, [file.parent for file in files]


def _read(path: Path, children: list[Path]) -> dict[str, Any]:
    """Plain content of a recipe file, which joins ``children``, laid over the one that it ``extends``."""
    if not path.is_file():
        raise ConfigError(f"recipe file {str(path)!r} does not exist")
    if path.resolve() in [child.resolve() for child in children]:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(p.name for p in children)}")
    children.append(path)
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        got = "nothing" if raw is None else shortened(repr(raw))
        raise ConfigError(f"{path}: expected sections such as data and training, got {got}")
    if (base := raw.pop("extends", None)) is None:
        return raw
    if len(children) - 1 > _FILES:
        raise ConfigError(f"{path} extends a file that extends another, more than {_FILES} times")
    below = _read(path.parent / str(base), children)
    below.pop("name", None)  # a name is the file's own
    return _over(below, raw)


def _over(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``: mappings merge by key, a component of another name replaces the old."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "name" in above and above["name"] != below.get("name", above["name"]):
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}


def make_config(raw: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Config:
    """A config from plain data and overrides; see ``load_config``."""
    merged = dict(raw)
    for override in overrides:
        merged = _override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(explained(problem, where, Config) for problem in error.errors())
        ) from None


def save_config(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_packaged_recipe(path: Path, overrides: Sequence[str]) -> None:
    """Write the packaged recipe of the name of ``path`` there, with overrides, its settings resolved."""
    packaged = Path(str(files("robusthash.apps").joinpath("recipes", path.name)))
    write_text(path, save_config(load_config(packaged, overrides)))


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """``training.epochs=2`` set in a copy of ``raw``; a component that is a bare name can take options."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes section.key=value, got {override!r}")
    value = value_of(text, f"--set {path}") if text else None

    def place(node: Any, keys: list[str]) -> Any:
        if not keys:
            return value
        if isinstance(node, list):
            if not keys[0].isdigit() or int(keys[0]) >= len(node):
                raise ConfigError(f"--set {override}: {keys[0]!r} is not a position in a list of {len(node)}")
            return [place(item, keys[1:]) if i == int(keys[0]) else item for i, item in enumerate(node)]
        node = {"name": node} if isinstance(node, str) else dict(node or {})
        return {**node, keys[0]: place(node.get(keys[0]), keys[1:])}

    return place(raw, keys)
