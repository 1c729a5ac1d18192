"""Registry entries: the card of a model with the robustness that is claimed of it, and the check of that
claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import Field, field_validator, model_validator

from robusthash.metrics.results import EvalResult
from robusthash.models.hasher import Defense
from robusthash.robustness.evidence.records import Record, read_record

SCHEMA = "robusthash.entry/1"


class Source(Record):
    """How to make the model again."""

    recipe: str  # file below recipes/
    set: tuple[str, ...] = ()  # overrides, as ``--set`` takes them
    seed: int
    digest: str = ""  # of the weights, where the claim is about these very weights


class Restrictions(Record):
    """What an entry declares of its model, and its evaluation relies on."""

    gradients: bool  # non-zero, through the whole model
    deterministic: bool
    no_inner_optimisation: bool
    static_database: bool  # database codes do not depend on the query


class Claimed(Record):
    """Values on one threat, as a mean over all queries of the entry's evaluation."""

    tier: str = "recipe"  # ``recipe``: the attacks of the recipe's evaluation; else a tier of the suite
    threat: str
    queries: int = Field(ge=1)
    measure: str = "MAP"
    clean: float = Field(ge=0, le=1)
    worst: float = Field(ge=0, le=1)
    tolerance: float = Field(0.01, gt=0, lt=1)


class BestKnown(Record):
    """The lowest worst-case value that anyone has shown, and who."""

    value: float = Field(ge=0, le=1)
    source: str  # ``own``, or the id of an evidence bundle


class Entry(Record):
    """One model of the registry."""

    id: str = Field(pattern=r"^[\w.-]+$")
    title: str = ""
    source: Source
    data: str
    input_size: tuple[int, ...]
    bits: int = Field(ge=1)
    training_threat: str = ""
    training_attack: str = ""
    defense: str
    restrictions: Restrictions
    claimed: Claimed
    best_known: BestKnown
    unreliable: str = (
        ""  # why no robustness number of it may be trusted; "" where nothing speaks against them
    )

    @field_validator("defense")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in get_args(Defense):
            raise ValueError(f"is none of {', '.join(get_args(Defense))}")
        return value

    @model_validator(mode="after")
    def _sound(self) -> Entry:
        if self.claimed.worst > self.claimed.clean:
            raise ValueError(
                f"claimed.worst {self.claimed.worst} is above claimed.clean {self.claimed.clean}"
            )
        if self.best_known.value > self.claimed.worst + self.claimed.tolerance:
            raise ValueError(
                f"best_known.value {self.best_known.value} is above claimed.worst {self.claimed.worst}"
            )
        return self


def load_entry(path: str | Path) -> Entry:
    """Read an entry; its file is called by its id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, another schema, an unknown or missing field, a bad value; each is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"registry entry {str(path)!r} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    entry = read_record(Entry, raw, SCHEMA, str(path))
    if entry.id != path.stem:
        raise ValueError(f"{path}: id is {entry.id!r}; name the file {entry.id}.yaml")
    return entry


def load_entries(folder: str | Path) -> dict[str, Entry]:
    """Every entry of a folder, by id.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    found = {path.stem: load_entry(path) for path in sorted(Path(folder).glob("*.yaml"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no registry entry (*.yaml)")
    return found


def entry_text(entry: Entry) -> str:
    """The entry as the YAML that ``load_entry`` reads."""
    plain: dict[str, Any] = {"schema": SCHEMA, **entry.model_dump(mode="json")}
    return yaml.safe_dump(plain, sort_keys=False, width=120)


@dataclass(frozen=True)
class Verified:
    """What a fresh run says of an entry."""

    clean: float
    worst: float
    faults: tuple[str, ...]  # empty where the entry holds

    def check(self) -> None:
        """Raise where the entry does not hold.

        Raises:
            ValueError: with every fault.
        """
        if self.faults:
            raise ValueError("the entry does not hold: " + "; ".join(self.faults))


def verify(entry: Entry, run: Callable[[Entry], Mapping[str, EvalResult]]) -> Verified:
    """Run the evaluation of an entry again and compare.

    A value outside of the tolerance on either side is a fault: below, the model is weaker than claimed;
    above, the claim was not reproduced.

    Args:
        run: entry -> results with ``clean`` and ``worst``, made by the tier that the entry names.
    """
    results = run(entry)
    clean, worst = results["clean"], results["worst"]
    claimed = entry.claimed
    found = {"clean": clean[claimed.measure], "worst": worst[f"w{claimed.measure}"]}
    faults = []
    for name, value in found.items():
        wanted = getattr(claimed, name)
        if abs(value - wanted) > claimed.tolerance:
            faults.append(
                f"claimed.{name} is {wanted:.4f}, measured {value:.4f}, tolerance {claimed.tolerance:g}"
            )
    count = len(worst.per_query[f"w{claimed.measure}"])
    digest = worst.setting.digests.get("model", "")
    facts = {
        "bits": (entry.bits, worst.setting.bits),
        "defense": (entry.defense, worst.setting.defense),
        "claimed.threat": (claimed.threat, worst.setting.threat),
        "claimed.queries": (claimed.queries, count),
        "source.digest": (entry.source.digest, digest if entry.source.digest else ""),
    }
    faults += [f"{name} is {said!r}, found {seen!r}" for name, (said, seen) in facts.items() if said != seen]
    if found["worst"] < entry.best_known.value - claimed.tolerance:
        faults.append(
            f"best_known.value is {entry.best_known.value:.4f}, and this run found {found['worst']:.4f}"
        )
    if worst.unreliable and not entry.unreliable:
        red = ", ".join(flag.id for flag in worst.flags if flag.level == "red")
        faults.append(f"red flags {red} stand, and the entry carries no 'unreliable'")
    return Verified(found["clean"], found["worst"], tuple(faults))
