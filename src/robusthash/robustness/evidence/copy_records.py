"""Registry entries of hashes for copies, which have no run and no MAP: measured recall, radii and proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, model_validator

from robusthash.core.limited_files import read_yaml
from robusthash.robustness.evidence.records import RegistryEntry, SentRecord, load_entry, read_record

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
