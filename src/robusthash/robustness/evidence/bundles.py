"""Evidence bundles: attacked queries in a folder, which anyone may send in and which count once scored here.

No attack code is run or trusted: the bounds are checked against our own clean queries, found by content hash;
the victim hashes the inputs again; our protocol scores them. A bundle can lower a number, never raise it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.attacks.threat_model import Threat
from robusthash.core.atomic_files import json_text, refuse_full, write_folder_aside
from robusthash.core.limited_files import read_json
from robusthash.evaluation.attack_block import AttackedBlock, finish
from robusthash.evaluation.context import EvaluationContext, by_content
from robusthash.evaluation.evaluate import score_attack, setting_of
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.results import EvalResult
from robusthash.metrics.robustness_measures import hrs, worst_case
from robusthash.metrics.statistics import bootstrap_interval, intervals
from robusthash.models.encoding import weights_digest
from robusthash.robustness.evidence.records import BUNDLE_SCHEMA, Manifest, ThreatRecord, read_record
from robusthash.version import __version__

_FILES = ("inputs.npy", "ids.json")
_OF_THE_SEARCH = frozenset({"attacks", "budget", "seeds", "digests.suite"})
"""Fields in which our search and a bundle may differ: it shows a point in the budget, however it was
found."""
_CLAIM = 0.005  # MAP by which a claim may differ from our own score before a note says so


@dataclass(frozen=True)
class Bundle:
    """A whole bundle: files as the manifest lists them, arrays of the right type. Read, not yet verified."""

    folder: Path
    manifest: Manifest
    ids: tuple[str, ...]
    inputs: np.ndarray  # (n, ...) float32, mapped from disk
    digest: str  # of the manifest, and by its list of files of everything else


def read_bundle(folder: str | Path) -> Bundle:
    """Read a bundle, and check all that needs no victim. Loads no pickle and opens no path that is listed.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: another schema, a damaged or truncated file, a wrong type; the field is named.
    """
    folder = Path(folder)
    path, inputs_path, ids_path = (folder / name for name in ("manifest.json", *_FILES))
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no evidence bundle: it has no manifest.json")
    manifest = read_record(Manifest, read_json(path), BUNDLE_SCHEMA, str(path))
    for name in _FILES:
        if name not in manifest.files:
            raise ValueError(f"{path}: files lists no {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is truncated: {name} is missing")
        if _sha256(folder / name) != manifest.files[name]:
            raise ValueError(f"{folder / name} is truncated or changed: its sha256 is not files[{name!r}]")
    ids = read_json(ids_path)
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise ValueError(f"{ids_path} must be a list of content hashes")
    if len(ids) != manifest.queries:
        raise ValueError(f"{ids_path} holds {len(ids)} ids, and the manifest says queries {manifest.queries}")
    try:
        inputs = np.load(inputs_path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{inputs_path} is truncated or no array: {error}") from None
    if inputs.dtype != np.float32:
        raise ValueError(f"{inputs_path}: dtype is {inputs.dtype}, and must be float32")
    if inputs.ndim == 0 or len(inputs) != len(ids) or math.prod(inputs.shape) == 0:
        raise ValueError(f"{inputs_path}: shape {inputs.shape} for {len(ids)} ids; it is truncated or empty")
    return Bundle(folder, manifest, tuple(ids), inputs, _sha256(path)[:12])


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- export


def export(
    context: EvaluationContext,
    threat: Threat,
    inputs: Tensor,
    folder: str | Path,
    *,
    positions: Tensor | None = None,
    attack: str = "unnamed",
    budget: str = "",
    model: str = "",
) -> EvalResult:
    """Write attacked queries as a bundle, checked and scored as its receiver will.

    Args:
        inputs: (n, ...) float32, attacked inputs of the query modality.
        positions: (n,) positions of the queries that they belong to; by default all queries, in order.

    Returns:
        The result that ``verify_bundle`` gives; queries that ``positions`` leaves out are scored clean.

    Raises:
        ValueError: inputs that leave the budget, or a threat on more than the query modality.
        FileExistsError: the folder holds something. It is there whole, or not at all.
    """
    folder, modality = Path(folder), context.direction[0]
    refuse_full(folder)
    if list(threat.balls) != [modality]:
        changed = f"{threat.name} changes {list(threat.balls)}"
        raise ValueError(f"a bundle holds queries of {modality!r} alone, and {changed}")
    rows = torch.arange(len(context.queries)) if positions is None else positions
    if len(rows) != len(inputs) or len(set(rows.tolist())) != len(rows):
        raise ValueError(f"{len(inputs)} inputs for {len(rows)} positions, which must differ from each other")
    result = _score(context, _SentAttack(attack, threat, budget), rows, inputs.numpy())
    key, ids = result.setting.key, [content.decode() for content in context.queries.hashes[rows.numpy()]]
    with write_folder_aside(folder) as aside:
        np.save(aside / _FILES[0], inputs.numpy(), allow_pickle=False)
        (aside / _FILES[1]).write_text(json.dumps(ids) + "\n")
        manifest = Manifest(
            threat=ThreatRecord.of(threat),
            **_identity(context),
            model=model,
            queries=len(rows),
            attack=attack,
            budget=budget,
            claimed={n: v for n, v in result.values.items() if MeasureKey.parse(n).name() == str(key)},
            tool=f"robusthash {__version__}",
            files={name: _sha256(aside / name) for name in _FILES},
        )
        document = {"schema": BUNDLE_SCHEMA, **manifest.model_dump(mode="json")}
        (aside / "manifest.json").write_text(json_text(document), encoding="utf-8")
    return result


def _identity(context: EvaluationContext) -> dict[str, Any]:
    """The fields of a manifest that must be those of the victim and its database."""
    return {
        "weights": weights_digest(context.victim),
        "database": context.data.database.fingerprint(),
        "direction": context.direction,
        "bits": context.victim.bits,
        "codes": hashlib.sha256(context.codes.packed.cpu().numpy().tobytes()).hexdigest()[:16],
    }


# ---------------------------------------------------------------------------------------------- verification


def verify_bundle(folder: str | Path, context: EvaluationContext) -> EvalResult:
    """Check a bundle against our own clean queries, hash it with the victim, and score it.

    A bundle may hold a part of the queries; the others are scored clean, which every attacker may leave them,
    so that in ``best_known`` they keep our own worst value.

    Raises:
        ValueError: made for other weights, another database, direction or length of code; queries that are
            not ours; inputs that leave the ball or range, or hold NaN. The message names the field.
    """
    bundle = read_bundle(folder)
    manifest, ours, notes = bundle.manifest, _identity(context), list[str]()
    differing = [name for name, value in ours.items() if getattr(manifest, name) != value]
    if (
        differing == ["codes"] and ours["weights"] != "none"
    ):  # without weights, only codes identify the victim
        notes.append("made against database codes that differ from ours, as other hardware may round")
    elif differing:
        name = differing[0]
        remedy = "verify it with the run it was made for"
        remedy = "it was made for other weights" if name == "weights" else remedy
        raise ValueError(f"{folder}: {name} is {getattr(manifest, name)!r} and ours {ours[name]!r}; {remedy}")
    if manifest.threat.modality != context.direction[0]:
        queries = f"queries here are {context.direction[0]!r}"
        raise ValueError(f"{folder}: threat.modality is {manifest.threat.modality!r}, and {queries}")
    budget = f"{manifest.budget or 'budget not stated'}; sent in, made with {manifest.tool}"
    attack = _SentAttack(manifest.attack, manifest.threat.threat(), budget)
    positions = _positions(bundle, context)
    result = _score(context, attack, positions, bundle.inputs, str(folder))
    if len(positions) < len(context.queries):
        count = f"{len(positions)} of {len(context.queries)}"
        notes.append(f"{count} queries are in the bundle; the others are scored clean")
    for name, value in manifest.claimed.items():
        if name in result.values and abs(result[name] - value) > _CLAIM:
            score = f"it scores {result[name]:.4f} here, which is what counts"
            notes.append(f"the bundle claims {name} {value:.4f}; {score}")
    name = f"evidence {bundle.digest}"
    return replace(result, notes=(*result.notes, *notes), name=name, attack=name)


def _positions(bundle: Bundle, context: EvaluationContext) -> Tensor:
    """(n,) position of each id among our queries; equal queries are taken in order."""
    free: dict[str, list[int]] = {}
    for position, content in enumerate(context.queries.hashes):
        free.setdefault(content.decode(), []).append(position)
    positions = []
    for row, content in enumerate(bundle.ids):
        if not free.get(content):
            raise ValueError(
                f"{bundle.folder / 'ids.json'}: id {content!r} (row {row}) is none of our "
                f"{len(context.queries)} queries, or comes too often; the bundle holds other queries"
            )
        positions.append(free[content].pop(0))
    return torch.tensor(positions, dtype=torch.int64)


@dataclass(frozen=True)
class _SentAttack:
    """All that scoring needs to know of an attack that ran elsewhere."""

    name: str
    threat: Threat
    budget: str
    targeted: bool = False


def _score(
    context: EvaluationContext,
    attack: _SentAttack,
    positions: Tensor,
    inputs: np.ndarray,
    where: str = "inputs",
) -> EvalResult:  # fmt: skip
    """Score inputs in place of our clean queries at ``positions``, block by block, all verified first."""
    (modality,) = attack.threat.balls
    row_of = {position: row for row, position in enumerate(positions.tolist())}
    blocks = []
    for block in range(context.blocks):
        batch = context.batch(block)
        clean = batch.inputs[modality]
        attacked = clean.clone()
        slots = [slot for slot, position in enumerate(batch.ids.tolist()) if position in row_of]
        rows = [row_of[int(batch.ids[slot])] for slot in slots]
        if rows:
            sent = torch.from_numpy(np.array(inputs[rows]))
            if sent.dtype != clean.dtype or sent.shape[1:] != clean.shape[1:]:
                ours = f"our clean queries {clean.dtype} {tuple(clean.shape[1:])}"
                raise ValueError(f"{where}: inputs are {sent.dtype} {tuple(sent.shape[1:])}, {ours}")
            attacked[slots] = sent.to(clean.device)
            try:
                attack.threat.verify({modality: attacked}, {modality: clean})
            except ValueError as error:
                raise ValueError(f"{where}: inputs, rows {rows[0]} to {rows[-1]}: {error}") from None
        blocks.append(finish(context, attack.threat, batch, [{modality: attacked}], 0.0))
    return score_attack(context, attack, AttackedBlock.join(blocks))


def on_queries(result: EvalResult, context: EvaluationContext, positions: Tensor) -> EvalResult:
    """The result of a verified bundle on some of the queries of its context, as a suite chooses them."""
    per_query = {name: values[positions] for name, values in result.per_query.items()}
    some = setting_of(context.at(positions, by_content(len(positions), context.data.query)))
    digests = {**result.setting.digests, "queries": some.digests["queries"]}
    chosen: dict[str, Any] = {"queries": some.queries, "data": some.data, "chosen": some.chosen}
    return replace(
        result,
        name=f"{result.name}, {len(positions)} queries",
        attack=f"{result.name}, {len(positions)} queries",
        setting=replace(result.setting, digests=digests, **chosen),
        values={n: float(per_query[n].nan_to_num(0.0).mean()) for n in result.values if n in per_query},
        per_query=per_query,
        interval=intervals(per_query),
    )


# ---------------------------------------------------------------------------------------------- best known


def disagreements(own: EvalResult, bundle: EvalResult) -> list[str]:
    """Names of the fields in which a bundle is about something else than our own worst case."""
    return [name for name in own.setting.differs(bundle.setting) if name not in _OF_THE_SEARCH]


def best_known(own: EvalResult, bundles: Mapping[str, EvalResult]) -> EvalResult:
    """The lowest value of each query over our own worst case and accepted bundles.

    Args:
        own: a worst case, of ``worst`` or of a suite.
        bundles: results of ``verify_bundle``, by source.

    Returns:
        ``own`` with lower values: ``winner`` names the source where a bundle won, ``attacks`` holds each
        bundle's MAP and how many queries it lowered alone, ``reference["own"]`` our own value. Without
        bundles, ``own`` itself.

    Raises:
        ValueError: a bundle of another model or in another setting; the message names the field.
    """
    if not bundles:
        return own
    for source, result in bundles.items():
        differing = disagreements(own, result)
        if own.setting.digests.get("model") != result.setting.digests.get("model"):
            differing.append("digests.model")
        if differing:
            raise ValueError(f"the bundle {source} and our own worst case differ in {', '.join(differing)}")
    key, values, per_query = own.setting.key, dict(own.values), dict(own.per_query)
    headline, low = str(key), key.name("worst")
    for name in own.per_query:
        measure = MeasureKey.parse(name)
        if measure.role == "worst" and measure.eps is None:
            plain = measure.name(storage=measure.storage)
            sent = {source: r.per_query[plain] for source, r in bundles.items() if plain in r.per_query}
            lowest = worst_case(own.per_query[name], sent)
            values[name], per_query[name] = lowest.mean, lowest.values
    best = worst_case(own.per_query[low], {source: r.per_query[headline] for source, r in bundles.items()})
    lower = {name: column for name, column in per_query.items() if column is not own.per_query[name]}
    first = next(iter(bundles.values()))
    clean = first.per_query[headline] + first.per_query["drop"]
    columns = torch.stack([clean, best.values, torch.full_like(clean, own.reference["chance"])], 1)
    values["HRS"] = float(hrs(*columns.mean(0)))
    span = bootstrap_interval(columns, lambda means: hrs(means[:, 0], means[:, 1], means[:, 2]))
    before = own.winner or ("own",) * len(best.winner)
    winners = sorted({name for name in best.winner if name != "clean"})
    note = f"lowered by {', '.join(winners)}" if winners else "no bundle lowers our own value"
    sent_in = {
        source: {headline: result[headline], "unique wins": float(best.unique_wins[source])}
        for source, result in bundles.items()
    }
    return replace(
        own,
        values=values,
        per_query=per_query,
        interval={**own.interval, **intervals(lower), "HRS": span},
        reference={**own.reference, "own": own[low]},
        winner=tuple(o if w == "clean" else w for o, w in zip(before, best.winner, strict=True)),
        attacks={**own.attacks, **sent_in},
        notes=(*own.notes, note),
    )
