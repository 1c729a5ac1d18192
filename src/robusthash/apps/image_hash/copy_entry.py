"""The registry entry of a hash for copies: written from its measurements, and verified."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.apps.experiment.search_model import SearchModel, load
from robusthash.apps.image_hash.copy_hash import NAME, RADIUS, withstand
from robusthash.core.limited_files import read_json, read_text
from robusthash.core.runtime import Progress, packaged, silent
from robusthash.data.base import as_input
from robusthash.data.own_data import OneImage, one_image
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.models.saved_hasher import HUB
from robusthash.robustness.evidence.records import CopyClaim, CopyEntry, PhotographRecord, WithinRadius

LIMITS = (
    "The central square of a picture is hashed; what lies next to it plays no part.",
    "Mirrored copies, and the same thing photographed twice, are not found.",
    "The radii are of photographs such as those that they were measured on.",
    "Recall under attack is an upper bound, by the attacks that were tried on a few photographs. Certified "
    "shares are proofs, of the square after the resizing and not of the file.",
)


@dataclass(frozen=True)
class EntryCheck:
    """One line of a verification: the thing that is checked, and what was found."""

    name: str
    status: Literal["pass", "fail", "not checked"]
    found: str

    @classmethod
    def of(cls, name: str, holds: bool, found: str) -> EntryCheck:
        return cls(name, "pass" if holds else "fail", found)


@dataclass(frozen=True)
class VerifiedCopies:
    """The checks of an entry, in order."""

    checks: tuple[EntryCheck, ...]

    def check(self) -> None:
        """Raise ValueError with the names of the checks that failed, and what the first found."""
        faults = [each for each in self.checks if each.status == "fail"]
        if faults:
            others = "".join(f"; {each.name}" for each in faults[1:])
            raise ValueError(f"the entry does not hold: {faults[0].name}: {faults[0].found}{others}")


# ------------------------------------------------------------------------------------------------- writing


def copy_entry_of(measured: Path, model: str = NAME) -> CopyEntry:
    """The entry of a hash for copies: digests and card of its folder, and its rows of the measurements.

    Args:
        measured: JSON file of ``scripts/measure_copy_hash.py``.
        model: ``copy-hash``, the packaged one, or a folder that ``save_pretrained`` wrote.

    Raises:
        RunError: no such model, or damaged weights.
        ValueError: a file without its measurements, a radius that is not that of the package, or a README.md
            of other weights.
    """
    claims = claims_in(measured)
    if other := [name for name, holds, _ in _radii(claims) if not holds]:
        raise ValueError(f"{measured}: the {other[0]} is not that of the package; measure these weights")
    searched, folder = load(model, "cpu"), packaged(model)
    return CopyEntry(
        id=Path(model).name,
        title=f"hash for copies, {', '.join(str(claim.bits) for claim in claims)} bits",
        model=model,
        weights=_sha256(folder / HUB.weights),
        config=_sha256(folder / HUB.card),
        **_about(folder, searched.origin),
        evidence=measured.as_posix(),
        claims=claims,
        photographs=PhotographRecord(hashes=photograph_hashes(searched), certified=_proofs(searched, claims)),
        limits=LIMITS,
    )


def claims_in(measured: Path) -> tuple[CopyClaim, ...]:
    """The claims that measurements make of the hash for copies, longest first.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not hold them.
    """
    rows = read_json(measured)
    try:
        own = [row for row in rows.values() if row["title"] == NAME]
        claims = [_claim(row) for row in own]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{measured} holds no measurements by scripts/measure_copy_hash.py: {error}"
        ) from None
    if not claims:
        raise ValueError(f"{measured} holds no measurement of {NAME}")
    return tuple(sorted(claims, key=lambda claim: -claim.bits))


def _claim(row: Mapping[str, Any]) -> CopyClaim:
    rates = sorted(row["radius"], key=float, reverse=True)
    attacked = {name: row.get(title, {}) for name, title in _UNDER_ATTACK.items()}
    within = [
        WithinRadius(
            rate=float(rate),
            radius=row["radius"][rate],
            false_matches=row["false matches"][rate],
            changes={change: recall[rate] for change, recall in row["changes"].items()},
            **(attacked if rate == rates[-1] else {}),  # attacks know the strictest radius, and so do proofs
        )
        for rate in rates
    ]
    return CopyClaim(bits=row["bits"], pairs=row["pairs"], within=tuple(within))


_UNDER_ATTACK = {"attacked": "attacked", "through_resizing": "through resizing", "certified": "certified"}


def _about(folder: Path, digest: str) -> dict[str, str]:
    """Licence, data and method by the README.md of a saved model."""
    path = folder / "README.md"
    text = read_text(path)
    rows = dict(_ROW.findall(text))
    if not {"data", "method", "licence"} <= set(rows):
        raise ValueError(f"{path} is no model card with data, method and licence; save the model again")
    if rows.get("digest") != digest:
        raise ValueError(f"{path} is of the weights {rows.get('digest')}, not {digest}; save the model again")
    return {key: re.sub(r"\\(.)", r"\1", rows[key]) for key in ("licence", "data", "method")}


_ROW = re.compile(r"^\| (\w+) \| (.+) \|$", re.MULTILINE)


# ----------------------------------------------------------------------------------------------- verifying


def verify_copy_entry(
    entry: CopyEntry, folder: Path | None = None, data: Path | None = None, progress: Progress = silent
) -> VerifiedCopies:
    """Check an entry against the model, the package and its evidence.

    Args:
        folder: of the weights, where they are not those that the entry names.
        data: folder of the files of ``entry_data``, by which weights, radii and recall are made again.

    Raises:
        FileNotFoundError, ValueError: ``data`` is no folder, or holds none of the files.
    """
    return VerifiedCopies(tuple(_checks(entry, folder, data, progress)))


def _checks(
    entry: CopyEntry, folder: Path | None, data: Path | None, progress: Progress
) -> Iterator[EntryCheck]:
    place = folder or packaged(entry.model)
    for name, file, claimed in (("weights", HUB.weights, entry.weights), ("config", HUB.card, entry.config)):
        found = _sha256(place / file) if (place / file).is_file() else f"no {place / file}"
        yield EntryCheck.of(name, found == claimed, f"sha256 {found}")
        if name == "weights" and found != claimed:
            yield EntryCheck("all else", "not checked", "the entry is of other weights")
            return
    for name, holds, text in _radii(entry.claims):
        yield EntryCheck.of(name, holds, text)
    yield _as_measured(entry)
    try:
        model = load(place.absolute(), "cpu")
    except (OSError, ValueError) as error:
        yield EntryCheck("model", "fail", str(error))
        return
    yield _as_in_card(entry, place, model.origin)
    yield from _on_photographs(entry, model)
    if data is None:
        yield EntryCheck("weights, radii and recall, made again", "not checked", "give --data")
    else:
        from robusthash.apps.image_hash.entry_data import checks_on_data

        yield from checks_on_data(entry, model, data, progress)
    yield EntryCheck("recall under attack", "not checked", "scripts/measure_copy_hash.py attacks again")


def _radii(claims: Iterable[CopyClaim]) -> Iterator[tuple[str, bool, str]]:
    """Name, truth and words of the radius of each length."""
    for claim in claims:
        own, measured = RADIUS.get(claim.bits), claim.strictest.radius
        found = f"{own} in the package, {measured} measured on {claim.pairs} pairs"
        yield f"radius of {claim.bits} bits", own == measured, found


def _as_measured(entry: CopyEntry) -> EntryCheck:
    """The claims compared with the evidence, where its file is here."""
    name, path = "claims", Path(entry.evidence)
    if not path.is_file():
        return EntryCheck(name, "not checked", f"{path} is not here")
    try:
        equal = claims_in(path) == entry.claims
    except ValueError as error:
        return EntryCheck(name, "fail", str(error))
    return EntryCheck.of(name, equal, f"{'those' if equal else 'not those'} of {path}")


def _as_in_card(entry: CopyEntry, folder: Path, digest: str) -> EntryCheck:
    """Licence, data and method compared with the README.md of the model."""
    name = "licence, data and method"
    if not (folder / "README.md").is_file():
        return EntryCheck(name, "not checked", f"{folder} has no README.md")
    try:
        about = _about(folder, digest)
    except ValueError as error:
        return EntryCheck(name, "fail", str(error))
    other = [key for key, value in about.items() if getattr(entry, key) != value]
    return EntryCheck.of(
        name, not other, f"{', '.join(other)} of README.md differ" if other else "those of README.md"
    )


def _on_photographs(entry: CopyEntry, model: SearchModel) -> Iterator[EntryCheck]:
    claimed, found = entry.photographs.hashes, photograph_hashes(model)
    other = sorted({*claimed, *found} - {name for name in claimed if found.get(name) == claimed[name]})
    text = f"{len(other)} of {len(found)} differ{': ' * bool(other)}{', '.join(other[:3])}"
    yield EntryCheck.of("hashes of the packaged photographs", not other, text)
    proofs = _proofs(model, entry.claims)
    for bits, shares in entry.photographs.certified.items():
        text = f"certified {shares_text(proofs.get(bits, {}))}"
        yield EntryCheck.of(f"packaged photographs, {bits} bits", proofs.get(bits) == shares, text)


def photograph_hashes(model: SearchModel) -> dict[str, str]:
    """Hex digits of the hash of each packaged photograph, by name."""
    packed = model.encode([photograph_path(each) for each in PHOTOGRAPHS]).packed
    return {each.name: bytes(row).hex() for each, row in zip(PHOTOGRAPHS, packed.tolist(), strict=True)}


def _proofs(model: SearchModel, claims: Iterable[CopyClaim]) -> dict[int, dict[int, float]]:
    """By bits and level: share of the packaged photographs that no change moves out of the radius."""
    pixels = pixels_for(model, [photograph_path(each) for each in PHOTOGRAPHS])
    return {claim.bits: certified_shares(model, pixels, claim) for claim in claims}


def pixels_for(model: SearchModel, images: Iterable[OneImage]) -> Tensor:
    """(N, 3, side, side) float in [0, 1]."""
    return torch.stack([as_input(one_image(image, model.side)) for image in images])


def certified_shares(model: SearchModel, pixels: Tensor, claim: CopyClaim) -> dict[int, float]:
    """The shares that a claim certifies, of these images."""
    within, held = claim.strictest, {}
    for level in within.certified:
        held[level] = withstand(model.hasher, pixels, level / 255, claim.bits, within.radius)
    return {level: float(each.double().mean()) for level, each in held.items()}


def shares_text(shares: Mapping[int, float]) -> str:
    """``0.95 within 2, 0.75 within 4 of 255``."""
    return ", ".join(f"{share:.3f} within {level}" for level, share in shares.items()) + " of 255"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
