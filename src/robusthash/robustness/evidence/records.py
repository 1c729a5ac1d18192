"""Records that others send in, manifests of bundles and registry entries; errors name the field.

Entries of hashes for copies have no run and no MAP: measured recall, radii and proofs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robusthash.attacks.threat_model import Ball, Budget, Edits, Knowledge, Threat
from robusthash.core.limited_files import read_yaml
from robusthash.core.registry import nearest
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult
from robusthash.models.hasher import Defense

BUNDLE_SCHEMA = "robusthash.evidence/1"
ENTRY_SCHEMA = "robusthash.entry/1"

SAME_WEIGHTS_TOLERANCE = 0.02
"""Largest tolerance of an entry about weights that it names; other hardware rounds, and no more."""

MOST_TOLERANCE = 0.05
"""Largest tolerance of an entry that is trained again: more would pass another model."""


class SentRecord(BaseModel):
    """Plain data that others send in: cannot be changed, and refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Sent = TypeVar("Sent", bound=SentRecord)


def read_record(kind: type[Sent], raw: Any, schema: str, where: str) -> Sent:
    """Validate plain data from the file ``where`` as a record of ``kind``.

    Raises:
        ValueError: another schema, a missing or unknown field, a bad value; every fault in a line of its own.
    """
    if not isinstance(raw, dict) or "schema" not in raw:
        raise ValueError(f"{where}: names no schema; this version reads {schema!r}")
    if raw["schema"] != schema:
        raise ValueError(f"{where}: schema {raw['schema']!r} is not {schema!r}, which this version reads")
    try:
        return kind.model_validate({key: value for key, value in raw.items() if key != "schema"})
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, problem, where) for problem in error.errors())) from None


def _explain(kind: type[SentRecord], problem: Any, where: str) -> str:
    *sections, name = [str(part) for part in problem["loc"]] or ["record"]
    place = ".".join([*sections, name])
    if problem["type"] == "missing":
        return f"{where}: the field {place!r} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown field {place!r}{nearest(name, _fields(kind, sections))}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {place}: {message} (got {problem['input']!r})"


def _fields(kind: Any, sections: list[str]) -> Mapping[str, Any]:
    """The fields of the record at a place within a record; the numbers of items of a list are no steps."""
    for part in sections:
        if not part.isdigit():
            kind = kind.model_fields[part].annotation
            kind = next((each for each in get_args(kind) if hasattr(each, "model_fields")), kind)
    fields: Mapping[str, Any] = kind.model_fields
    return fields


class ThreatRecord(SentRecord):
    """A threat on one modality. ``eps`` is in input units: 8/255, or a number of words for ``flips``."""

    name: str
    version: Literal[1] = 1
    modality: str
    norm: Literal["linf", "l2", "l1", "flips"]
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    knowledge: Knowledge = "W2"

    @classmethod
    def of(cls, threat: Threat) -> ThreatRecord:
        ((modality, ball),) = threat.balls.items()
        numbers = {"norm": ball.norm, "eps": ball.eps, "bounds": ball.bounds, "knowledge": threat.knowledge}
        return cls(name=threat.name, modality=modality, **numbers)

    def threat(self) -> Threat:
        """The threat that the numbers make; ValueError where it has another name."""
        ball: Budget = Edits(self.eps) if self.norm == "flips" else Ball(self.norm, self.eps, self.bounds)
        threat = Threat({self.modality: ball}, self.knowledge)
        if threat.name != self.name:
            numbers = f"its numbers, which are those of {threat.name!r}"
            raise ValueError(f"threat.name {self.name!r} does not fit {numbers}")
        return threat


class Manifest(SentRecord):
    """The description of a bundle by its maker. Nothing of it counts without a check."""

    threat: ThreatRecord
    model: str = ""  # the maker's name for it
    weights: str  # ``weights_digest`` of the victim
    codes: str  # digest of the database codes that it was made against
    database: str  # fingerprint of the database split
    direction: tuple[Literal["image", "text"], Literal["image", "text"]]
    bits: int
    queries: int
    attack: str = "unnamed"
    budget: str = ""
    claimed: dict[str, float]
    tool: str
    files: dict[str, str]  # name -> sha256


class ModelSource(SentRecord):
    """Recipe, overrides and seed that make the model again."""

    recipe: str  # file below recipes/
    set: tuple[str, ...] = ()  # overrides, as ``--set`` takes them
    seed: int
    digest: str = ""  # of the weights, where the claim is about these very weights


class Restrictions(SentRecord):
    """Properties that an entry declares of its model, and its evaluation relies on."""

    gradients: bool  # non-zero, through the whole model
    deterministic: bool
    no_inner_optimisation: bool
    static_database: bool  # database codes do not depend on the query


class Claimed(SentRecord):
    """Values on one threat, as a mean over all queries of the entry's evaluation."""

    tier: str = "recipe"  # ``recipe``: the attacks of the recipe's evaluation; else a tier of the suite
    threat: str
    queries: int = Field(ge=1)
    measure: str = "MAP"
    clean: float = Field(ge=0, le=1)
    worst: float = Field(ge=0, le=1)
    tolerance: float = Field(0.01, gt=0, le=MOST_TOLERANCE)


class BestKnown(SentRecord):
    """The lowest worst-case value that anyone has shown, and its source."""

    value: float = Field(ge=0, le=1)
    source: str  # ``own``, or the id of an evidence bundle


class RegistryEntry(SentRecord):
    """One model of the registry."""

    id: str = Field(pattern=r"^\w[\w.-]{0,119}$")
    title: str = ""
    source: ModelSource
    data: str
    input_size: tuple[int, ...]
    bits: int = Field(ge=1)
    training_threat: str = ""
    training_attack: str = ""
    defense: Defense
    restrictions: Restrictions
    claimed: Claimed
    best_known: BestKnown
    unreliable: str = ""  # the reason why no robustness number of it may be trusted, if there is one

    @model_validator(mode="after")
    def _sound(self) -> RegistryEntry:
        claimed = self.claimed
        if self.source.digest and claimed.tolerance > SAME_WEIGHTS_TOLERANCE:
            raise ValueError(
                f"claimed.tolerance {claimed.tolerance} is too large where source.digest names the weights: "
                f"an evaluation of the same weights repeats within {SAME_WEIGHTS_TOLERANCE}"
            )
        if claimed.worst > claimed.clean:
            raise ValueError(f"claimed.worst {claimed.worst} is above claimed.clean {claimed.clean}")
        if self.best_known.value > claimed.worst + claimed.tolerance:
            raise ValueError(
                f"best_known.value {self.best_known.value} is above claimed.worst {claimed.worst}"
            )
        return self


def load_entry(path: str | Path) -> RegistryEntry:
    """Read an entry; its file is called by its id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, another schema, an unknown or missing field, a bad value; each is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"registry entry {str(path)!r} does not exist")
    entry = read_record(RegistryEntry, read_yaml(path), ENTRY_SCHEMA, str(path))
    if entry.id != path.stem:
        raise ValueError(f"{path}: id is {entry.id!r}; name the file {entry.id}.yaml")
    return entry


def entry_text(entry: RegistryEntry) -> str:
    """The entry as the YAML that ``load_entry`` reads."""
    return yaml.safe_dump(
        {"schema": ENTRY_SCHEMA, **entry.model_dump(mode="json")}, sort_keys=False, width=120
    )


@dataclass(frozen=True)
class Verified:
    """The values of a fresh run, and the faults of an entry that they show."""

    clean: float
    worst: float
    faults: tuple[str, ...]  # empty where the entry holds

    def check(self) -> None:
        """Raise ValueError with every fault, where the entry does not hold."""
        if self.faults:
            raise ValueError("the entry does not hold: " + "; ".join(self.faults))


def verify(entry: RegistryEntry, results: Mapping[str, EvalResult]) -> Verified:
    """Compare an entry with results ``clean`` and ``worst`` of its tier, made again.

    A value outside of the tolerance on either side is a fault: below, the model is weaker than claimed;
    above, the claim was not reproduced.
    """
    worst, claimed, tolerance = results["worst"], entry.claimed, entry.claimed.tolerance
    low = MeasureKey.parse(claimed.measure).name("worst")
    measured = {"clean": results["clean"][claimed.measure], "worst": worst[low]}
    faults = [
        f"claimed.{name} is {getattr(claimed, name):.4f}, measured {value:.4f}, tolerance {tolerance:g}"
        for name, value in measured.items()
        if abs(value - getattr(claimed, name)) > tolerance
    ]
    facts = {
        "bits": (entry.bits, worst.setting.bits),
        "defense": (entry.defense, worst.setting.defense),
        "claimed.threat": (claimed.threat, worst.setting.threat),
        "claimed.queries": (claimed.queries, len(worst.per_query[low])),
        "source.digest": (
            entry.source.digest,
            worst.setting.digests.get("model", "") if entry.source.digest else "",
        ),
    }
    faults += [f"{name} is {a!r}, found {b!r}" for name, (a, b) in facts.items() if a != b]
    if measured["worst"] < entry.best_known.value - claimed.tolerance:
        faults.append(
            f"best_known.value is {entry.best_known.value:.4f}, and this run found {measured['worst']:.4f}"
        )
    if worst.unreliable and not entry.unreliable:
        red = ", ".join(flag.id for flag in worst.flags if flag.level == "red")
        faults.append(f"red flags {red} were raised, and the entry carries no 'unreliable'")
    return Verified(measured["clean"], measured["worst"], tuple(faults))


COPY_SCHEMA = "robusthash.copy-entry/1"

Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Level = Annotated[int, Field(ge=1, le=255)]
"""Of 255, by which every value of an image may change."""


class WithinRadius(SentRecord):
    """Shares of photographs, or of pairs, within the radius of a rate of false matches."""

    rate: float = Field(gt=0, lt=1)  # the radius is the largest with no more false matches
    radius: int = Field(ge=-1)  # -1 where more pairs than that have the very same hash
    false_matches: Share  # of all pairs, within the radius
    changes: dict[str, Share]  # recall by everyday change
    attacked: dict[Level, dict[str, Share]] = Field({})  # by level: recall by attack, and ``collisions``
    through_resizing: dict[Level, dict[str, Share]] = Field({})  # the same, where the file is attacked
    certified: dict[Level, Share] = Field({})  # by level: share that no change moves out of the radius


class CopyClaim(SentRecord):
    """Measurements of the hash of one length."""

    bits: int = Field(ge=8, multiple_of=8)
    pairs: int = Field(ge=1)  # of different photographs, by which the radii were chosen
    within: tuple[WithinRadius, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> CopyClaim:
        for each in self.within:
            if each.radius >= self.bits:
                raise ValueError(f"radius {each.radius} is no distance of {self.bits} bits")
            if each.radius >= 0 and each.false_matches > each.rate:
                raise ValueError(f"false_matches {each.false_matches:g} are above the rate {each.rate:g}")
        return self

    @property
    def strictest(self) -> WithinRadius:
        """The radius of the lowest rate, which is that of the package."""
        return min(self.within, key=lambda each: each.rate)


class PhotographRecord(SentRecord):
    """Hashes and proofs of the twenty packaged photographs, which need no other data to be computed again."""

    hashes: dict[str, str]  # name of the photograph -> hex digits of the longest hash
    certified: dict[int, dict[Level, Share]]  # by bits and level, within the radius of the strictest rate


class CopyEntry(SentRecord):
    """One hash for copies of the registry."""

    id: str = Field(pattern=r"^\w[\w.-]{0,119}$")
    title: str = ""
    model: str  # packaged name or folder, as ``rh.load`` takes it
    weights: Digest  # sha256 of the file of the weights
    config: Digest  # sha256 of config.json
    licence: str
    data: str  # that the weights were made of
    method: str  # and the script that makes them
    evidence: str  # file of the measurements that the claims are read from
    claims: tuple[CopyClaim, ...] = Field(min_length=1)
    photographs: PhotographRecord
    limits: tuple[str, ...] = ()


def load_any_entry(path: str | Path) -> RegistryEntry | CopyEntry:
    """Read an entry of either kind; see ``load_entry``, whose errors it raises."""
    path = Path(path)
    raw = read_yaml(path) if path.is_file() else None
    if not isinstance(raw, dict) or raw.get("schema") != COPY_SCHEMA:
        return load_entry(path)
    entry = read_record(CopyEntry, raw, COPY_SCHEMA, str(path))
    if entry.id != path.stem:
        raise ValueError(f"{path}: id is {entry.id!r}; name the file {entry.id}.yaml")
    return entry


def copy_entry_text(entry: CopyEntry) -> str:
    """The entry as the YAML that ``load_any_entry`` reads."""
    fields = entry.model_dump(exclude_defaults=True)
    return yaml.safe_dump({"schema": COPY_SCHEMA, **fields}, sort_keys=False, width=110)
