"""Results: what was measured together with everything it depends on; JSON in and out."""

from __future__ import annotations

import hashlib
import io
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from robusthash.core.atomic_files import json_text
from robusthash.core.identity import scheme_of
from robusthash.core.limited_files import read_json, read_npz
from robusthash.core.registry import nearest
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.result_arrays import (
    headline_fault,
    pack_values,
    read_with_arrays,
    unpack_values,
    write_with_arrays,
)  # fmt: skip
from robusthash.metrics.statistics import GroupScores
from robusthash.version import __version__

SCHEMA = "robusthash.results/2"
_SCHEMA_1 = "robusthash.results/1"  # read, never written

_OF_THE_MODEL = ("model", "bits", "distance", "objective", "defense", "training_attack", "software")
_OF_DIGESTS = ("data", "tier", "relevance", "chosen")  # their contents are compared as digests


def software_versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"robusthash": __version__, **versions}


@dataclass(frozen=True)
class DataSet:
    """The data of a result; numbers of items are 0 where unknown, as of codes from files."""

    name: str = ""
    note: str = ""
    database: int = 0  # items
    queries: int = 0

    @property
    def texts(self) -> tuple[str, str]:
        """The database and the queries as reports name them: ``fashion:database[7000] (note)``."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}:database[{self.database}]{note}", f"{self.name}:query[{self.queries}]"


@dataclass(frozen=True)
class Setting:
    """Everything that a number depends on. Two results are comparable where all but the model agrees.

    ``digests`` identify contents: "model" (weights) and "codes" (database codes) change with the model;
    "database", "queries", "labels" and any other do not. "suite" and "budget" are identities
    (``core.identity``) of the attacks of a suite and of the budget of each search.
    """

    model: str
    database: str  # text for reports; ``data`` has its parts
    queries: str
    protocol: dict[str, Any]  # Protocol.settings(): cut, denominator, ties, empty policy, gain, target rule
    direction: str  # "I2I", "I2T", "T2I", "T2T"; "" for codes without a modality
    bits: int
    threat: str = "none"
    attacks: tuple[str, ...] = ()
    budget: str = ""
    seeds: tuple[int, ...] = ()  # of the evaluation; training seeds belong to the model
    digests: dict[str, str] = field(default_factory=dict)
    objective: str = ""
    defense: str = ""
    training_attack: str = ""
    software: dict[str, str] = field(default_factory=software_versions)
    chosen: str = ""  # "all", "200 of 1000 by content" or "given"; "" of results that do not say it
    data: DataSet = field(default_factory=DataSet)
    tier: str = ""  # or the name of a suite of one's own; "" of single attacks and of those of a recipe
    distance: str = "hamming"  # of the search: of codes, or "cosine" or "euclidean" of float vectors
    relevance: str = "own"  # label system that says what is relevant; "own" is that of the data set

    @property
    def query_description(self) -> str:
        """The queries, and how they were chosen where that is known."""
        return f"{self.queries}, {self.chosen}" if self.chosen else self.queries

    @property
    def key(self) -> MeasureKey:
        """The measure that worst cases, chance and summary scores refer to: ``MAP`` or ``MAP@k``."""
        return MeasureKey("MAP" if self.protocol["k"] is None else f"MAP@{self.protocol['k']}")

    @property
    def headline(self) -> str:
        """The name of ``key``."""
        return str(self.key)

    def comparable(self) -> dict[str, Any]:
        """Fields and digests that two settings must share to be comparable, as plain data."""
        plain = {n: v for n, v in asdict(self).items() if n not in (*_OF_THE_MODEL, *_OF_DIGESTS)}
        return {**plain, "digests": {n: v for n, v in self.digests.items() if n not in ("model", "codes")}}

    def differs(self, other: Setting) -> list[str]:
        """Fields in which two settings are not comparable; budgets without an identity compare by text."""
        ours, theirs = self.comparable(), other.comparable()
        budgets = [setting["digests"].pop("budget", "") for setting in (ours, theirs)]
        if all(budgets) and scheme_of(budgets[0]) == scheme_of(budgets[1]):
            ours["budget"], theirs["budget"] = budgets
        groups = [(name, ours.pop(name), theirs.pop(name)) for name in ("protocol", "digests")]
        names = [name for name in ours if name != "budget" and ours[name] != theirs[name]]
        names += ["budget"] if ours["budget"] != theirs["budget"] else []
        for group, one, two in groups:
            names += [f"{group}.{key}" for key in sorted({*one, *two}) if one.get(key) != two.get(key)]
        return names

    def difference(self, other: Setting) -> str:
        """The fields of ``differs`` in words, and that identities of suites by two schemes say nothing."""
        fields = ", ".join(self.differs(other))
        suites = [setting.digests["suite"] for setting in (self, other) if "suite" in setting.digests]
        schemes = sorted({scheme_of(suite) for suite in suites})
        if len(schemes) < 2:
            return fields
        names = " and ".join(map(str, schemes))
        return (
            f"{fields} (identities by the schemes {names} of this package, which cannot be compared: the "
            "suites may be the same; assess the older one again)"
        )


@dataclass(frozen=True)
class Cost:
    """Passes, oracle queries and seconds of an evaluation."""

    forward: int = 0  # passes of single queries
    backward: int = 0
    oracle: int = 0  # queries to a black box
    seconds: float = 0.0


@dataclass(frozen=True)
class Flag:
    """A sign that a robustness number may not be trusted."""

    id: str  # "F1" ... "F23"
    value: float
    threshold: float
    level: Literal["pass", "amber", "red"]
    remedy: str  # one line


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class EvalResult:
    """One evaluation: ``result["MAP@5000"]`` is a value."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    setting: Setting
    values: dict[str, float]  # by name; ``MeasureKey.parse`` takes a name apart
    per_query: dict[str, Tensor]  # (Q,); NaN for a query that the mean leaves out
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)  # chance, least, floor, clean
    empty: int = 0  # queries without a relevant item (targeted: and without a possible target)
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by curve, axis -> (G,)
    notes: tuple[str, ...] = ()  # clipped cuts, undefined measures
    winner: tuple[str, ...] = ()  # (Q,) attack and restart that found each worst AP; "clean" where none did
    attacks: dict[str, dict[str, float]] = field(default_factory=dict)  # of a suite: MAP, wins, completeness
    representative: dict[str, float] = field(default_factory=dict)  # of representative codes; no bound
    perceptibility: dict[str, float] = field(default_factory=dict)
    groups: dict[str, GroupScores] = field(default_factory=dict)  # of queries, as of one kind of change
    flags: tuple[Flag, ...] = ()
    cost: Cost = field(default_factory=Cost)
    name: str = ""  # unique in its run: "clean", "I2T worst", "img-linf-8 standard"
    selection: dict[str, Tensor] = field(default_factory=dict)
    """(Q,) AP of a randomised victim under other draws, which choose its worst case; not saved."""
    attack: str = ""  # "clean", "worst", or the attack by its name in the run
    scored_on: str = ""  # direction and relevance before the name: "I2T", "T2I by class"; "" of a run of one

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.per_query.items()}
        if self.winner:
            lengths["winner"] = len(self.winner)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"per-query arrays of different length: {lengths}")

    def __getitem__(self, name: str | MeasureKey) -> float:
        if str(name) not in self.values:
            raise KeyError(f"this result has no {str(name)!r}{nearest(str(name), self.values)}")
        return self.values[str(name)]

    def __repr__(self) -> str:
        """A few lines to read; the fields have the rest."""
        names = [self.setting.key.name(role) for role in ("worst", "targeted", "")]
        headline = next((name for name in (*names, *self.values) if name in self.values), "")
        setting, of = self.setting, self.name or self.attack or "result"
        low, high = self.interval.get(headline, (float("nan"), float("nan")))
        known = {name: value for name, value in self.reference.items() if name in ("clean", "chance")}
        flags = [flag.id for flag in self.flags if flag.level != "pass"]
        lines = [
            f"EvalResult of {of}: {setting.queries} on {setting.database}, {setting.bits} bits",
            f"  {headline or 'no values'} {self.values.get(headline, float('nan')):.4f} (95 % interval "
            f"{low:.4f} to {high:.4f}), " + ", ".join(f"{name} {value:.4f}" for name, value in known.items()),
            f"  attack: {setting.threat}; {', '.join(setting.attacks)}" if setting.attacks else "  no attack",
            f"  {len(self.values)} values, {len(self.notes)} notes, "
            + (f"flags {', '.join(flags)}" if flags else "no flags"),
        ]
        return "\n".join(lines)

    @property
    def unreliable(self) -> bool:
        """True where a red flag was raised."""
        return any(flag.level == "red" for flag in self.flags)


def headline_of(result: EvalResult) -> str:
    """The main measure of a result: wMAP of a worst case, t-MAP of a targeted attack, else MAP."""
    names = [result.setting.key.name(role) for role in ("worst", "targeted", "")]
    return next(name for name in names if name in result.values)


def with_headlines(results: Sequence[EvalResult]) -> Sequence[EvalResult]:
    """The results of a run, each of which must hold its main measure and the interval of it."""
    for result in results:
        names = [result.setting.key.name(role) for role in ("worst", "targeted", "")]
        if not any(name in result.values and name in result.interval for name in names):
            raise ValueError(f"{result.name!r} holds no {names[-1]} with an interval")
    return results


def by_direction(results: Mapping[str, EvalResult]) -> dict[str, dict[str, EvalResult]]:
    """The results of a run by ``scored_on``, and by ``attack``.

    Raises:
        ValueError: a result without the clean one that it belongs to.
    """
    groups: dict[str, dict[str, EvalResult]] = {}
    for result in results.values():
        groups.setdefault(result.scored_on, {})[result.attack] = result
    for name, result in results.items():
        if "clean" not in groups[result.scored_on]:
            raise ValueError(f"the result {name!r} has no clean one next to it; evaluate the run again")
    return groups


# ---------------------------------------------------------------------------------------------- JSON


def save_results(path: str | Path, results: Sequence[EvalResult], packed: bool = False) -> None:
    """Write results to ``path`` (JSON) and their arrays to a sidecar ``NAME-DIGEST.npz`` next to it.

    The sidecar is named by its content, which the JSON names, and written first: whenever the writing ends,
    the JSON is whole and finds its own. An infinite value (the PSNR of an unchanged image) is written "inf".

    Args:
        packed: per-query values in 16 bits each, and the sidecar compressed; see ``pack_values``.

    Raises:
        ValueError: a NaN among the values, with its name; or values that cannot be packed.
        OSError: the disk is full or the folder missing; older files are untouched.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"results are saved as .json, got {path.name}")
    arrays: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {} if packed else arrays
    entries = []
    for result in results:
        entry = asdict(replace(result, per_query={}, curves={}, selection={}))
        prefix = "query" if packed else "array"
        entry["per_query"] = {
            name: _add(queries, values, prefix) for name, values in result.per_query.items()
        }
        entry["curves"] = {
            name: {axis: _add(arrays, values) for axis, values in axes.items()}
            for name, axes in result.curves.items()
        }
        entries.append(entry)
    buffer = io.BytesIO()
    if packed:
        np.savez_compressed(buffer, allow_pickle=False, **arrays, **pack_values(queries))
    else:
        np.savez(buffer, allow_pickle=False, **arrays)
    names = dict.fromkeys(name for result in results for name in (*result.values, *result.per_query))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "sidecar": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "measures": {name: MeasureKey.parse(name).plain() for name in names},  # for programs of others
        "results": entries,
    }
    text = json_text(document, path.name)
    write_with_arrays(path, text, buffer.getvalue(), document["sidecar"])


def _add(arrays: dict[str, np.ndarray], values: Tensor, prefix: str = "array") -> str:
    """Put a tensor among the arrays; its key there."""
    key = f"{prefix}{len(arrays)}"
    arrays[key] = values.detach().cpu().numpy()
    return key


def load_results(path: str | Path) -> list[EvalResult]:
    """Read what ``save_results`` wrote, by this schema or the one before.

    Raises:
        FileNotFoundError: the JSON or its sidecar is missing.
        ValueError: not a results file, another schema, a damaged field, or a sidecar of other results.
    """
    path = Path(path)
    document, content = read_with_arrays(path, _document)
    try:
        held = read_npz(io.BytesIO(content))
        if "steps" in held:
            held |= unpack_values({key: held.pop(key) for key in ("names", "lengths", "tops", "steps")})
        arrays = {key: torch.from_numpy(values) for key, values in held.items()}
        entries = document["results"]
        if document["schema"] == _SCHEMA_1:
            entries = _with_fields(entries)
        return [_read(entry, arrays, path) for entry in entries]
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path} is damaged: {faults}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _document(path: Path) -> dict[str, Any]:
    """The JSON of a results file."""
    document = read_json(path)
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{path} is not a results file: it names no schema")
    if document["schema"] not in (SCHEMA, _SCHEMA_1):
        raise ValueError(f"{path} has the schema {document['schema']!r}, this version reads {SCHEMA!r}")
    return document


_RESULT = TypeAdapter(EvalResult)


def _read(entry: dict[str, Any], arrays: Mapping[str, Tensor], where: Path) -> EvalResult:
    per_query = {name: arrays[key] for name, key in entry["per_query"].items()}
    curves = {
        name: {axis: arrays[key] for axis, key in axes.items()} for name, axes in entry["curves"].items()
    }
    result = _RESULT.validate_python({**entry, "per_query": per_query, "curves": curves})
    names = [result.setting.key.name(role) for role in ("worst", "targeted", "")]
    columns = {name: per_query[name].numpy() for name in names if name in per_query}
    if fault := headline_fault(result.values, columns, names):
        raise ValueError(f"{where} is not consistent: of {result.name!r}, {fault}")
    return result


def _with_fields(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of schema 1 with the fields of schema 2, which they hold in names and texts alone."""
    names = [entry["name"] for entry in entries]
    prefixes = [name.removesuffix("clean") for name in names if name == "clean" or name.endswith(" clean")]
    filled = []
    for name, entry in zip(names, entries, strict=True):
        setting = entry["setting"]
        suite = re.fullmatch(r"suite (?P<name>.+), \d+ lines", setting["budget"])
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
        if suite is not None:
            prefix = name.removesuffix(f"{setting['threat']} {suite['name']}")
        database = re.fullmatch(
            r"(?P<name>.+?):database\[(?P<count>\d+)\](?: \((?P<note>.*)\))?", setting["database"]
        )
        queries = re.fullmatch(r".+:query\[(?P<count>\d+)\]", setting["queries"])
        data = DataSet(setting["database"])
        if database and queries:
            note = database["note"] or ""
            data = DataSet(database["name"], note, int(database["count"]), int(queries["count"]))
        relevance = prefix.strip().rpartition("by ")
        fields = {
            "data": asdict(data),
            "tier": suite["name"] if suite else "",
            "relevance": relevance[2] if relevance[1] else "own",
        }
        attack = "worst" if suite else name.removeprefix(prefix)
        filled.append(
            {**entry, "setting": {**setting, **fields}, "attack": attack, "scored_on": prefix.strip()}
        )
    return filled
