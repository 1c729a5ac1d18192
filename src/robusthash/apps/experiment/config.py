"""The typed experiment config: YAML in and out, overrides by path, errors that name the field."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import nn

from robusthash.attacks.base import Attack
from robusthash.core.registry import build, check, nearest
from robusthash.core.runtime import digest
from robusthash.defenses.base import check_needs
from robusthash.training.optimiser_groups import BASE, MODALITIES, NAMES, unknown, unset

_FRACTION = re.compile(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*/\s*([\d.]+)\s*")
_EXPONENT = re.compile(r"[+-]?\d+(?:\.\d*)?[eE][+-]?\d+")


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field and the remedy."""


def numbers(value: Any) -> Any:
    """``"8/255"`` and ``"1e-4"`` (a string to YAML 1.1) become floats, at any depth."""
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item) for item in value]
    if isinstance(value, str):
        if found := _FRACTION.fullmatch(value):
            return float(found[1]) / float(found[2])
        if _EXPONENT.fullmatch(value):
            return float(value)
    return value


def value_of(text: str) -> Any:
    """A value of the command line, as a recipe would hold it.

    Raises:
        ConfigError: not YAML; one line.
    """
    try:
        return numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"not valid YAML: {text!r} ({said})") from None


def _component(kind: str) -> Any:
    """A field that holds ``name`` or ``{name: ..., options}`` of a registered kind, checked against its
    signature."""

    def known(value: dict[str, Any] | str) -> dict[str, Any] | str:
        try:
            check(kind, value)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        return value

    return Annotated[dict[str, Any] | str, BeforeValidator(numbers), AfterValidator(known)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HasherSection(Section):
    """Which hasher: bits, encoders, head."""

    bits: int = Field(32, ge=1)
    image: _component("image-encoder") | None = "small"  # type: ignore[valid-type]
    text: _component("text-encoder") | None = None  # type: ignore[valid-type]
    head: _component("head") = "tanh"  # type: ignore[valid-type]
    purifiers: dict[str, _component("purifier")] = {}  # type: ignore[valid-type]
    sides: Literal["query", "both"] = "both"  # what purifiers purify

    def plain(self) -> dict[str, Any]:
        """Plain data, without what a hasher that purifies nothing has no use for."""
        return self.model_dump(mode="json", exclude=None if self.purifiers else {"purifiers", "sides"})


class OptimSection(Section):
    """One optimiser group. ``lr`` 0 freezes ``hasher`` or a part of it, BatchNorm statistics included."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, BeforeValidator(numbers)] = Field(0.01, ge=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: Annotated[float, BeforeValidator(numbers)] = Field(5e-4, ge=0)


class ScheduleSection(Section):
    """Learning-rate factor over training."""

    kind: Literal["constant", "cosine", "steps", "exponential"] = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1)
    at: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1


def _filled(groups: Any) -> Any:
    """Settings of parts of the hasher, each laid over those of ``hasher``."""
    whole = groups.get(BASE, {}) if isinstance(groups, Mapping) else None
    whole = whole.model_dump() if isinstance(whole, OptimSection) else whole
    if not isinstance(whole, Mapping):
        return groups  # what is wrong with it, the fields say
    parts = {name: given for name, given in groups.items() if name in NAMES and isinstance(given, Mapping)}
    return {**groups, **{name: {**whole, **given} for name, given in parts.items()}}


class TrainingSection(Section):
    """How the model is trained. A recipe says by its signature whether it needs an ``attack`` and an
    ``outer``.

    ``optim`` holds the settings of each optimiser group: ``hasher``, where there are any ``critic``,
    ``purifier``, ``guide``, and if wanted parts of the hasher (``training.groups``), which take from
    ``hasher`` what they leave out.
    """

    recipe: _component("recipe") = "hashing"  # type: ignore[valid-type]
    objective: _component("objective") = "csq"  # type: ignore[valid-type]
    outer: _component("outer") | None = None  # type: ignore[valid-type]
    attack: _component("attack") | None = None  # type: ignore[valid-type]
    optim: Annotated[dict[str, OptimSection], BeforeValidator(_filled)] = {"hasher": OptimSection()}
    schedule: ScheduleSection = ScheduleSection()
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=1)
    augment: Literal["none", "flip-crop"] = "none"
    clip: float = Field(0.0, ge=0)
    precision: Literal["float32", "bf16"] = "float32"
    init_from: str | None = None  # a run directory, or the recipe file of a run to make first

    @model_validator(mode="after")
    def _whole(self) -> TrainingSection:
        made, _ = check("recipe", self.recipe)
        accepted = inspect.signature(made.make).parameters
        for key in ("attack", "outer"):
            given = getattr(self, key) is not None
            if key in accepted and accepted[key].default is inspect.Parameter.empty and not given:
                raise ValueError(f"recipe {made.name!r} needs {key!r}")
            if key not in accepted and given:
                raise ValueError(
                    f"recipe {made.name!r} takes no {key!r}; adversarial training is recipe: adversarial"
                )
        groups: tuple[str, ...] | None = getattr(made.make, "groups", None)
        self._check_groups(groups)
        self._check_attack(learns="guide" in (groups or ()))
        return self

    def _check_groups(self, groups: tuple[str, ...] | None) -> None:
        """``optim`` against the groups that the recipe may have; which others than the first it has, the loop
        knows."""
        if groups is not None and groups[0] not in self.optim:
            raise ValueError(unset(groups[0]))
        for name, optim in self.optim.items():
            if groups is not None and name not in (*groups, BASE) and not (name in NAMES and BASE in groups):
                raise ValueError(unknown(name, [*groups, *(NAMES if BASE in groups else ())]))
            if optim.lr == 0 and name not in (BASE, *NAMES):
                raise ValueError(
                    f"optim.{name}.lr is 0, which freezes parts of the hasher and no other group"
                )

    def _check_attack(self, learns: bool) -> None:
        """That the inner attack gives what the outer loss needs, and has settings where its guide
        ``learns``."""
        attack = self.inner_attack()
        if attack is None:
            return
        if learns and isinstance(attack.guide, nn.Module) and "guide" not in self.optim:
            raise ValueError(unset("guide"))
        if self.outer is not None:
            try:
                outer = build("outer", self.outer)
            except KeyError as error:  # a name inside of its options
                raise ValueError(error.args[0]) from None
            check_needs(attack, outer, build("objective", self.objective))

    def inner_attack(self) -> Attack | None:
        """The inner attack, made without data.

        Raises:
            ValueError: options that it does not take.
        """
        if self.attack is None:
            return None
        try:
            return build("attack", self.attack, objective=build("objective", self.objective))
        except KeyError as error:  # a name inside of its options
            raise ValueError(error.args[0]) from None


class EvaluationSection(Section):
    """What is measured: a protocol, and attacks each evaluated alone and in the worst case per query.

    Every direction is evaluated under the attacks that change its query modality, and by every relevance:
    ``own`` are the data set's own, other names its other label systems.
    """

    protocol: _component("protocol") = "house"  # type: ignore[valid-type]
    attacks: list[_component("attack")] = []  # type: ignore[valid-type]
    oblivious: list[_component("attack")] = []  # type: ignore[valid-type]  # gradients of the hasher without purifiers
    identity: list[_component("attack")] = []  # type: ignore[valid-type]  # purifiers' gradients taken to be the identity
    directions: list[Literal["I2I", "I2T", "T2I", "T2T"]] | None = (
        None  # the hasher's first modality both ways
    )
    relevance: list[str] = ["own"]
    queries: int | None = Field(None, ge=1)  # chosen by content as in `assess`; all by default
    batch_size: int = Field(250, ge=1)
    seed: int = 0

    @field_validator("protocol")
    @classmethod
    def _usable(cls, protocol: dict[str, Any] | str) -> dict[str, Any] | str:
        try:
            build("protocol", protocol)  # its values are checked where it is made, which costs nothing
        except TypeError as error:
            raise ValueError(str(error)) from None
        return protocol


class RuntimeSection(Section):
    """Where it runs."""

    seed: int = 0
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    keep_epochs: int | None = Field(
        None, ge=1
    )  # keep the weights after every so many epochs, for `curves --robust`


class Config(Section):
    """One experiment, from data to index."""

    name: str = Field(pattern=r"^[\w.-]+$")
    data: _component("data") = "photos"  # type: ignore[valid-type]
    hasher: HasherSection = HasherSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _whole(self) -> Config:
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
                    f"the inner attack {attack.name!r} changes {modality}s, and this hasher encodes none: set "
                    f"hasher.{modality}, or take another training.attack"
                )
        return self

    def model_id(self, ancestor: str = "") -> str:
        """Digest of all that makes the trained model: data, hasher, training, seed, and the run it started
        from."""
        training = self.training.model_dump(mode="json", exclude={"init_from"})
        made = {"data": self.data, "hasher": self.hasher.plain(), "training": training}
        return digest([made, self.runtime.seed, ancestor], 10)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: a file that is not there or not YAML, an unknown key (the nearest is offered), a bad
            value.
    """
    raw = _read(Path(path))
    raw.setdefault("name", Path(path).stem)
    return make_config(raw, overrides, where=str(path))


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain content of a recipe file, laid over the one that its ``extends`` names."""
    if not path.is_file():
        raise ConfigError(f"recipe file {str(path)!r} does not exist")
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(str(p.name) for p in above)}")
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections, got {type(raw).__name__}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    below = _read(path.parent / str(base), (*above, path.resolve()))
    below.pop("name", None)  # a name is the file's own
    return _over(below, raw)


def _over(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``: mappings merge by key, but a component of another name replaces the old
    one."""
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
        raise ConfigError("\n".join(_explain(problem, where) for problem in error.errors())) from None


def save_config(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """``training.epochs=2`` set in a copy of ``raw``; a component given by name alone is opened to take
    options."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes section.key=value, got {override!r}")
    value = value_of(text) if text else None

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


def _explain(problem: Mapping[str, Any], where: str) -> str:
    """One pydantic error in a line that offers the nearest key."""
    place = [str(part) for part in problem["loc"] if "function-" not in str(part) and part not in ("str",)]
    place = [part for part in place if not part.startswith("dict[")]
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in place[:-1]:
            section = (
                section.model_fields[part].annotation
                if part in getattr(section, "model_fields", {})
                else None
            )
        known = getattr(section, "model_fields", OptimSection.model_fields)
        return f"{where}: unknown key {'.'.join(place)!r}{nearest(place[-1], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    whole = isinstance(given, Mapping) and not (
        place and "name" in given
    )  # a section, which would hide the message
    return f"{where}: {'.'.join(place) or 'config'}: {message}" + ("" if whole else f" (got {given!r})")
