"""What an evidence bundle is on disk: its manifest, and the reading of files that nobody has vouched for
yet."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from robusthash.attacks.threat_model import Ball, Budget, Edits, Knowledge, Threat
from robusthash.robustness.evidence.records import Record, read_record

SCHEMA = "robusthash.evidence/1"


class ThreatRecord(Record):
    """A threat on one modality as plain data. ``eps`` is in input units: 8/255, or a number of words for
    ``flips``."""

    name: str
    version: int = 1
    modality: str
    norm: Literal["linf", "l2", "l1", "flips"]
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    knowledge: Knowledge = "W2"

    def threat(self) -> Threat:
        """The threat that the numbers make.

        Raises:
            ValueError: another version, or a name that its numbers do not have.
        """
        if self.version != 1:
            raise ValueError(
                f"threat.version {self.version} is unknown; this version reads threats of version 1"
            )
        ball: Budget = Edits(self.eps) if self.norm == "flips" else Ball(self.norm, self.eps, self.bounds)
        made = Threat({self.modality: ball}, self.knowledge)
        if made.name != self.name:
            raise ValueError(
                f"threat.name {self.name!r} does not fit its numbers, which are those of {made.name!r}"
            )
        return made


class Manifest(Record):
    """What a bundle says of itself. Nothing of it is believed without a check but who made it."""

    threat: ThreatRecord
    model: str = ""  # what its maker calls it
    weights: str  # ``weights_digest`` of the victim
    codes: str  # digest of the database codes that it was made against
    database: str  # fingerprint of the database split
    direction: tuple[str, str]
    bits: int
    queries: int
    attack: str = "unnamed"
    budget: str = ""
    claimed: dict[str, float]
    tool: str
    files: dict[str, str]  # name -> sha256


@dataclass(frozen=True)
class Bundle:
    """A bundle that is whole: files as the manifest says, arrays of the right type. Read, not yet
    believed."""

    folder: Path
    manifest: Manifest
    ids: tuple[str, ...]
    inputs: np.ndarray  # (n, ...) float32, mapped from disk
    codes_8bit: np.ndarray | None  # (n, 3, H, W) uint8; None where the inputs are no pictures
    digest: str  # of the manifest, and by its list of files of everything else


def read_bundle(folder: str | Path) -> Bundle:
    """A bundle whose files are whole; everything that can be told without the victim.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: another schema, a damaged or truncated file, a wrong type; the field is named.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no evidence bundle: it has no manifest.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    manifest = read_record(Manifest, raw, SCHEMA, str(path))
    pictures = manifest.threat.modality == "image" and "inputs-8bit.npy" in manifest.files
    for name in ["inputs.npy", "ids.json", *["inputs-8bit.npy"] * pictures]:
        if name not in manifest.files:
            raise ValueError(f"{path}: files lists no {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is truncated: {name} is missing")
        if sha256_of(folder / name) != manifest.files[name]:
            raise ValueError(
                f"{folder / name} is truncated or changed: its sha256 is not that of files[{name!r}]"
            )
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise ValueError(f"{folder / 'ids.json'} must be a list of content hashes")
    if len(ids) != manifest.queries:
        raise ValueError(
            f"{folder / 'ids.json'} holds {len(ids)} ids, and the manifest says queries {manifest.queries}"
        )
    inputs = _array(folder / "inputs.npy", np.float32, len(ids))
    codes_8bit = _array(folder / "inputs-8bit.npy", np.uint8, len(ids)) if pictures else None
    digest = sha256_of(path)[:12]
    return Bundle(folder, manifest, tuple(ids), inputs, codes_8bit, digest)


def sha256_of(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _array(path: Path, dtype: type[np.generic], rows: int) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no array: {error}") from None
    if found.dtype != dtype:
        raise ValueError(f"{path}: dtype is {found.dtype}, and must be {np.dtype(dtype)}")
    if found.ndim == 0 or len(found) != rows or math.prod(found.shape) == 0:
        raise ValueError(f"{path}: shape {found.shape} for {rows} ids; the bundle is truncated or empty")
    return found
