"""Results: what was measured together with everything it depends on; JSON in and out; comparison of two."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.atomic_files import json_text, write_all_aside
from robusthash.core.identity import scheme_of
from robusthash.core.registry import nearest
from robusthash.metrics.packed_values import pack, unpack
from robusthash.metrics.statistics import holm, intervals, sign_flip_tests
from robusthash.version import __version__

SCHEMA = "robusthash.results/1"

_OF_THE_MODEL = ("model", "bits", "objective", "defense", "training_attack")
_DIGESTS_OF_THE_MODEL = ("model", "codes")


def software_versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    return {
        "robusthash": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class Setting:
    """What a result is a statement about: model, database, queries, threat, attack set, budget and seeds.

    ``digests`` identify contents: "model" (weights) and "codes" (database codes) change with the model;
    "database", "queries", "labels" and any other do not. "suite" and "budget" are identities
    (``core.identity``) of the attacks of a suite and of what each search was allowed. Two results are
    comparable where all but the model agrees.
    """

    model: str
    database: str
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

    @property
    def asked(self) -> str:
        """The queries, and how they were chosen where that is known."""
        return f"{self.queries}, {self.chosen}" if self.chosen else self.queries

    @property
    def headline(self) -> str:
        """The measure that worst cases, chance and summary scores refer to: ``MAP`` or ``MAP@k``."""
        return "MAP" if self.protocol["k"] is None else f"MAP@{self.protocol['k']}"

    def differs(self, other: Setting) -> list[str]:
        """Names of the fields in which two settings differ, apart from those of the model and the software.

        How queries were chosen is none of them: the digest of the queries says whether they are the same.
        Budgets are compared by their identities, and by their texts where a result has none.
        """
        own, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        others = (*_OF_THE_MODEL, "software", "chosen", "digests", "protocol", "budget")
        found = [name for name in own if name not in others and own[name] != theirs[name]]
        found += ["budget"] if self._other_budget(other) else []
        for group, skipped in (("protocol", ()), ("digests", (*_DIGESTS_OF_THE_MODEL, "budget"))):
            keys = sorted({*own[group], *theirs[group]} - set(skipped))
            found += [f"{group}.{key}" for key in keys if own[group].get(key) != theirs[group].get(key)]
        return found

    def difference(self, other: Setting) -> str:
        """The fields of ``differs`` as a sentence says them, "" where there are none.

        Identities of suites that were made by different schemes tell nothing about the suites; the sentence
        says so.
        """
        found = ", ".join(self.differs(other))
        suites = [setting.digests["suite"] for setting in (self, other) if "suite" in setting.digests]
        schemes = [scheme_of(suite) for suite in suites]
        if len({*schemes}) < 2:
            return found
        first, second = sorted(schemes)
        return (
            f"{found} (identities by the schemes {first} and {second} of this package, which cannot be compared: the "
            "suites may be the same; assess the older one again)"
        )

    def _other_budget(self, other: Setting) -> bool:
        own, theirs = self.digests.get("budget"), other.digests.get("budget")
        if own and theirs and scheme_of(own) == scheme_of(theirs):
            return own != theirs
        return self.budget != other.budget


@dataclass(frozen=True)
class Cost:
    """What an evaluation spent."""

    forward: int = 0  # passes of single queries
    backward: int = 0
    oracle: int = 0  # questions to a black box
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
    """One evaluation: ``result["MAP@5000"]`` is a value, everything else says how it came about."""

    setting: Setting
    values: dict[str, float]
    per_query: dict[str, Tensor]  # (Q,); NaN for a query that the mean leaves out
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)  # chance, least, floor, clean
    empty: int = 0  # queries without a relevant item (targeted: and without a possible target)
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by curve, axis -> (G,)
    notes: tuple[str, ...] = ()  # clipped cuts, undefined measures
    winner: tuple[str, ...] = ()  # (Q,) attack and restart that found each worst AP; "clean" where none did
    attacks: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # of a suite: MAP, unique wins, completeness
    representative: dict[str, float] = field(
        default_factory=dict
    )  # representative codes as queries; no bound
    perceptibility: dict[str, float] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    cost: Cost = field(default_factory=Cost)
    name: str = ""  # within its run: "clean", an attack, "worst"

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.per_query.items()}
        if self.winner:
            lengths["winner"] = len(self.winner)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"per-query arrays of different length: {lengths}")

    def __getitem__(self, name: str) -> float:
        if name not in self.values:
            raise KeyError(f"this result has no {name!r}{nearest(name, self.values)}")
        return self.values[name]

    @property
    def unreliable(self) -> bool:
        """A red flag stands."""
        return any(flag.level == "red" for flag in self.flags)


def by_direction(results: Mapping[str, EvalResult]) -> dict[str, dict[str, EvalResult]]:
    """The results of a run by what they were scored on, with their own names: "" where that is one thing
    alone.

    A run over several directions or relevances has ``I2T clean``, ``I2T mainstay``, ``T2I by class clean``:
    these are ``clean`` and ``mainstay`` of "I2T", and ``clean`` of "T2I by class".

    Raises:
        ValueError: a result without the clean one that it belongs to.
    """
    prefixes = [name.removesuffix("clean") for name in results if name == "clean" or name.endswith(" clean")]
    groups: dict[str, dict[str, EvalResult]] = {prefix.strip(): {} for prefix in prefixes}
    for name, result in results.items():
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        if not fitting:
            raise ValueError(f"the result {name!r} has no clean one beside it; evaluate the run again")
        prefix = max(fitting, key=len)
        groups[prefix.strip()][name.removeprefix(prefix)] = result
    return groups


# ---------------------------------------------------------------------------------------------- JSON

_ARRAYS = ("per_query", "curves")  # tensors live in the sidecar


def save_results(path: str | Path, results: Sequence[EvalResult], packed: bool = False) -> None:
    """Write results to ``path`` (JSON) and their arrays to the ``.npz`` of the same name.

    Both are complete on disk before either replaces an older one, and the JSON holds the digest of its
    sidecar, so a pair that does not belong together is noticed. An infinite value (the PSNR of an unchanged
    image) is written "inf".

    Args:
        packed: per-query values in 16 bits each, and the sidecar compressed; see ``packing.pack``.

    Raises:
        ValueError: a NaN among the values, with its name; or values that cannot be packed.
        OSError: the disk is full or the folder missing; older files are untouched.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"results are saved as .json, got {path.name}")
    arrays: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {} if packed else arrays
    written = []
    for result in results:
        plain = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in _ARRAYS}
        plain["setting"], plain["cost"] = dataclasses.asdict(result.setting), dataclasses.asdict(result.cost)
        plain["flags"] = [dataclasses.asdict(flag) for flag in result.flags]
        prefix = "query" if packed else "array"
        plain["per_query"] = {
            name: _keep(queries, values, prefix) for name, values in result.per_query.items()
        }
        plain["curves"] = {
            name: {axis: _keep(arrays, values) for axis, values in axes.items()}
            for name, axes in result.curves.items()
        }
        written.append(plain)
    buffer = io.BytesIO()
    if packed:
        np.savez_compressed(buffer, allow_pickle=False, **arrays, **pack(queries))
    else:
        np.savez(buffer, allow_pickle=False, **arrays)
    sidecar = hashlib.sha256(buffer.getvalue()).hexdigest()
    document = {"schema": SCHEMA, "sidecar": sidecar, "results": written}
    text = json_text(document, path.name)
    with write_all_aside([path.with_suffix(".npz"), path]) as (array_file, json_file):
        array_file.write_bytes(buffer.getvalue())
        json_file.write_text(text, encoding="utf-8")


def _keep(arrays: dict[str, np.ndarray], values: Tensor, prefix: str = "array") -> str:
    """Put a tensor among the arrays; its key there."""
    key = f"{prefix}{len(arrays)}"
    arrays[key] = values.detach().cpu().numpy()
    return key


def load_results(path: str | Path) -> list[EvalResult]:
    """Read what ``save_results`` wrote.

    Raises:
        FileNotFoundError: the JSON or its sidecar is missing.
        ValueError: not a results file, another schema, or a sidecar of another run.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError(f"{path} is not a results file: it names no schema")
    if document["schema"] != SCHEMA:
        raise ValueError(f"{path} has the schema {document['schema']!r}, this version reads {SCHEMA!r}")
    sidecar = path.with_suffix(".npz")
    if not sidecar.exists():
        raise FileNotFoundError(f"{path} needs its per-query values in {sidecar.name}, which is missing")
    content = sidecar.read_bytes()
    if hashlib.sha256(content).hexdigest() != document["sidecar"]:
        raise ValueError(
            f"{sidecar} does not belong to {path.name}: one of the two is of another run; evaluate again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
        held = {key: loaded[key] for key in loaded.files}
    if "steps" in held:
        held |= unpack({key: held.pop(key) for key in ("names", "lengths", "tops", "steps")})
    arrays = {key: torch.from_numpy(values) for key, values in held.items()}
    try:
        return [_read(entry, arrays) for entry in document["results"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _read(entry: dict[str, Any], arrays: dict[str, Tensor]) -> EvalResult:
    setting = dict(entry["setting"])
    setting["attacks"], setting["seeds"] = tuple(setting["attacks"]), tuple(setting["seeds"])
    return EvalResult(
        setting=Setting(**setting),
        values=_floats(entry["values"]),
        per_query={name: arrays[key] for name, key in entry["per_query"].items()},
        interval={name: (float(low), float(high)) for name, (low, high) in entry["interval"].items()},
        reference=_floats(entry["reference"]),
        empty=entry["empty"],
        curves={
            name: {axis: arrays[key] for axis, key in axes.items()} for name, axes in entry["curves"].items()
        },
        notes=tuple(entry["notes"]),
        winner=tuple(entry["winner"]),
        attacks={name: _floats(values) for name, values in entry["attacks"].items()},
        representative=_floats(entry["representative"]),
        perceptibility=_floats(entry["perceptibility"]),
        flags=tuple(
            Flag(**{**flag, "value": float(flag["value"]), "threshold": float(flag["threshold"])})
            for flag in entry["flags"]
        ),
        cost=Cost(**entry["cost"]),
        name=entry["name"],
    )


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}  # "inf" too


# ---------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Difference:
    """A paired difference of two models on the same queries."""

    mean: float  # first minus second
    interval: tuple[float, float]  # 95 % bootstrap over queries
    p: float  # two-sided sign-flip test
    p_holm: float  # corrected over all measures of the comparison
    queries: int  # queries that both have a value for


def compare(first: EvalResult, second: EvalResult) -> dict[str, Difference]:
    """Paired differences (first minus second) of every per-query measure that both have.

    Raises:
        ValueError: the settings differ in anything but the model; the message names the fields. Or nothing is
            common.
    """
    if differing := first.setting.difference(second.setting):
        raise ValueError(
            f"these results cannot be compared: they differ in {differing}; "
            "only the model may differ, so evaluate both under the same setting"
        )
    paired: dict[str, Tensor] = {}
    for name in [name for name in first.per_query if name in second.per_query]:
        left, right = first.per_query[name].to(torch.float64), second.per_query[name].to(torch.float64)
        if left.shape != right.shape:
            raise ValueError(f"{name} has {len(left)} values in one result and {len(right)} in the other")
        if not (left - right).isnan().all():
            paired[name] = left - right
    if not paired:
        raise ValueError("the two results share no per-query measure")
    ends, p_values = intervals(paired), sign_flip_tests(paired)
    corrected = holm(p_values)
    return {
        name: Difference(
            float(values.nanmean()), ends[name], p_values[name], corrected[name], int((~values.isnan()).sum())
        )
        for name, values in paired.items()
    }
